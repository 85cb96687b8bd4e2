"""The plan of a step: which tensors it updates, checked once and kept while nothing has moved.

A plan is found stale by comparing what tensors *are* (address, dtype, layout) with what it was
made from, never by the identity of objects: `zero_grad()` makes new gradients in every step, and
`p.data = x` keeps the object while everything else changes. It keeps no gradient and no state
alive, so that a trainer can move states to the CPU and get their memory back.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from copy import deepcopy
from itertools import compress, pairwise
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kernels import table as t

Groups = Sequence[Mapping[str, Any]]
State = MutableMapping[Tensor, dict[str, Any]]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_REALS = {torch.complex128: torch.float64, torch.complex64: torch.float32}


class Layouts(NamedTuple):
    """Dtypes and layouts of many tensors, in lists that are quick to make and to compare.

    Shape and strides are listed where they matter: contiguous tensors are told apart by numel.
    """

    dtypes: list[torch.dtype]
    numels: list[int]
    contiguous: list[bool]
    others: list[tuple[torch.Size, tuple[int, ...]]]
    conjugated: list[bool]  # empty where nothing is complex


class GradLayout(NamedTuple):
    """What a gradient is besides its address."""

    dtype: torch.dtype
    stride: tuple[int, ...]
    numel: int
    lazy: bool  # conjugated or negated only when read


class Entry(NamedTuple):
    """A parameter that has a gradient, or had one in an earlier step."""

    place: int  # in the list of all params, one group after the other
    group: int
    name: str  # for messages
    param: Tensor
    moments: tuple[str, ...]  # keys of its state besides "step"
    grad: GradLayout  # where it has none in this step: as it was, or as it will most likely be
    dense: Tensor | None  # stand-in for a param with gaps in its memory, copied there and back
    grad_copy: Tensor | None  # the gradient in the param's layout, where its own is another


class Entries(NamedTuple):
    """The entries of a step, and what a look at their state wants ready-made."""

    all: tuple[Entry, ...]
    params: list[Tensor]
    amsgrad: list[bool]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Entries:
        """From the entries alone."""
        amsgrad = [len(e.moments) > 2 for e in entries]
        return cls(tuple(entries), [e.param for e in entries], amsgrad)


class Look(NamedTuple):
    """What a plan was made from; while looks are equal the plan holds."""

    groups: list[tuple[int, bool, bool]]  # number of params, amsgrad, differentiable
    params: list[int]  # addresses
    param_layouts: Layouts
    states: list[int]  # addresses
    present: list[bool]  # whether the param has a gradient
    grads: list[int]  # addresses of those present
    grad_layouts: Layouts


@dataclasses.dataclass(frozen=True)
class Plan:
    """Entries by device; a device that a kernel updates has a table, the others the reference."""

    look: Look
    entries: Entries
    copied: tuple[Entry, ...]  # those with a stand-in for param or gradient
    by_device: dict[torch.device, tuple[Entry, ...]]
    tables: dict[torch.device, t.Table]


def flat(groups: Groups) -> list[Tensor]:
    """All params, one group after the other."""
    if len(groups) == 1:
        return list(groups[0]["params"])
    return [p for group in groups for p in group["params"]]


def look(
    groups: Groups, grads: Sequence[Tensor | None], entries: Entries, state: State
) -> tuple[Look, list[Tensor]]:
    """What a plan depends on, and which params and moments a step of it writes.

    0.8 us a tensor, most of what a step costs on the host (bench/host.py). A tensor without an
    address or strides (sparse, wrapped) raises its own error here.
    """
    params = flat(groups)
    here = [g for g in grads if g is not None]
    in_order = len(state) == len(entries.params) and all(map(is_, state, entries.params))
    states = list(state.values() if in_order else map(state.__getitem__, entries.params))
    steps = [s["step"] for s in states]
    moments = [s["exp_avg"] for s in states]
    moments += [s["exp_avg_sq"] for s in states]
    moments += [s["max_exp_avg_sq"] for s in compress(states, entries.amsgrad)]
    new = Look(
        groups=[(len(g["params"]), g["amsgrad"], g["differentiable"]) for g in groups],
        params=list(map(Tensor.data_ptr, params)),
        param_layouts=_layouts(params),
        states=[*map(Tensor.data_ptr, steps), *map(Tensor.data_ptr, moments)],
        present=[g is not None for g in grads],
        grads=list(map(Tensor.data_ptr, here)),
        grad_layouts=_layouts(here),
    )
    if len(here) == len(entries.params) == len(params):
        return new, params + moments
    busy = [(e, s) for e, s in zip(entries.all, states, strict=True) if grads[e.place] is not None]
    return new, [x for e, s in busy for x in (e.param, *(s[key] for key in e.moments))]


def _layouts(tensors: list[Tensor]) -> Layouts:
    dtypes = [x.dtype for x in tensors]
    contiguous = list(map(Tensor.is_contiguous, tensors))
    others = []
    if not all(contiguous):
        others = [(x.shape, x.stride()) for x in tensors if not x.is_contiguous()]
    conjugated = []
    if any(dtype.is_complex for dtype in set(dtypes)):
        conjugated = [x.is_conj() for x in tensors]
    return Layouts(dtypes, list(map(Tensor.numel, tensors)), contiguous, others, conjugated)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_strides(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether equal indices lie at equal offsets; strides of size-1 dimensions say nothing."""
    return (
        a == b or all(n == 1 or x == y for n, x, y in zip(shape, a, b, strict=True)) or 0 in shape
    )


