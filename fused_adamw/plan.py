"""The plan of a step: which tensors it updates, checked once and kept while nothing has moved.

A plan is found stale by comparing what tensors *are* with what it was made from, never by the
identity of objects alone: `zero_grad()` makes new gradients in every step, and `p.data = x` keeps
the object while everything else changes. Params and gradients are compared by address, dtype and
layout; states by object and address, while both the object and its storage live. No gradient and no
state is kept alive, so that a trainer can move states to the CPU and get their memory back.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain, compress
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import storage as storing
from .checks import check_tensors, is_started, param_name, refuse_overlaps
from .kernels import table as t
from .kernels.launch_parameters import architecture, launch_parameters
from .layouts import (
    REALS,
    Described,
    GradLayout,
    dense_copy,
    grad_layout,
    is_dense,
    same_strides,
)
from .norm import Ranks
from .shards import Place, local, local_state, place_of
from .storage import Storage

Groups = Sequence[Mapping[str, Any]]
Grads = Sequence[Tensor | None]
State = MutableMapping[Tensor, dict[str, Any]]
Addresses = np.ndarray[Any, np.dtype[np.int64]]


# Params asked in one go: their objects stay in the cache from one question to the next, and answers
# equal to the last look's are dropped before they leave it.
IN_CACHE = 1024


class Entry(NamedTuple):
    """A parameter that has a gradient, or had one in an earlier step."""

    place: int  # in the list of all params, one group after the other
    position: int  # the same, but in a bucket of release.py that in the whole optimizer
    group: int
    name: str  # for messages
    param: Tensor  # as the optimizer and its state know it
    local: Tensor  # what lies on this rank: the param itself, unless it is a DTensor
    storage: Storage  # of its moments and its master
    part: Place  # where its elements lie in the whole param, if the storage asks
    grad: GradLayout  # where it has none in this step: as it was, or as it will most likely be
    dense: Tensor | None  # stand-in for a param with gaps in its memory, copied there and back
    grad_copy: Tensor | None  # the gradient in the param's layout, where its own is another
    mesh: int  # number of the ranks over which its gradient's squares are added: norm.py


class Entries(NamedTuple):
    """The entries of a step, and what a look at them wants ready-made."""

    all: tuple[Entry, ...]
    params: list[Tensor]
    places: list[int]
    grads: tuple[tuple[Any, ...], ...]  # their GradLayouts, in columns
    objects: bytes  # which params
    keys: dict[str, list[bool]]  # of states, and which entries have them; no list: all
    sharded: bool  # whether some are DTensors

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Entries:
        """From the entries alone."""
        own = [(*e.storage.keys, "step") for e in entries]
        keys = {key: [key in k for k in own] for key in dict.fromkeys(chain.from_iterable(own))}
        sharded = any(e.param is not e.local for e in entries)
        params = [e.param for e in entries]
        return cls(
            tuple(entries),
            params,
            [e.place for e in entries],
            tuple(zip(*(e.grad for e in entries), strict=True)) or ((),) * len(GradLayout._fields),
            objects(params),
            {key: [] if all(has) else has for key, has in keys.items()},
            sharded,
        )


class Members(NamedTuple):
    """The params of all groups, and what of the groups a plan depends on."""

    params: list[Tensor]  # one group after the other
    counts: list[int]  # of each group
    stored: list[tuple[Any, ...]]  # its options that say what is stored, and how


class Stored(NamedTuple):
    """Some state tensors: the objects, where they are, and in a pool, in which dtype."""

    objects: bytes
    addresses: list[int]
    dtypes: list[torch.dtype]

    @classmethod
    def of(cls, states: Sequence[Tensor], pooled: bool, before: Stored | None) -> Stored:
        """Ask state tensors; before itself where all is as it was."""
        dtypes = [x.dtype for x in states] if pooled else []
        now = objects(states), list(map(Tensor.data_ptr, states)), dtypes
        return before if before is not None and now == before else cls(*now)


class Look(NamedTuple):
    """What a plan depends on; while looks are equal it holds. Keeps no tensor alive.

    In parts of IN_CACHE params; one that is as it was in the last look is the last look's own.
    A state is taken by object and address: enough beside `Plan.gone`. The same object at the same
    address of a storage that lives is what it was, unless the user has made it, by `.data`, another
    view of that very storage; the kernel goes on as before then. Where a storage holds more than
    one state, that would be over others' elements: there the dtype is asked for, too.
    """

    groups: tuple[list[int], list[tuple[Any, ...]]]  # counts and options of the members
    objects: bytes  # which params
    params: list[Described]
    states: list[Stored]
    present: list[list[bool]]  # whether each param has a gradient; an empty part: all have
    grads: list[Described]  # of those present

    def same_tensors(self, other: Look) -> bool:
        """Whether groups, params and states are the same; gradients may have moved."""
        return self[:4] == other[:4]

    def same_kinds_of_grads(self, other: Look) -> bool:
        """Whether the same params have gradients, which are the same but for their addresses."""
        return self.present == other.present and all(
            map(Described.same_kinds, self.grads, other.grads)
        )


_NOTHING = Look(([], []), b"", [], [], [], [])


class Seen(NamedTuple):
    """The tensors of one step, for as long as it takes; gradients and states as on this rank."""

    params: list[Tensor]
    grads: list[Tensor | None]
    states: list[Tensor]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Entries by device; a device that a kernel updates has a table, the others the reference."""

    look: Look
    params: list[Tensor]
    states: list[weakref.ref[Any]]  # the objects, and what they had their memory in
    gone: list[weakref.ref[Any]]  # those that died: others may have got their id, their address
    pooled: bool  # whether some states are parts of larger storages, counts of steps apart
    versioned: list[bool]  # of the states; False: an earlier one's counter is its own, too
    entries: Entries
    copied: tuple[Entry, ...]  # those with a stand-in for param or gradient
    by_device: dict[torch.device, tuple[Entry, ...]]
    tables: dict[torch.device, t.Table]
    meshes: Mapping[Ranks, int]  # numbers of the sets of ranks that hold parts of gradients
    norm_over: tuple[bool, Any]  # for which they were made: with a norm or not, its group
    backend: str  # for which the tables were made


