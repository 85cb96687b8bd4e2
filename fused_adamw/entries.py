"""Which parameters a step updates, and how: checked once, and kept while nothing has changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import storage as storing
from .checks import STORED, check_tensors, is_freed, is_started, param_name, refuse_overlaps
from .layouts import GradLayout, dense_copy, grad_layout, is_dense, same_strides
from .shards import Place, check_state_lies_as, local, local_state, place_of
from .storage import Storage

Groups = Sequence[Mapping[str, Any]]
Grads = Sequence[Tensor | None]
State = MutableMapping[Tensor, dict[str, Any]]


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


def flat(groups: Groups) -> list[Tensor]:
    """All params, one group after the other."""
    if len(groups) == 1:
        return list(groups[0]["params"])
    return [p for group in groups for p in group["params"]]


def objects(xs: Collection[Tensor]) -> bytes:
    """Which objects these are, in which order: the `id` of each. It says so while all are alive."""
    # the memory of an array of objects is their ids: a third of the time that map(id, xs) takes
    return np.fromiter(xs, dtype=np.dtype(object), count=len(xs)).tobytes()


def make_entries(
    groups: Groups,
    grads: Sequence[Tensor | None],
    state: State,
    before: Entries | None,
    held: Mapping[int, Entry],
    meshes: Sequence[int] = (),
) -> Entries:
    """Check the tensors of the step that are not held, then list all to update. Changes nothing.

    `before`: the last entries, which know the layout of gradients that are away in this step.
    `held`: those of them, by place, that are what they were.
    `meshes`: a number for each param, 0 where there are none.
    """
    known = {} if before is None else {e.place: (e.param, e.grad) for e in before.all}
    entries, place = [], -1
    for number, group in enumerate(groups):
        for position, p in enumerate(group["params"]):
            place += 1
            if place in held:
                entries.append(held[place])
                continue
            grad, kept = grads[place], state.get(p, {})
            if group["differentiable"] or (grad is None and not is_started(kept)):
                continue
            name = param_name(group, number, position)
            at = group["positions"][position] if "positions" in group else place
            here = local(p)
            check_state_lies_as(name, p, kept, STORED)
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
            new = Entry(place, at, number, name, p, here, storage, part, layout, None, None, mesh)
            entries.append(_with_copies(new))
    return Entries.of(entries)


def _with_copies(e: Entry) -> Entry:
    if is_dense(e.local):
        dense = None
    elif is_freed(e.local):  # of an idle param
        dense = torch.empty_like(e.local, memory_format=torch.preserve_format)
    else:
        dense = dense_copy(e.local)  # with its values: a master may be made of them
    like = e.local if dense is None else dense
    if e.grad.lazy or not same_strides(like.shape, e.grad.stride, like.stride()):
        copy = torch.empty_like(like, dtype=e.grad.dtype, memory_format=torch.preserve_format)
        return e._replace(dense=dense, grad_copy=copy)
    return e._replace(dense=dense)


def refuse_shared_memory(
    entries: Iterable[Entry], devices: Collection[torch.device], state: State
) -> None:
    """Raise ValueError where tensors of one table overlap."""
    starts: list[int] = []
    sizes: list[int] = []
    what: list[str] = []
    whose: list[str] = []
    for e in entries:
        if e.local.device not in devices:
            continue
        own = local_state(state.get(e.param, {}))
        keys = [key for key in e.storage.keys if key in own]
        what += "memory", *keys
        whose += [e.name] * (1 + len(keys))
        for x in (e.local if e.dense is None else e.dense, *map(own.__getitem__, keys)):
            starts.append(x.data_ptr())
            sizes.append(0 if is_freed(x) else x.nbytes)  # it may be while its param is idle
    refuse_overlaps(starts, sizes, lambda i: f"{what[i]} of {whose[i]}")