def overlaps_itself(x: Tensor) -> bool:
    """Whether several indices share an element, as in an expanded tensor."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return x.numel() > 0
            reach += (size - 1) * stride
    return False


def check_entry(name: str, param: Tensor, grad: Tensor | None, state: Mapping[str, Any]) -> None:
    """Raise on what a step cannot update, before it has changed anything."""
    if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} is a {type(param).__name__}, a tensor subclass whose memory FusedAdamW does "
            "not know how to find. Pass plain tensors, or optimize it with torch.optim.AdamW."
        )
    if param.layout != torch.strided or _REALS.get(param.dtype, param.dtype) not in FLOATS:
        raise TypeError(
            f"{name} is a {param.layout} tensor of {param.dtype}; FusedAdamW updates strided "
            f"tensors of {', '.join(map(str, (*FLOATS, *_REALS)))}."
        )
    if overlaps_itself(param):
        raise RuntimeError(
            f"{name} has overlapping elements (shape {tuple(param.shape)}, strides "
            f"{param.stride()}), so that one update would be written over another. Expanded "
            "tensors cannot be optimized: use .clone() to give each element memory of its own."
        )
    if grad is not None:
        _check_grad(name, param, grad)
    if state:
        _check_state(name, param, state)


def _check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(
            "FusedAdamW does not support sparse gradients, please consider SparseAdam instead "
            f"({name}.grad is {grad.layout})"
        )
    if type(grad).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name}.grad is a {type(grad).__name__} while the param is a plain tensor; assign a "
            "plain tensor."
        )
    if grad.device != param.device or grad.shape != param.shape:
        raise RuntimeError(
            f"{name} is on {param.device} with shape {tuple(param.shape)} but its gradient is on "
            f"{grad.device} with shape {tuple(grad.shape)}. Move or recompute the gradient: run "
            "zero_grad() and backward() after the parameter has changed."
        )
    real = _REALS.get(grad.dtype, grad.dtype)
    if grad.is_complex() != param.is_complex() or real not in FLOATS:
        raise TypeError(f"{name} is {param.dtype} but its gradient is {grad.dtype}.")


def _check_state(name: str, param: Tensor, state: Mapping[str, Any]) -> None:
    missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in state]
    if missing:
        raise RuntimeError(
            f"The state of {name} has {sorted(state)} but not {missing}. Load a whole checkpoint "
            "of an AdamW optimizer, or delete optimizer.state[param] to start it anew."
        )
    for key in _MOMENTS:
        x = state.get(key)
        if x is None:
            continue
        if x.device != param.device or x.shape != param.shape:
            raise RuntimeError(
                f"{key} of {name} is on {x.device} with shape {tuple(x.shape)} but the param is on "
                f"{param.device} with shape {tuple(param.shape)}. Bring the state back to the "
                "param's device before the step, or call load_state_dict, which does so."
            )
        if x.is_complex() != param.is_complex() or _REALS.get(x.dtype, x.dtype) not in FLOATS:
            raise TypeError(f"{key} of {name} is {x.dtype} while the param is {param.dtype}.")
    maximum = state.get("max_exp_avg_sq")
    if maximum is not None and maximum.dtype != state["exp_avg_sq"].dtype:
        raise TypeError(
            f"max_exp_avg_sq of {name} is {maximum.dtype} but exp_avg_sq is "
            f"{state['exp_avg_sq'].dtype}; they are kept in one dtype."
        )


def refuse_shared_memory(
    entries: Iterable[Entry], devices: Collection[torch.device], state: State
) -> None:
    """Raise ValueError where one launch would update the same elements twice at once."""
    spans = sorted(
        (x.data_ptr(), x.data_ptr() + x.numel() * x.itemsize, f"{what} of {e.name}")
        for e in entries
        if e.param.device in devices
        for what, x in (
            ("memory", e.param if e.dense is None else e.dense),
            *state.get(e.param, {}).items(),
        )
        if what in ("memory", *e.moments) and x.numel()
    )
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            raise ValueError(
                f"{one} and {other} overlap: one launch would update the same elements twice at "
                "once. Give each its own memory (.clone()), or share a weight by registering one "
                "Parameter object in both modules."
            )


def param_name(group: Mapping[str, Any], number: int, position: int) -> str:
    """How messages call a param: its name if groups were made from named_parameters()."""
    if "param_names" in group:
        return str(group["param_names"][position])
    return f"param_groups[{number}]['params'][{position}]"


def make_entries(
    groups: Groups, grads: Sequence[Tensor | None], state: State, before: Plan | None
) -> Entries:
    """Check all tensors of the step, then list those to update. Changes nothing.

    `before`: the last plan, which knows the layout of gradients that are away in this step.
    """
    known = {} if before is None else {e.place: (e.param, e.grad) for e in before.entries.all}
    entries, place = [], -1
    for number, group in enumerate(groups):
        moments = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        for position, p in enumerate(group["params"]):
            place += 1
            grad, kept = grads[place], state.get(p, {})
            if group["differentiable"] or (grad is None and not kept):
                continue
            name = param_name(group, number, position)
            check_entry(name, p, grad, kept)
            if grad is not None:
                layout = grad_layout(grad)
            else:
                layout = GradLayout(p.dtype, p.stride(), p.numel(), False)
                if place in known and known[place][0] is p and known[place][1].numel == p.numel():
                    layout = known[place][1]
            entries.append(Entry(place, number, name, p, moments, layout, None, None))
    return Entries.of([_with_copies(e) for e in entries])


def grad_layout(grad: Tensor) -> GradLayout:
    """The layout of a strided gradient."""
    lazy = grad.is_conj() or grad.is_neg()
    return GradLayout(grad.dtype, grad.stride(), grad.numel(), lazy)


def _with_copies(e: Entry) -> Entry:
    dense = None
    if not is_dense(e.param):
        dense = torch.empty_like(e.param, memory_format=torch.preserve_format)
    like = e.param if dense is None else dense
    if e.grad.lazy or not same_strides(like.shape, e.grad.stride, like.stride()):
        copy = torch.empty_like(like, dtype=e.grad.dtype, memory_format=torch.preserve_format)
        return e._replace(dense=dense, grad_copy=copy)
    return e._replace(dense=dense)


def lacks_state(entries: Iterable[Entry], state: State) -> bool:
    """Whether `init_state` has anything to allocate."""
    return any(key not in state.get(e.param, ()) for e in entries for key in (*e.moments, "step"))


def init_state(entries: Sequence[Entry], state: State, step_dtype: torch.dtype) -> None:
    """Give each entry what is missing of its state, in the param's layout.

    Steps are packed by device. Nothing here waits for a device.
    """
    unpacked: dict[torch.device, list[dict[str, Any]]] = {}
    for e in entries:
        s, like = state[e.param], e.param if e.dense is None else e.dense
        for key in e.moments:
            if key not in s:
                s[key] = torch.zeros_like(like, memory_format=torch.preserve_format)
            elif not same_strides(like.shape, s[key].stride(), like.stride()):
                s[key] = torch.empty_like(like, dtype=s[key].dtype).copy_(s[key])
        step = s.get("step")
        if (
            not isinstance(step, Tensor)
            or step.device != like.device
            or step.dtype not in FLOATS[:2]
            or step.dim()
        ):
            unpacked.setdefault(like.device, []).append(s)
    for device, states in unpacked.items():
        values = [float(s.get("step", 0)) for s in states]
        for s, step in zip(states, pack_steps(values, step_dtype, device), strict=True):
            s["step"] = step


def pack_steps(
    values: Sequence[float], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Step counters, 0-dim, as views of one tensor on the device."""
    host = torch.tensor(values, dtype=dtype, device="cpu")
    if device.type != "cpu":
        host = host.pin_memory().to(device, non_blocking=True)
    return host.unbind()


