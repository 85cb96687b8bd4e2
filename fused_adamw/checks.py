"""What is refused, with the cure, before a step or a load has changed anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .kernels.table import QUANT_BLOCK
from .layouts import FLOATS, REALS, overlaps_itself
from .shards import is_sharded

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# All that a state may have besides "step", and its dtypes, the one that is kept first; (): any.
STORED: dict[str, tuple[torch.dtype, ...]] = {
    **dict.fromkeys(MOMENTS, ()),
    **{f"{name}{end}": (torch.uint8,) for name in MOMENTS for end in ("_q", "_scale")},
    "master_remainder": (torch.bfloat16, torch.int16),
    "master_param": (torch.float32,),
}
NO_NUMBERS = (str, bytes, np.ndarray)  # though float() takes them; arrays change in place


def check_hypers(group: Mapping[str, Any], min_lr: float = -math.inf) -> None:
    """Raise ValueError for a hyper-parameter out of its range; torch's words first.

    Schedulers reach the end of a cosine a rounding error below 0, which torch lets pass: so a
    group's lr need only be finite, and `min_lr` = 0 is for what a user passes in. Device tensors
    are checked with `min_lr` alone, since reading one waits for the device.
    """
    construct = min_lr == 0

    def value(x: Any, what: str) -> float | None:
        if isinstance(x, NO_NUMBERS):
            raise TypeError(f"Invalid {what}: {x!r} (want a number or a Tensor)")
        if isinstance(x, Tensor):
            replicated = is_sharded(x) and all(where.is_replicate() for where in x.placements)
            if _keeps_memory_elsewhere(x) and not replicated:
                raise TypeError(
                    f"Invalid {what}: a {type(x).__name__} (want a number, a plain Tensor or a "
                    "replicated DTensor)"
                )
            if x.numel() != 1:
                raise ValueError(f"Tensor {what} must be 1-element, but it has {x.numel()}")
            return float(x.detach()) if construct or x.device.type == "cpu" else None
        try:
            return float(x)
        except OverflowError:  # of an int
            return math.inf

    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(beta1, Tensor) != isinstance(beta2, Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    rate = value(lr, "lr")
    if rate is not None and not (min_lr <= rate and math.isfinite(rate)):
        raise ValueError(f"Invalid learning rate: {lr} (want a finite number >= 0)")
    for index, beta in enumerate((beta1, beta2)):
        b = value(beta, f"betas[{index}]")
        if b is not None and not 0.0 <= b < 1.0:
            raise ValueError(
                f"Invalid beta parameter at index {index}: {beta} (want 0 <= beta < 1)"
            )
    for key, words in (("eps", "epsilon"), ("weight_decay", "weight_decay")):
        number = value(group[key], key)
        if number is None:
            raise ValueError(f"Invalid {words} value: {group[key]} (want a number, on the host)")
        if not (number >= 0.0 and math.isfinite(number)):
            raise ValueError(f"Invalid {words} value: {group[key]} (want a finite number >= 0)")


def _keeps_memory_elsewhere(x: Tensor) -> bool:
    """Whether x is of a subclass with a dispatch of its own: most of these have no address."""
    return type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_plain(name: str, param: Tensor) -> None:
    """Raise TypeError for a tensor subclass that keeps its memory elsewhere, unless a DTensor."""
    if _keeps_memory_elsewhere(param) and not is_sharded(param):
        raise TypeError(
            f"{name} is a {type(param).__name__}, a tensor subclass whose memory FusedAdamW does "
            "not know how to find. Pass plain tensors or DTensors, or optimize it with "
            "torch.optim.AdamW."
        )


def check_tensors(name: str, param: Tensor, grad: Tensor | None, state: Mapping[str, Any]) -> None:
    """Raise TypeError or RuntimeError for what a step cannot update."""
    check_plain(name, param)
    if param.device.type == "meta":
        raise RuntimeError(
            f"{name} is on the meta device and has no values. Materialize it (to_empty, then "
            "initialize or load) before the step."
        )
    if param.layout != torch.strided or REALS.get(param.dtype, param.dtype) not in FLOATS:
        raise TypeError(
            f"{name} is a {param.layout} tensor of {param.dtype}; FusedAdamW updates strided "
            f"tensors of {', '.join(map(str, (*FLOATS, *REALS)))}."
        )
    if param.is_conj() or param.is_neg():
        raise RuntimeError(
            f"{name} is conjugated or negated only when it is read, so that its memory holds other "
            "values than it shows. Use .resolve_conj().resolve_neg() to make a plain tensor."
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
        check_state(name, param, state)
    if grad is not None:  # without one nothing of it is read or written: it may be freed
        check_memory(name, {"memory": param, "gradient": grad, **state})


def _check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise RuntimeError(
            "FusedAdamW does not support sparse gradients, please consider SparseAdam instead "
            f"({name}.grad is {grad.layout})"
        )
    if _keeps_memory_elsewhere(grad):
        raise TypeError(
            f"{name}.grad is a {type(grad).__name__} while the param is a plain tensor; its "
            "gradient has to be one as well. Assign a plain tensor: a DTensor's to_local() or "
            "full_tensor(), an AsyncCollectiveTensor's wait()."
        )
    if grad.device != param.device or grad.shape != param.shape:
        raise RuntimeError(
            f"{name} is on {param.device} with shape {tuple(param.shape)} but its gradient is on "
            f"{grad.device} with shape {tuple(grad.shape)}. Move or recompute the gradient: run "
            "zero_grad() and backward() after the parameter has changed."
        )
    real = REALS.get(grad.dtype, grad.dtype)
    if grad.is_complex() != param.is_complex() or real not in FLOATS:
        kind = "complex" if param.is_complex() else "real"
        raise TypeError(
            f"{name} is {param.dtype} but its gradient is {grad.dtype}; it has to be a {kind} "
            "floating-point tensor, as backward() leaves it. Cast what you assign to .grad."
        )


def is_started(state: Mapping[str, Any]) -> bool:
    """Whether there is more than the master of a param that has not been updated yet."""
    return not state.keys() <= {"master_remainder", "master_param"}


def check_state(name: str, param: Tensor, state: Mapping[str, Any]) -> None:
    """Raise TypeError or RuntimeError for a state that is not one of AdamW for this param.

    A moment is there as itself or in 8 bits; in which form, and whether a maximum, is wanted is
    not asked here.
    """
    missing = []
    for key in MOMENTS if is_started(state) else ():
        codes = [k for k in (f"{key}_q", f"{key}_scale") if k in state]
        optional = key == "max_exp_avg_sq" and not codes  # amsgrad, now or before
        if key not in state and len(codes) < 2 and not optional:
            missing.append(key)
    if is_started(state) and "step" not in state:
        missing.append("step")
    if missing:
        raise RuntimeError(
            f"The state of {name} has {sorted(state)} but not {missing}. Load a whole checkpoint "
            "of an AdamW optimizer, or delete optimizer.state[param] to start it anew."
        )
    for key, wanted in STORED.items():
        x = state.get(key)
        if x is None:
            continue
        _check_plain_state(key, name, x)
        if x.device != param.device or (x.shape != param.shape and not key.endswith("_scale")):
            raise RuntimeError(
                f"{key} of {name} is on {x.device} with shape {tuple(x.shape)} but the param is on "
                f"{param.device} with shape {tuple(param.shape)}. Bring the state back to the "
                "param's device before the step, or call load_state_dict, which does so."
            )
        if x.is_conj() or x.is_neg():
            raise RuntimeError(
                f"{key} of {name} is conjugated or negated only when it is read: its memory holds "
                "other values than it shows. Use .resolve_conj().resolve_neg()."
            )
        if wanted and x.dtype not in wanted:
            raise TypeError(
                f"{key} of {name} is {x.dtype}; it is kept in {wanted[0]}. Load it as it was "
                "saved: no cast keeps the bits of codes, remainders and masters."
            )
        floating = x.is_complex() == param.is_complex() and REALS.get(x.dtype, x.dtype) in FLOATS
        if not wanted and not floating:
            kind = "complex" if param.is_complex() else "real"
            raise TypeError(
                f"{key} of {name} is {x.dtype} while the param is {param.dtype}; it has to be a "
                f"{kind} floating-point tensor. Load the checkpoint of a param of this kind, or "
                "delete optimizer.state[param] to start it anew."
            )
        if key.endswith("_scale") and x.numel() != -(-param.numel() // QUANT_BLOCK):
            raise RuntimeError(
                f"{key} of {name} has {x.numel()} exponents, but its {param.numel()} elements are "
                f"{-(-param.numel() // QUANT_BLOCK)} blocks of {QUANT_BLOCK}. Load the checkpoint "
                "again, as a whole."
            )
    step = state.get("step", 0)
    if isinstance(step, Tensor):
        _check_plain_state("step", name, step)
        if step.numel() != 1 or step.device.type == "meta":
            raise RuntimeError(
                f"step of {name} is on {step.device} with shape {tuple(step.shape)}; it is the "
                "number of updates so far: a number, or a tensor of one element."
            )


def is_freed(x: Tensor) -> bool:
    """Whether x has elements but no memory; a view's address is its offset then."""
    return x.numel() > 0 and (x.data_ptr() == 0 or x.untyped_storage().data_ptr() == 0)


