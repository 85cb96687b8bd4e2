"""A float32 model becomes a bfloat16 one whose optimizer knows what rounding took off, and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from . import storage as storing
from .formats import encode_remainder
from .layouts import dense_copy, is_dense
from .optimizer import FusedAdamW
from .shards import is_sharded

Model = TypeVar("Model", bound=nn.Module)
Params: TypeAlias = Sequence[tuple[Tensor, Mapping[str, Any]]]  # with their groups


@torch.no_grad()
def convert_to_bf16_(model: Model, optimizer: FusedAdamW) -> Model:
    """Make a model bfloat16, as ``model.to(torch.bfloat16)`` does, and keep its float32 weights.

    What rounding takes off the float32 params of groups with ``master_weights=True`` becomes their
    remainder in the optimizer's state, so that training goes on from the float32 weights, exactly.
    Moments and steps stay as they are, float32 unless ``state_dtype`` says otherwise; a param that
    was never updated gets none. There is no extra memory beyond the remainders, 2 bytes a
    parameter, but float32 gradients are held to the end. Params stay the same objects; buffers,
    and params that the optimizer does not have, are rounded.

    Args:
        model: its float32 params, if they are the optimizer's, get masters.
        optimizer: with ``master_weights=True`` for some group.

    Returns:
        The model.

    Raises:
        ValueError: no param of the model would get a master.
        TypeError: a DTensor: convert the model before it is sharded, or keep its shards in float32
            and let FSDP2's ``MixedPrecisionPolicy`` compute in bfloat16.

    Nothing has been changed if it raises.
    """
    own = set(model.parameters())
    masters = [
        (p, group)
        for group in optimizer.param_groups
        if group.get("master_weights", False)
        for p in group["params"]
        if p in own and p.dtype == torch.float32
    ]
    if not masters:
        raise ValueError(
            "convert_to_bf16_ found no float32 parameter of the model in a group with "
            "master_weights=True, so nothing would be kept. Construct the optimizer with "
            "master_weights=True from the float32 model's parameters, then convert."
        )
    _refuse_sharded("convert_to_bf16_", masters)
    undo = _undo(model, {p for p, _ in masters})
    made: list[dict[str, Tensor]] = []
    try:
        for p, group in masters:
            high, remainder = encode_remainder(p.detach())
            made.append({storing.REMAINDER: remainder.view(torch.bfloat16)})
            p.data = high
            storage = storing.storage_of(group, p)
            made[-1] |= _moments(p, storage, {**optimizer.state.get(p, {}), **made[-1]})
        model.to(torch.bfloat16)
    except BaseException:
        for (p, _), new in zip(masters, made, strict=False):
            if p.dtype == torch.bfloat16:
                p.data = storing.master_of(p.data, new)
        undo()
        raise
    _put(optimizer, masters, made)
    return model


@torch.no_grad()
def convert_to_fp32_(model: Model, optimizer: FusedAdamW) -> Model:
    """Make a model float32, as ``model.float()`` does, its params what their masters are.

    The inverse of `convert_to_bf16_`: params with a master get its value, exactly, and others of
    bfloat16 or float16 are widened. Masters are dropped, and moments become what ``state_dtype``
    says, by default float32. Params stay the same objects. Old and new params are held together.

    Args:
        model: its bfloat16 and float16 params are made float32.
        optimizer: of these params.

    Returns:
        The model.

    Raises:
        ValueError: the optimizer has no such param of the model.
        TypeError: a DTensor: convert before the model is sharded.

    Nothing has been changed if it raises.
    """
    own = set(model.parameters())
    low = [
        (p, group)
        for group in optimizer.param_groups
        for p in group["params"]
        if p in own and p.dtype in (torch.bfloat16, torch.float16)
    ]
    if not low:
        raise ValueError(
            "convert_to_fp32_ found no bfloat16 or float16 parameter of the model in the "
            "optimizer. Pass the optimizer of this model; model.float() needs none."
        )
    _refuse_sharded("convert_to_fp32_", low)
    undo = _undo(model, ())
    made: list[dict[str, Tensor]] = []
    try:
        for p, group in low:
            state = optimizer.state.get(p, {})
            p.data = storing.master_of(p.detach(), state)
            storage = storing.storage_of(group, p)
            first, second = (x or torch.float32 for x in storage[:2])
            storage = storage._replace(exp_avg=first, exp_avg_sq=second)
            made.append(_moments(p, storage, state))
        model.float()
    except BaseException:
        undo()
        raise
    _put(optimizer, low, made)
    return model


def _refuse_sharded(what: str, params: Params) -> None:
    for p, _ in params:
        if is_sharded(p):
            raise TypeError(
                f"{what} cannot convert a DTensor of shape {tuple(p.shape)}: convert the "
                "model before fully_shard, or keep its shards in float32 and pass fully_shard a "
                "MixedPrecisionPolicy(param_dtype=torch.bfloat16)."
            )


def _put(optimizer: FusedAdamW, params: Params, made: Sequence[dict[str, Tensor]]) -> None:
    """New states of converted params, in place of what they kept in another form."""
    for (p, group), new in zip(params, made, strict=True):
        if p in optimizer.state or new:
            state = optimizer.state[p]
            state.update(new)
            for key in storing.unwanted(storing.storage_of(group, p), state):
                del state[key]


def _moments(
    param: Tensor, storage: storing.Storage, state: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Moments that are kept in another form from now on; none of a param never updated."""
    return storing.converted(storage, param if is_dense(param) else dense_copy(param), state)


def _undo(model: nn.Module, kept: Collection[Tensor]) -> Callable[[], None]:
    """What brings a model back to what it is now, but for the values of params that are kept."""
    held = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    values = [(p, p.data) for p in model.parameters() if p not in kept]
    grads = [(p, p.grad, p.grad.data) for p in model.parameters() if p.grad is not None]

    def undo() -> None:
        for module, params, buffers in held:
            module._parameters.update(params)
            module._buffers.update(buffers)
        for p, value in values:
            p.data = value
        for p, grad, value in grads:
            grad.data = value
            p.grad = grad

    return undo
