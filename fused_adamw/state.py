"""Optimizer state: made at a parameter's first gradient, or copied from a checkpoint."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import storage as storing
from .checks import MOMENTS, STORED, check_memory, check_state, param_name
from .layouts import FLOATS, dense_copy, is_dense
from .shards import (
    as_param,
    in_reach,
    is_sharded,
    local,
    local_now,
    local_of_loaded,
    local_state,
    replicated,
    whole_if_elsewhere,
)

if TYPE_CHECKING:
    from .entries import Entry, Groups, State


def lacks_state(entries: Iterable[Entry], state: State) -> bool:
    """Whether `init_state` has anything to do."""
    own = ((e, local_state(state.get(e.param, {}))) for e in entries)
    return any(_lacking(e, s) or storing.unwanted(e.storage, s) for e, s in own)


def _lacking(e: Entry, s: Mapping[str, Any]) -> list[str]:
    """Keys of the state that are missing, or not as the update wants them."""
    like, step = e.local if e.dense is None else e.dense, s.get("step")
    keys = storing.lacking(e.storage, like, s)
    packed = isinstance(step, Tensor) and step.dim() == 0 and step.device == like.device
    if not packed or step.dtype not in FLOATS[:2]:  # type: ignore[union-attr]  # a tensor if packed
        keys.append("step")
    return keys


class _Due(NamedTuple):
    """What an entry's state has, lacks, and is given."""

    entry: Entry
    like: Tensor  # what its tensors are laid out as
    state: Mapping[str, Any]
    lacking: list[str]
    made: dict[str, Tensor]


def init_state(entries: Iterable[Entry], state: State, step_dtype: torch.dtype) -> None:
    """Give each entry what is missing of its state, in the param's layout and its group's formats.

    Steps are packed by device. Waits for a device only where a step of the user's own lies there in
    another form than ours. All is allocated before any state is changed, so that running out of
    memory leaves them as they were.
    """
    due: list[_Due] = []
    for e in entries:
        s = local_state(state.get(e.param, {}))
        lacking = _lacking(e, s)
        if lacking:  # of an idle param, too, where another option of its group wants it
            check_memory(e.name, {"memory": e.local, **s})
        due.append(_Due(e, e.local if e.dense is None else e.dense, s, lacking, {}))
    # One key after the other, as each step asks for them: what is made together lies together in
    # the host's memory, and is found there sooner once the caches hold something else.
    for key in dict.fromkeys(key for one in due for key in one.entry.storage.keys):
        for one in due:
            if key in one.lacking and key not in one.made:
                storing.make(one.entry.storage, one.like, one.state, (key,), one.made)
    uncounted: dict[torch.device, list[_Due]] = {}
    for one in due:
        if "step" in one.lacking:
            uncounted.setdefault(one.like.device, []).append(one)
    for device, waiting in uncounted.items():
        steps = pack_steps([one.state.get("step", 0) for one in waiting], step_dtype, device)
        for one, step in zip(waiting, steps, strict=True):
            one.made["step"] = step
    unwanted = [storing.unwanted(one.entry.storage, one.state) for one in due]
    for one, keys in zip(due, unwanted, strict=True):
        if one.made:
            state[one.entry.param].update(_in_order(one))
        for key in keys:
            del state[one.entry.param][key]


def _in_order(one: _Due) -> dict[str, Tensor]:
    """What was made: the step first, as torch has it, and the rest as the param is sharded."""
    step = {"step": one.made["step"]} if "step" in one.made else {}
    keys = [key for key in one.entry.storage.keys if key in one.made]
    return step | {key: as_param(one.made[key], one.entry.param) for key in keys}


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


