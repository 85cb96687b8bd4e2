"""What a step depends on: asked of all its tensors, and compared with what the last step found.

Tensors are compared by what they *are*, never by the identity of objects alone: `zero_grad()` makes
new gradients in every step, and `p.data = x` keeps the object while everything else changes. Params
and gradients are told apart by address, dtype and layout; states by object and address, while both
the object and its storage live (plan.py knows).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, compress
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .entries import Entries, Grads, State, objects
from .layouts import Described
from .shards import local

# Params asked in one go: their objects stay in the cache from one question to the next, and answers
# equal to the last look's are dropped before they leave it.
IN_CACHE = 1024


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


def for_each_state(entries: Entries, flags: Sequence[bool]) -> Iterator[bool]:
    """The flags of entries for each of their states, in the order of `states_in_parts`."""
    for i in range(0, len(flags), IN_CACHE):
        part = flags[i : i + IN_CACHE]
        for has in entries.keys.values():
            yield from compress(part, has[i:]) if has else part