def flat(groups: Groups) -> list[Tensor]:
    """All params, one group after the other."""
    if len(groups) == 1:
        return list(groups[0]["params"])
    return [p for group in groups for p in group["params"]]


def objects(xs: Collection[Tensor]) -> bytes:
    """Which objects these are, in which order: the `id` of each. It says so while all are alive."""
    # the memory of an array of objects is their ids: a third of the time that map(id, xs) takes
    return np.fromiter(xs, dtype=np.dtype(object), count=len(xs)).tobytes()


def look(
    members: Members,
    entries: Entries,
    state: State,
    grads_here: Grads | None = None,
    pooled: bool = False,
    before: Look | None = None,
) -> tuple[Look, Seen]:
    """Look at all tensors of a step: most of what it costs on the host (bench/host.py).

    grads_here: the gradients as they lie on this rank; None where no param is a DTensor.
    pooled: whether to ask for the states' dtypes.
    before: the last look. What is equal is taken from there, and the answers are dropped at once.

    Raises KeyError where a state is missing, and what torch raises for a tensor without an address
    or strides, a sparse one say.
    """
    seen = Seen(members.params, [], [])
    new = Look((members.counts, members.stored), objects(seen.params), [], [], [], [])
    was = _NOTHING if before is None else before
    last_params, last_grads, last_states = iter(was.params), iter(was.grads), iter(was.states)
    last_present = iter(was.present)
    for i in range(0, len(seen.params), IN_CACHE):
        part = seen.params[i : i + IN_CACHE]
        if grads_here is None:
            own = [p.grad for p in part]
        else:
            own, part = list(grads_here[i : i + IN_CACHE]), list(map(local, part))
        seen.grads.extend(own)
        new.params.append(Described.of(part, next(last_params, None)))
        grads, present = _described(own, next(last_grads, None), not next(last_present, []))
        new.grads.append(grads)
        new.present.append(present)
    for states in states_in_parts(entries, state):
        seen.states.extend(states)
        new.states.append(Stored.of(states, pooled, next(last_states, None)))
    return new, seen


def _described(
    grads: Grads, before: Described | None, all_there: bool
) -> tuple[Described, list[bool]]:
    """Those that are there, and which are; an empty list: all. all_there: as is likely."""
    if all_there:
        try:
            return Described.of(grads, before), []  # type: ignore[arg-type]
        except TypeError:  # what None answers
            pass
    present = [g is not None for g in grads]
    here = [g for g in grads if g is not None]
    return Described.of(here, before), [] if len(here) == len(grads) else present


