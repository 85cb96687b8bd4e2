"""The plan of a step: which tensors it updates, checked once and kept while nothing has moved.

A plan is found stale by comparing two looks (look.py) at all its tensors. No gradient and no state
is kept alive, so that a trainer can move states to the CPU and get their memory back.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, compress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import is_freed
from .entries import Entries, Entry, Grads, State
from .kernels import table as t
from .kernels.launch_parameters import architecture, launch_parameters
from .layouts import REALS, Described, GradLayout, grad_layout
from .look import Look, Members, Seen, for_each_state, look, states_of
from .norm import Ranks
from .shards import local, local_state
from .storage import Storage

Addresses = np.ndarray[Any, np.dtype[np.int64]]


class Plan(NamedTuple):
    """Entries by device; a device that a kernel updates has a table, the others the reference."""

    look: Look
    params: list[Tensor]
    states: list[weakref.ref[Any]]  # the objects, and what they had their memory in
    gone: list[weakref.ref[Any]]  # those that died: others may have got their id, their address
    pooled: bool  # whether some states are parts of larger storages, counts of steps apart
    versioned: list[bool]  # of the states; False: an earlier one's counter is its own, too
    entries: Entries
    copied: tuple[Entry, ...]  # those with a stand-in for param or gradient
    freed: list[int]  # places of idle ones whose param, or some state, has no memory by now
    by_device: dict[torch.device, tuple[Entry, ...]]
    rows: Mapping[int, t.Row]  # of the tables, by place
    tables: dict[torch.device, t.Table]
    meshes: Mapping[Ranks, int]  # numbers of the sets of ranks that hold parts of gradients
    copies: tuple[Any, ...]  # process groups: norm.py's `copies_of`
    norm_over: tuple[bool, Any]  # for which they were made: with a norm or not, its group
    backend: str  # for which the tables were made


def look_again(
    plan: Plan, members: Members, state: State, grads_here: Grads | None
) -> tuple[Look, Seen] | None:
    """A look that finds options, params and states of the plan as they were; None: it does not."""
    try:
        new, seen = look(members, plan.entries, state, grads_here, plan.pooled, plan.look)
    except (KeyError, AttributeError, TypeError, RuntimeError, NotImplementedError):
        return None  # something is missing or has no address: the checks find the words for it
    if plan.gone or not new.same_tensors(plan.look):
        return None
    if (
        new != plan.look
        and any(map(Described.may_lack_memory, new.grads))
        and any(grad is not None and is_freed(grad) for grad in seen.grads)
    ):
        return None
    if any(seen.grads[place] is not None for place in plan.freed):
        return None
    return new, seen


def follow(plan: Plan, new: Look, grads: Grads) -> Plan | None:
    """The plan as it is, or with gradients elsewhere; None where more of them has changed.

    new, grads: what `look_again` has found.
    """
    if new == plan.look:
        return plan
    if new.present != plan.look.present:
        # experts idle in some steps: what comes back must be as it was
        if not _are_as_known(plan.entries, grads, new):
            return None
    elif not new.same_kinds_of_grads(plan.look):
        return None
    addresses = _addresses_by_place(new)
    tables = {
        device: table.with_grads(_grad_column(plan.by_device[device], addresses, bool(plan.copied)))
        for device, table in plan.tables.items()
    }
    return plan._replace(look=new, tables=tables)


def held_entries(plan: Plan, grads: Grads) -> dict[int, Entry]:
    """Entries that hold all the same, by place, where gradients have changed that `follow` cannot.

    Where some param has its first gradient, or a gradient another layout, all others do: experts
    come alive one after the other, and to check and lay out all of them anew takes long.

    grads: what `look_again` has found.
    """
    own = ((e, grads[e.place]) for e in plan.entries.all)
    return {e.place: e for e, grad in own if grad is None or grad_layout(grad) == e.grad}


def written_by(plan: Plan, seen: Seen) -> list[Tensor]:
    """Params and states that a step of the plan writes: those with a gradient."""
    entries = plan.entries
    if len(entries.all) == len(seen.params) and not any(plan.look.present):
        shards = list(map(local, seen.params)) if entries.sharded else []
        return seen.params + shards + list(compress(seen.states, plan.versioned))
    busy = [seen.grads[place] is not None for place in entries.places]
    params = list(compress(entries.params, busy))
    shards = list(map(local, params)) if entries.sharded else []
    return params + shards + list(compress(seen.states, for_each_state(entries, busy)))


def make_plan(
    members: Members,
    entries: Entries,
    state: State,
    on_kernel: Collection[torch.device],
    grads_here: Grads | None,
    meshes: Mapping[Ranks, int],
    copies: tuple[Any, ...],
    norm_over: tuple[bool, Any],
    backend: str,
    before: Plan | None,
    held: Collection[int],
) -> tuple[Plan, Seen]:
    """The plan for checked entries whose state is there.

    before, held: the last plan, and the places of its entries that hold: their rows stay, too.
    """
    by_device: dict[torch.device, list[Entry]] = {}
    for e in entries.all:
        by_device.setdefault(e.local.device, []).append(e)
    no_groups = t.frozen(np.zeros(0, dtype=np.int64))  # each launch puts its own in
    old_rows = {} if before is None else before.rows
    rows = {
        e.place: old_rows[e.place] if e.place in held else _row(e, local_state(state[e.param]))
        for device in on_kernel
        for e in by_device[device]
    }
    watched: list[weakref.ref[Any]] = []
    gone: list[weakref.ref[Any]] = []
    unwatched, pooled = entries, False
    if before is not None and len(held) == len(before.entries.all):  # no state of theirs is new
        unwatched = Entries.of([e for e in entries.all if e.place not in held])
        watched, gone, pooled = before.states, before.gone, before.pooled
    states = states_of(unwatched, state)
    storages = list(map(Tensor.untyped_storage, states))
    pooled |= any(
        x.dim() and x.nbytes != storage.nbytes()
        for x, storage in zip(states, storages, strict=True)
    )
    watched = watched + [weakref.ref(x, gone.append) for x in (*states, *storages)]
    new, seen = look(members, entries, state, grads_here, pooled)
    addresses = _addresses_by_place(new)
    copied = tuple(e for e in entries.all if e.dense is not None or e.grad_copy is not None)
    plan = Plan(
        look=new,
        params=seen.params,
        states=watched,
        gone=gone,
        pooled=pooled,
        versioned=list(_first_of_their_base(seen.states)),
        entries=entries,
        copied=copied,
        freed=[e.place for e in entries.all if seen.grads[e.place] is None and _freed(e, state)],
        by_device={device: tuple(own) for device, own in by_device.items()},
        rows=rows,
        tables={
            device: t.build(
                [rows[e.place] for e in by_device[device]],
                _grad_column(by_device[device], addresses, bool(copied)),
                no_groups,
                len(members.counts),
                launch_parameters(architecture(device)),
            )
            for device in on_kernel
        },
        meshes=meshes,
        copies=copies,
        norm_over=norm_over,
        backend=backend,
    )
    return plan, seen


def _freed(e: Entry, state: State) -> bool:
    own = local_state(state[e.param])
    return any(map(is_freed, (e.local, *(own[key] for key in (*e.storage.keys, "step")))))


def _first_of_their_base(states: Iterable[Tensor]) -> Iterator[bool]:
    bases: dict[int, Tensor] = {}  # views of one tensor count their versions together
    for x in states:
        base = x if x._base is None else x._base
        yield id(base) not in bases
        bases[id(base)] = base  # alive, so that nobody else gets its id


def _are_as_known(entries: Entries, grads: Sequence[Tensor | None], new: Look) -> bool:
    """Whether the gradients seen are those of entries alone, and laid out as these say.

    Contiguous ones by dtype and numel, as ever: an entry's param has the shape of its gradient.
    """
    there = [grads[place] is not None for place in entries.places]
    columns = [list(compress(column, there)) for column in entries.grads]
    dtypes, _, _, numels, contiguous, _ = columns
    kinds = zip(*(part.kinds for part in new.grads), strict=True)
    if [dtypes, numels, contiguous] != [list(chain.from_iterable(x)) for x in kinds]:
        return False
    if not any(part.others or part.lazy for part in new.grads):
        return True
    known = map(GradLayout, *columns)
    here = [grad for place in entries.places if (grad := grads[place]) is not None]
    return list(known) == list(map(grad_layout, here))


def _addresses_by_place(look: Look) -> Addresses:
    """Addresses of the gradients of all params, 0 where there is none."""
    found = np.fromiter(chain.from_iterable(part.addresses for part in look.grads), dtype=np.int64)
    found[found == 0] = t.EMPTY_GRAD
    if not any(look.present):
        return found
    parts = zip(look.present, look.grads, strict=True)
    there = np.concatenate([some or [True] * len(part.addresses) for some, part in parts])
    addresses = np.zeros(len(there), dtype=np.int64)
    addresses[there] = found
    return addresses


def _grad_column(entries: Sequence[Entry], addresses: Addresses, copied: bool) -> t.Words:
    """Addresses that the kernel reads gradients from, 0 where there is none in this step.

    copied: whether some entry, of whatever device, has a stand-in.
    """
    all_of_them = len(entries) == len(addresses)
    column = addresses if all_of_them else addresses[[e.place for e in entries]]
    if copied:
        for i, e in enumerate(entries):
            if e.grad_copy is not None and column[i]:
                column[i] = e.grad_copy.data_ptr() or t.EMPTY_GRAD
    return t.frozen(column)


def _row(e: Entry, state: Mapping[str, Any]) -> t.Row:
    param, storage = e.local if e.dense is None else e.dense, e.storage
    at = {key: state[key].data_ptr() for key in storage.keys}
    first, second, *largest = storage.payloads
    step = state["step"]
    return t.Row(
        param=param.data_ptr(),
        exp_avg=at[first],
        exp_avg_sq=at[second],
        max_exp_avg_sq=at[largest[0]] if largest else 0,
        step=step.data_ptr(),
        numel=param.numel() * (2 if param.is_complex() else 1),
        group=e.group,
        signature=_signature(
            param.dtype,
            e.grad.dtype,
            state[first].dtype,
            state[second].dtype,
            storage,
            columns=storage.random and e.part.inner != 0,
        ),
        step_is_double=step.dtype == torch.float64,
        mesh=e.mesh,
        master=at[storage.keys[-1]] if storage.master is not None else 0,
        exp_avg_scale=at.get("exp_avg_scale", 0),
        exp_avg_sq_scale=at.get("exp_avg_sq_scale", 0),
        max_exp_avg_sq_scale=at.get("max_exp_avg_sq_scale", 0),
        position=e.position,
        first=e.part.first,
        inner=e.part.inner,
        inner_whole=e.part.inner_whole,
    )


@functools.cache  # a few, and thousands of tensors that have them
def _signature(
    param: torch.dtype,
    grad: torch.dtype,
    exp_avg: torch.dtype,
    exp_avg_sq: torch.dtype,
    storage: Storage,
    columns: bool,
) -> t.Signature:
    return t.Signature(
        param=REALS.get(param, param),
        grad=REALS.get(grad, grad),
        exp_avg=REALS.get(exp_avg, exp_avg),
        exp_avg_sq=REALS.get(exp_avg_sq, exp_avg_sq),
        amsgrad=storage.amsgrad,
        master=storage.master,
        stochastic=storage.stochastic,
        columns=columns,
    )