def own_state(
    state: Mapping[Any, Any], groups: Groups, step_dtype: torch.dtype
) -> defaultdict[Any, dict[str, Any]]:
    """A copy of loaded state that shares no memory with it, in the params' dtype and layout.

    Steps are packed by device; old checkpoints keep them as Python numbers.

    Raises:
        RuntimeError, TypeError: a state that does not fit its param.
    """
    own: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    own.update({key: value for key, value in state.items() if not isinstance(key, Tensor)})
    steps: dict[torch.device, list[tuple[dict[str, Any], Any]]] = {}
    for number, group in enumerate(groups):
        for position, p in enumerate(group["params"]):
            if not state.get(p):
                continue
            name = param_name(group, number, position)
            _check_state(name, p, state[p])
            like = p if is_dense(p) else torch.empty_like(p, memory_format=torch.preserve_format)
            own[p] = {
                key: torch.empty_like(like, dtype=x.dtype, requires_grad=False).copy_(x)
                if key in _MOMENTS
                else deepcopy(x)
                for key, x in state[p].items()
                if key != "step"
            }
            steps.setdefault(p.device, []).append((own[p], state[p]["step"]))
    for device, loaded in steps.items():
        values = [float(x) for _, x in loaded]
        for (s, _), step in zip(loaded, pack_steps(values, step_dtype, device), strict=True):
            s["step"] = step
    return own