def states_in_parts(entries: Entries, state: State) -> Iterator[list[Tensor]]:
    """All state tensors, of IN_CACHE entries at a time; KeyError where one is missing."""
    in_order = len(state) == len(entries.params) and objects(state) == entries.objects
    dicts = list(state.values() if in_order else map(state.__getitem__, entries.params))
    for i in range(0, len(dicts), IN_CACHE):
        part, states = dicts[i : i + IN_CACHE], list[Tensor]()
        for key, has in entries.keys.items():
            states += map(itemgetter(key), compress(part, has[i:]) if has else part)
        yield list(map(local, states)) if entries.sharded else states


def states_of(entries: Entries, state: State) -> list[Tensor]:
    """All state tensors of the entries; KeyError where one is missing."""
    return list(chain.from_iterable(states_in_parts(entries, state)))


def follow(
    plan: Plan, members: Members, state: State, grads_here: Grads | None = None
) -> tuple[Plan, Seen] | None:
    """The plan as it is, or with gradients elsewhere; None where it is stale."""
    try:
        new, seen = look(members, plan.entries, state, grads_here, plan.pooled, plan.look)
    except (KeyError, TypeError, RuntimeError, NotImplementedError):
        return None  # something is missing or has no address: the checks find the words for it
    if plan.gone or not new.same_tensors(plan.look):
        return None
    if new != plan.look:
        moved = move_grads(plan, new, seen.grads)
        return None if moved is None else (moved, seen)
    return plan, seen


def written_by(plan: Plan, seen: Seen) -> list[Tensor]:
    """Params and states that a step of the plan writes: those with a gradient."""
    entries = plan.entries
    if len(entries.all) == len(seen.params) and not any(plan.look.present):
        shards = list(map(local, seen.params)) if entries.sharded else []
        return seen.params + shards + list(compress(seen.states, plan.versioned))
    busy = [seen.grads[place] is not None for place in entries.places]
    params = list(compress(entries.params, busy))
    shards = list(map(local, params)) if entries.sharded else []
    return params + shards + list(compress(seen.states, _for_each_state(entries, busy)))


def _for_each_state(entries: Entries, flags: Sequence[bool]) -> Iterator[bool]:
    """The flags of entries for their states, in the order of `states_in_parts`."""
    for i in range(0, len(flags), IN_CACHE):
        part = flags[i : i + IN_CACHE]
        for has in entries.keys.values():
            yield from compress(part, has[i:]) if has else part


def make_entries(
    groups: Groups,
    grads: Sequence[Tensor | None],
    state: State,
    before: Plan | None,
    meshes: Sequence[int] = (),
) -> Entries:
    """Check all tensors of the step, then list those to update. Changes nothing.

    `meshes`: a number for each param, 0 where there are none.
    `before`: the last plan, which knows the layout of gradients that are away in this step.
    """
    known = {} if before is None else {e.place: (e.param, e.grad) for e in before.entries.all}
    entries, place = [], -1
    for number, group in enumerate(groups):
        for position, p in enumerate(group["params"]):
            place += 1
            grad, kept = grads[place], state.get(p, {})
            if group["differentiable"] or (grad is None and not is_started(kept)):
                continue
            name = param_name(group, number, position)
            at = group["positions"][position] if "positions" in group else place
            here = local(p)
            check_tensors(name, here, grad, local_state(kept))
            storing.check_storage(name, here, group)
            storage = storing.storage_of(group, p)
            if grad is not None:
                layout = grad_layout(grad)
            else:
                layout = grad_layout(here)._replace(dtype=p.dtype, lazy=False)
                if place in known and known[place][0] is p and known[place][1].shape == here.shape:
                    layout = known[place][1]
            part = place_of(name, p) if storage.random or storage.quantised else Place()
            mesh = meshes[place] if meshes else 0
            entries.append(
                Entry(place, at, number, name, p, here, storage, part, layout, None, None, mesh)
            )
    return Entries.of([_with_copies(e) for e in entries])


def _with_copies(e: Entry) -> Entry:
    # with its values: a master may be made of them
    dense = None if is_dense(e.local) else dense_copy(e.local)
    like = e.local if dense is None else dense
    if e.grad.lazy or not same_strides(like.shape, e.grad.stride, like.stride()):
        copy = torch.empty_like(like, dtype=e.grad.dtype, memory_format=torch.preserve_format)
        return e._replace(dense=dense, grad_copy=copy)
    return e._replace(dense=dense)