def check_memory(name: str, tensors: Mapping[str, Any]) -> None:
    """Raise RuntimeError where a param, gradient or state, by what it is, is freed."""
    for what in ("memory", "gradient", "step", *STORED):
        x = tensors.get(what)
        if isinstance(x, Tensor) and is_freed(x):
            raise RuntimeError(
                f"The {what} of {name} is not there: somebody has freed it, as trainers do who "
                f"offload (untyped_storage().resize_(0)), and its {x.numel()} elements with it. "
                "Bring it back first."
            )


def _check_plain_state(key: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{key} of {name} is a {type(x).__name__}; it has to be a tensor. Load a whole "
            "checkpoint of an AdamW optimizer, or delete optimizer.state[param] to start it anew."
        )
    if _keeps_memory_elsewhere(x):
        raise TypeError(
            f"{key} of {name} is a {type(x).__name__}, a tensor subclass that keeps its memory "
            "elsewhere. Assign a plain tensor, or for a DTensor param a DTensor."
        )


def refuse_overlaps(
    starts: Sequence[int], sizes: Sequence[int], name: Callable[[int], str]
) -> None:
    """Raise ValueError where one launch would update the same elements twice at once.

    starts, sizes: addresses and bytes of tensors. name: what the i-th of them is.
    """
    there = np.flatnonzero(sizes)
    start, size = (np.array(x, dtype=np.int64)[there] for x in (starts, sizes))
    order = np.argsort(start)
    late = start[order][:-1] + size[order][:-1] > start[order][1:]
    if late.any():
        first = int(late.argmax())
        one, other = (name(int(there[order[i]])) for i in (first, first + 1))
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
