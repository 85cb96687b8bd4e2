"""Turn a float32 model into a bfloat16 one whose optimizer knows what the rounding took away."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from . import storage as storing
from .formats import encode_remainder
from .layouts import is_dense
from .optimizer import FusedAdamW, step_dtype
from .shards import is_sharded
from .state import pack_steps

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def convert_to_bf16_(model: Model, optimizer: FusedAdamW) -> Model:
    """Make a model bfloat16, as ``model.to(torch.bfloat16)`` does, and keep its float32 weights.

    What rounding takes off the float32 params of groups with ``master_weights=True`` becomes their
    remainder in the optimizer's state, so that training goes on from the float32 weights, exactly.
    Moments and steps stay as they are; there is no extra memory beyond the remainders, 2 bytes a
    parameter. Params stay the same objects; buffers, and params that the optimizer does not have,
    are rounded.

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
    for p, _ in masters:
        if is_sharded(p):
            raise TypeError(
                f"convert_to_bf16_ cannot convert a DTensor of shape {tuple(p.shape)}: convert the "
                "model before fully_shard, or keep its shards in float32 and pass fully_shard a "
                "MixedPrecisionPolicy(param_dtype=torch.bfloat16)."
            )
    for p, group in masters:
        high, remainder = encode_remainder(p.detach())
        p.data = high
        if p.grad is not None:
            p.grad.data = p.grad.data.to(torch.bfloat16)
        state = optimizer.state[p]
        state[storing.REMAINDER] = remainder.view(torch.bfloat16)
        like = p if is_dense(p) else torch.empty_like(p, memory_format=torch.preserve_format)
        storage = storing.storage_of(group, p)
        state.update(storing.make(storage, like, state, storing.lacking(storage, like, state)))
        if "step" not in state:
            (state["step"],) = pack_steps([0], step_dtype(), p.device)
    model.to(torch.bfloat16)
    return model