class Loaded:
    """A tensor of a checkpoint on its way through torch's `Optimizer.load_state_dict`.

    That would cast all it finds to the param's dtype: codes and float32 moments, too.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def as_loaded(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict whose tensors torch does not see."""
    state = {
        key: {k: Loaded(x) if isinstance(x, Tensor) else x for k, x in s.items()}
        if isinstance(s, Mapping)
        else s
        for key, s in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def own_state(
    state: Mapping[Any, Any], groups: Groups, step_dtype: torch.dtype
) -> defaultdict[Any, dict[str, Any]]:
    """A copy of copied or loaded state that shares no memory with it, in the params' layouts.

    What was loaded becomes what its group wants, by default in the param's dtype, as in torch; a
    copied state stays as it is. Steps are packed by device; old checkpoints keep them as numbers.

    Raises:
        RuntimeError, TypeError: a state that does not fit its param.
    """
    _check_dtensors(state, groups)
    own: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    own.update({key: value for key, value in state.items() if not isinstance(key, Tensor)})
    steps: dict[torch.device, list[tuple[dict[str, Any], Any]]] = {}
    for number, group in enumerate(groups):
        for position, p in enumerate(group["params"]):
            if not state.get(p):
                continue
            name = param_name(group, number, position)
            storing.check_storage(name, local(p), group)
            storage = storing.storage_of(group, p)
            if storing.known("max_exp_avg_sq", state[p]):  # kept though amsgrad may be off now
                storage = storage._replace(amsgrad=True)
            given = _loaded(storage, state[p], p)
            check_state(name, local(p), given)
            check_memory(name, given)
            own[p] = _own(storage, given, p)
            if "step" in given:
                steps.setdefault(local(p).device, []).append((own[p], given["step"]))
    for device, counted in steps.items():
        values = [x for _, x in counted]
        for (s, _), step in zip(counted, pack_steps(values, step_dtype, device), strict=True):
            s["step"] = step
    return own


def _check_dtensors(state: Mapping[Any, Any], groups: Groups) -> None:
    """Raise RuntimeError for a loaded DTensor of another shape than its param, or out of reach.

    As a whole, and all of them before the first is laid out anew: parts may fit on some ranks, and
    others would wait for those that raise.
    """
    for number, group in enumerate(groups):
        for position, p in enumerate(group["params"]):
            for key, x in state.get(p, {}).items():
                if key not in STORED or not isinstance(x, Loaded) or not is_sharded(x.tensor):
                    continue
                what = f"{key} of {param_name(group, number, position)} in the checkpoint"
                if x.tensor.shape != p.shape and not key.endswith("_scale"):
                    raise RuntimeError(
                        f"{what} has shape {tuple(x.tensor.shape)} but the param has "
                        f"{tuple(p.shape)}. Load the checkpoint of this model."
                    )
                if not in_reach(x.tensor, p):
                    raise RuntimeError(
                        f"{what} lies on {x.tensor.device_mesh}, which does not have all ranks "
                        "that load it. Save and load it by torch.distributed.checkpoint, "
                        "or whole (StateDictOptions(full_state_dict=True))."
                    )


def _loaded(storage: storing.Storage, state: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """A copied or loaded state as it lies on this rank; what was loaded in its device and dtype."""
    found: dict[str, Any] = {k: x.tensor for k, x in state.items() if isinstance(x, Loaded)}
    for key in STORED:  # in one order on all ranks: this and laying out anew are collectives
        if key in found:
            found[key] = whole_if_elsewhere(found[key], param)
    if is_sharded(param):  # what is cut in another way than codes can be is decoded before
        for name in MOMENTS:
            code, scale = found.get(f"{name}_q"), found.get(f"{name}_scale")
            if code is None or scale is None:
                continue
            if storage.moments.get(name) == torch.uint8:
                shape = storing.scale_shape(param)
                if not is_sharded(scale) and scale.numel() == math.prod(shape):
                    found[f"{name}_scale"] = replicated(scale.reshape(shape), param)
                continue
            found[name] = as_param(storing.decode(name, local_now(code), local_now(scale)), code)
            del found[f"{name}_q"], found[f"{name}_scale"]
    if "step" in found:
        found["step"] = local_now(found["step"])
    for key in STORED:
        if key not in found:
            continue
        x = local_of_loaded(found[key], param).detach().to(local(param).device)
        if key in MOMENTS and storage.moments.get(key) is None and not param.is_complex():
            x = x.to(param.dtype)
        found[key] = x
    rest = {
        k: local(x) if isinstance(x, Tensor) else x
        for k, x in state.items()
        if not isinstance(x, Loaded)
    }
    return rest | found


def _own(storage: storing.Storage, given: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    like = local(param)
    if not is_dense(like):
        like = dense_copy(like)
    made = storing.converted(storage, like, given)
    unwanted = storing.unwanted(storage, given)
    own: dict[str, Any] = {}
    for key, x in given.items():
        if key in made or key in unwanted or key == "step":
            continue
        if key.endswith("_scale") and key in STORED:
            made[key] = x.reshape(storing.scale_shape(like)).clone(
                memory_format=torch.contiguous_format
            )
        elif key in STORED:
            made[key] = torch.empty_like(like, dtype=x.dtype, requires_grad=False).copy_(x.detach())
        else:
            own[key] = deepcopy(x)
    return own | {key: as_param(x, param) for key, x in made.items()}
