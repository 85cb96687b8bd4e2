"""Optimizer state: made at a parameter's first gradient, or copied from a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import MOMENTS, check_state, param_name
from .layouts import FLOATS, is_dense, same_strides
from .shards import as_param, local, local_of_loaded, local_state

if TYPE_CHECKING:
    from .plan import Entry, Groups, State


def lacks_state(entries: Iterable[Entry], state: State) -> bool:
    """Whether `init_state` has anything to do."""
    return any(_lacking(e, local_state(state.get(e.param, {}))) for e in entries)


def _lacking(e: Entry, s: Mapping[str, Any]) -> list[str]:
    """Keys of the state that are missing, or not as the update wants them."""
    like, step = e.local if e.dense is None else e.dense, s.get("step")
    keys = [
        key
        for key in e.moments
        if key not in s or not same_strides(like.shape, s[key].stride(), like.stride())
    ]
    packed = isinstance(step, Tensor) and step.dim() == 0 and step.device == like.device
    if not packed or step.dtype not in FLOATS[:2]:  # type: ignore[union-attr]  # a tensor if packed
        keys.append("step")
    return keys


def init_state(entries: Iterable[Entry], state: State, step_dtype: torch.dtype) -> None:
    """Give each entry what is missing of its state, in the param's layout.

    Steps are packed by device. Waits for a device only where a step of the user's own lies there in
    another form than ours. All is allocated before any state is changed, so that running out of
    memory leaves them as they were.
    """
    made: list[tuple[Tensor, dict[str, Tensor]]] = []
    unpacked: dict[torch.device, list[tuple[dict[str, Tensor], Any]]] = {}
    for e in entries:
        s = local_state(state.get(e.param, {}))
        like = e.local if e.dense is None else e.dense
        new: dict[str, Tensor] = {}
        for key in _lacking(e, s):
            if key == "step":
                unpacked.setdefault(like.device, []).append((new, s.get("step", 0)))
            elif key in s:
                new[key] = torch.empty_like(like, dtype=s[key].dtype).copy_(s[key])
            else:
                kept = s.get("exp_avg_sq") if key == "max_exp_avg_sq" else None
                dtype = like.dtype if kept is None else kept.dtype  # of one signature
                new[key] = torch.zeros_like(like, dtype=dtype)
        made.append((e.param, new))
    for device, waiting in unpacked.items():
        steps = pack_steps([step for _, step in waiting], step_dtype, device)
        for (new, _), step in zip(waiting, steps, strict=True):
            new["step"] = step
    for param, new in made:
        if new:
            moments = {key: as_param(new[key], param) for key in MOMENTS if key in new}
            state[param].update({k: new[k] for k in ("step",) if k in new} | moments)


def pack_steps(
    values: Sequence[float | Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Step counters, 0-dim, as views of one tensor on the device; values from anywhere."""
    host = torch.tensor(_numbers(values), dtype=dtype, device="cpu")
    if device.type == "cpu":
        return host.unbind()
    pinned = host.pin_memory() if device.type in ("cuda", "xpu") else host
    return pinned.to(device, non_blocking=True).unbind()


def _numbers(values: Sequence[float | Tensor]) -> list[float]:
    """All values as Python numbers: one wait a device, not one a value."""
    numbers = [0.0 if isinstance(x, Tensor) else float(x) for x in values]
    places: dict[torch.device, list[int]] = {}
    for i, x in enumerate(values):
        if isinstance(x, Tensor):
            places.setdefault(x.device, []).append(i)
    for where in places.values():
        tensors = [x for i in where if isinstance(x := values[i], Tensor)]
        stacked = torch.stack([x.detach().reshape(()).to(torch.float64) for x in tensors])
        for i, number in zip(where, stacked.tolist(), strict=True):
            numbers[i] = number
    return numbers


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
            here = local(p)
            loaded = {
                key: local_of_loaded(x, p) if key in MOMENTS else x for key, x in state[p].items()
            }
            check_state(name, here, loaded)
            like = here
            if not is_dense(like):
                like = torch.empty_like(like, memory_format=torch.preserve_format)
            own[p] = {
                key: as_param(_copy(x, like), p) if key in MOMENTS else deepcopy(x)
                for key, x in loaded.items()
                if key != "step"
            }
            steps.setdefault(here.device, []).append((own[p], state[p]["step"]))
    for device, counted in steps.items():
        values = [x for _, x in counted]
        for (s, _), step in zip(counted, pack_steps(values, step_dtype, device), strict=True):
            s["step"] = step
    return own


def _copy(x: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like, dtype=x.dtype, requires_grad=False).copy_(x.detach())