def refuse_shared_memory(
    entries: Iterable[Entry], devices: Collection[torch.device], state: State
) -> None:
    """Raise ValueError where tensors of one table overlap."""
    refuse_overlaps(
        (x.data_ptr(), x.data_ptr() + x.numel() * x.itemsize, f"{what} of {e.name}")
        for e in entries
        if e.local.device in devices
        for what, x in (
            ("memory", e.local if e.dense is None else e.dense),
            *local_state(state.get(e.param, {})).items(),
        )
        if what in ("memory", *e.storage.keys) and x.numel()
    )


def make_plan(
    members: Members,
    entries: Entries,
    state: State,
    on_kernel: Collection[torch.device],
    grads_here: Grads | None,
    meshes: Mapping[Ranks, int],
    norm_over: tuple[bool, Any],
    backend: str,
) -> tuple[Plan, Seen]:
    """The plan for checked entries whose state is there."""
    by_device: dict[torch.device, list[Entry]] = {}
    for e in entries.all:
        by_device.setdefault(e.local.device, []).append(e)
    no_groups = t.frozen(np.zeros(0, dtype=np.int64))  # each launch puts its own in
    states = states_of(entries, state)
    storages = list(map(Tensor.untyped_storage, states))
    pooled = any(
        x.dim() and x.nbytes != storage.nbytes()
        for x, storage in zip(states, storages, strict=True)
    )
    new, seen = look(members, entries, state, grads_here, pooled)
    addresses = _addresses_by_place(new)
    copied = tuple(e for e in entries.all if e.dense is not None or e.grad_copy is not None)
    gone: list[weakref.ref[Any]] = []
    plan = Plan(
        look=new,
        params=seen.params,
        states=[weakref.ref(x, gone.append) for x in (*states, *storages)],
        gone=gone,
        pooled=pooled,
        versioned=list(_first_of_their_base(states)),
        entries=entries,
        copied=copied,
        by_device={device: tuple(own) for device, own in by_device.items()},
        tables={
            device: t.build(
                [_row(e, local_state(state[e.param])) for e in by_device[device]],
                _grad_column(by_device[device], addresses, bool(copied)),
                no_groups,
                len(members.counts),
                launch_parameters(architecture(device)),
            )
            for device in on_kernel
        },
        meshes=meshes,
        norm_over=norm_over,
        backend=backend,
    )
    return plan, seen


def _first_of_their_base(states: Iterable[Tensor]) -> Iterator[bool]:
    bases: dict[int, Tensor] = {}  # views of one tensor count their versions together
    for x in states:
        base = x if x._base is None else x._base
        yield id(base) not in bases
        bases[id(base)] = base  # alive, so that nobody else gets its id


def move_grads(plan: Plan, new: Look, grads: Sequence[Tensor | None]) -> Plan | None:
    """The plan with gradients elsewhere, or None where more than their addresses has changed."""
    if new.present != plan.look.present:
        # experts idle in some steps: what comes back must be as it was
        if not _are_as_known(plan.entries, grads, new):
            return None
    elif not new.same_kinds_of_grads(plan.look):
        return None
    addresses = _addresses_by_place(new)
    tables = {
        device: dataclasses.replace(
            table, grads=_grad_column(plan.by_device[device], addresses, bool(plan.copied))
        )
        for device, table in plan.tables.items()
    }
    return dataclasses.replace(plan, look=new, tables=tables)


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
    payloads = {name: storing.keys_of(name, d)[0] for name, d in storage.moments.items()}
    first, second = payloads["exp_avg"], payloads["exp_avg_sq"]
    signature = t.Signature(
        param=REALS.get(param.dtype, param.dtype),
        grad=REALS.get(e.grad.dtype, e.grad.dtype),
        exp_avg=REALS.get(state[first].dtype, state[first].dtype),
        exp_avg_sq=REALS.get(state[second].dtype, state[second].dtype),
        amsgrad=storage.amsgrad,
        master=storage.master,
        stochastic=storage.stochastic,
    )
    return t.Row(
        param=param.data_ptr(),
        exp_avg=at[first],
        exp_avg_sq=at[second],
        max_exp_avg_sq=at[payloads["max_exp_avg_sq"]] if storage.amsgrad else 0,
        step=state["step"].data_ptr(),
        numel=param.numel() * (2 if param.is_complex() else 1),
        group=e.group,
        signature=signature._replace(columns=storage.random and e.part.inner != 0),
        step_is_double=state["step"].dtype == torch.float64,
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