def make_plan(
    groups: Groups,
    grads: Sequence[Tensor | None],
    entries: Entries,
    state: State,
    on_kernel: Collection[torch.device],
) -> Plan:
    """The plan for checked entries whose state is there."""
    by_device: dict[torch.device, list[Entry]] = {}
    for e in entries.all:
        by_device.setdefault(e.param.device, []).append(e)
    no_groups = t.frozen(np.zeros(0, dtype=np.int64))  # each launch puts its own in
    return Plan(
        look=look(groups, grads, entries, state)[0],
        entries=entries,
        copied=tuple(e for e in entries.all if e.dense is not None or e.grad_copy is not None),
        by_device={device: tuple(own) for device, own in by_device.items()},
        tables={
            device: t.build(
                [_row(e, state[e.param]) for e in by_device[device]],
                grad_column(by_device[device], grads),
                no_groups,
                len(groups),
            )
            for device in on_kernel
        },
    )


def move_grads(plan: Plan, new: Look, grads: Sequence[Tensor | None]) -> Plan | None:
    """The plan with other gradient addresses, or None where more than addresses has changed."""
    old = plan.look
    if new[:4] != old[:4]:  # groups, params and states
        return None
    if new.present != old.present:  # experts idle in some steps: what comes back must be as it was
        known = {e.place: e.grad for e in plan.entries.all}
        for place, grad in enumerate(grads):
            if grad is not None and known.get(place) != grad_layout(grad):
                return None
    elif new.grad_layouts != old.grad_layouts:
        return None
    tables = {
        device: dataclasses.replace(table, grads=grad_column(plan.by_device[device], grads))
        for device, table in plan.tables.items()
    }
    return dataclasses.replace(plan, look=new, tables=tables)


def grad_column(entries: Sequence[Entry], grads: Sequence[Tensor | None]) -> t.Words:
    """Addresses that the kernel reads gradients from, 0 where there is none in this step."""
    column = np.zeros(len(entries), dtype=np.int64)
    for i, e in enumerate(entries):
        grad = grads[e.place]
        if grad is not None:
            column[i] = (grad if e.grad_copy is None else e.grad_copy).data_ptr() or t.EMPTY_GRAD
    return t.frozen(column)


def _row(e: Entry, state: Mapping[str, Any]) -> t.Row:
    param = e.param if e.dense is None else e.dense
    moments = [state[key] for key in e.moments]
    dtypes = [_REALS.get(d, d) for d in (param.dtype, e.grad.dtype, *(m.dtype for m in moments))]
    at = [m.data_ptr() for m in moments]
    return t.Row(
        param=param.data_ptr(),
        exp_avg=at[0],
        exp_avg_sq=at[1],
        max_exp_avg_sq=at[2] if len(at) > 2 else 0,
        step=state["step"].data_ptr(),
        numel=param.numel() * (2 if param.is_complex() else 1),
        group=e.group,
        signature=t.Signature(dtypes[0], dtypes[1], dtypes[2], dtypes[3], len(at) > 2),
        step_is_double=state["step"].dtype == torch.float64,
    )
