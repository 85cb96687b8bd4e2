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

if TYPE_CHECKING:
    from .plan import Entry, Groups, State


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
            check_state(name, p, state[p])
            like = p if is_dense(p) else torch.empty_like(p, memory_format=torch.preserve_format)
            own[p] = {
                key: torch.empty_like(like, dtype=x.dtype, requires_grad=False).copy_(x)
                if key in MOMENTS
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
