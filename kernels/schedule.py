"""The schedule: for each tensor with a gradient count the step, and derive its row of scalars.

Everything is computed in float64 on the device, from the group's row and the tensor's own step, so
that nothing here depends on a host value that a captured graph would freeze.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import nvidia
from . import table as t
from .codecs import _random_keys
from .columns import (
    ACTIVE,
    DECAY,
    EPSILON,
    GRAD_FACTOR,
    GROUP_WORDS,
    KEY0,
    KEY1,
    L2,
    NEG_STEP_SIZE,
    NUMEL,
    RSQRT_BIAS2,
    SCALARS,
    TENSOR_WORDS,
    UNSCALE,
    W1,
    W2,
)
from .front import Call, Front, Launched
from .nvidia import _let_next_begin

_LR = tl.constexpr(t.LR)
_BETA1 = tl.constexpr(t.BETA1)
_BETA2 = tl.constexpr(t.BETA2)
_EPS = tl.constexpr(t.EPS)
_WEIGHT_DECAY = tl.constexpr(t.WEIGHT_DECAY)
_FLAGS = tl.constexpr(t.FLAGS)
_MAXIMIZE = tl.constexpr(t.MAXIMIZE)
_DECOUPLED = tl.constexpr(t.DECOUPLED)
_CODES_SHIFT = tl.constexpr(t.CODES_SHIFT)
_LR_AT = tl.constexpr(t.LR_AT)
_MAX_NORM = tl.constexpr(t.MAX_NORM)
_NORM = tl.constexpr(t.NORM)
_CLIP_FACTOR = tl.constexpr(t.CLIP_FACTOR)
_SKIPPED = tl.constexpr(t.SKIPPED)
_SUMS = tl.constexpr(t.SUMS)
_SEED = tl.constexpr(t.SEED)
_POSITION = tl.constexpr(t.POSITION)
_STEP = tl.constexpr(t.STEP)
_GROUP = tl.constexpr(t.GROUP)
_STEP_IS_DOUBLE = tl.constexpr(t.STEP_IS_DOUBLE)

_TENSORS_PER_PROGRAM = 128
_STEP_BITS = tl.constexpr(31)  # float32 counts to 2^24 and float64 further: 2^31 steps are enough


@triton.jit
def _double(at, mask):
    """Float64 values from their bit patterns."""
    return tl.load(at, mask=mask, other=0).to(tl.float64, bitcast=True)


@triton.jit
def _hyper(group, flags, mask, number, WHICH: tl.constexpr):
    """A hyper-parameter: the number, or the device scalar of any dtype that the group points to."""
    at = tl.load(group + _LR_AT + WHICH, mask=mask, other=0)
    code = (flags >> (_CODES_SHIFT + 2 * WHICH)) & 3
    there = mask & (at != 0)
    f32 = tl.load(at.to(tl.pointer_type(tl.float32)), mask=there & (code == 0), other=0)
    f64 = tl.load(at.to(tl.pointer_type(tl.float64)), mask=there & (code == 1), other=0)
    b16 = tl.load(at.to(tl.pointer_type(tl.bfloat16)), mask=there & (code == 2), other=0)
    f16 = tl.load(at.to(tl.pointer_type(tl.float16)), mask=there & (code == 3), other=0)
    narrow = tl.where(code == 2, b16.to(tl.float32), f16.to(tl.float32))
    value = tl.where(code == 1, f64, tl.where(code == 0, f32, narrow).to(tl.float64))
    return tl.where(at != 0, value, number)


@triton.jit
def _float64(low, high):
    """From the halves of its bits, int32."""
    bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _power(base, exponent):
    """base^exponent for whole exponents in [0, 2^31), by square and multiply."""
    result = base * 0 + 1
    for _ in tl.static_range(_STEP_BITS):
        result = tl.where(exponent & 1 == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _one_sided(weight):
    """Weight of an average as the update wants it: 1-beta, or -beta where 1-beta >= 1/2."""
    return tl.where(weight < 0.5, weight, weight - 1)


@triton.jit
def _total(sums, n_sums, SUMS: tl.constexpr):
    """All sums of squares together."""
    lane = tl.arange(0, SUMS)
    return tl.sum(tl.load(sums + lane, mask=lane < n_sums, other=0), axis=0)


@triton.jit
def _clip_factor(norm, max_norm):
    """What torch's clip_grad_norm_ multiplies gradients by; NaN stays NaN."""
    off = max_norm == float("inf")
    factor = tl.where(off, 0, max_norm) / (norm + 1e-6)
    return tl.where((factor > 1) | off, 1.0, factor)


@triton.jit
def _put(scalars, scalars64, tensor, mask, value, COLUMN: tl.constexpr, FLOAT64: tl.constexpr):
    tl.store(scalars + tensor * SCALARS + COLUMN, value.to(tl.float32), mask=mask)
    if FLOAT64:
        tl.store(scalars64 + tensor * SCALARS + COLUMN, value, mask=mask)


@triton.jit(
    do_not_specialize=[
        *("grads", "tensors", "n_tensors", "n_sums", "low0", "high0", "low1", "high1"),
        *("low2", "high2", "low3", "high3"),
    ],
    do_not_specialize_on_alignment=["grad_scale", "found_inf", "sums", "metrics"],
)
def _schedule(
    words,  # int64 [n_words], which begin with the groups: see table.py
    grads: tl.int64,  # addresses of other parts of them
    tensors: tl.int64,
    scalars,  # float32 [n_tensors, SCALARS]
    scalars64,  # float64, the same
    grad_scale,  # float32 [], or None
    found_inf,  # float32 [], or None
    sums,  # float64 [n_sums], of squares of all gradients, or None
    metrics,  # float64 [METRICS], where there are sums
    counted,  # float64 [n_tensors], elements that this step updates, kept if skipped; or None
    n_tensors,
    n_sums,
    low0,  # bits of the groups' lrs, which count in place of the rows' if RATES
    high0,
    low1,
    high1,
    low2,
    high2,
    low3,
    high3,
    RATES: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    FLOAT64: tl.constexpr,
    TENSORS: tl.constexpr,
    OVERLAP: tl.constexpr,  # whether the update's programs may begin meanwhile
):
    if OVERLAP:
        _let_next_begin()
    grads = grads.to(tl.pointer_type(tl.int64))
    tensors = tensors.to(tl.pointer_type(tl.int64))
    tensor = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    mask = tensor < n_tensors

    # as vectors: the interpreter cannot `&` a block with a scalar's comparison
    go = tensor >= 0
    if found_inf is not None:  # a sum over devices: anything but 0 skips the step
        go = go & (tl.load(found_inf + tensor * 0, mask=mask, other=0) == 0)
    if sums is not None:
        total = _total(sums, n_sums, _SUMS) + tensor * 0
        if SKIP_NONFINITE:
            go = go & (total < float("inf"))  # NaN is not
    active = go & mask & (tl.load(grads + tensor, mask=mask, other=0) != 0)

    row = tensors + tensor * TENSOR_WORDS
    if counted is not None:
        elements = tl.load(row + NUMEL, mask=active, other=0).to(tl.float64)
        tl.store(counted + tensor, elements, mask=mask & go)
    step_at = tl.load(row + _STEP, mask=mask, other=0)
    is_double = tl.load(row + _STEP_IS_DOUBLE, mask=mask, other=0) != 0
    at32 = step_at.to(tl.pointer_type(tl.float32))
    at64 = step_at.to(tl.pointer_type(tl.float64))
    step32 = tl.load(at32, mask=active & (is_double == 0), other=0) + 1
    step64 = tl.load(at64, mask=active & is_double, other=0) + 1
    tl.store(at32, step32, mask=active & (is_double == 0))
    tl.store(at64, step64, mask=active & is_double)
    step = tl.where(is_double, step64, step32.to(tl.float64)).to(tl.int64)

    place = tl.load(row + _GROUP, mask=mask, other=0)
    group = words + place * GROUP_WORDS
    flags = tl.load(group + _FLAGS, mask=mask, other=0)
    if RATES:
        rate = tl.where(place == 2, _float64(low2, high2), _float64(low3, high3))
        rate = tl.where(place == 1, _float64(low1, high1), rate)
        rate = tl.where(place == 0, _float64(low0, high0), rate)
    else:
        rate = _double(group + _LR, mask)
    lr = _hyper(group, flags, mask, rate, 0)
    beta1 = _hyper(group, flags, mask, _double(group + _BETA1, mask), 1)
    beta2 = _hyper(group, flags, mask, _double(group + _BETA2, mask), 2)
    weight_decay = _double(group + _WEIGHT_DECAY, mask)
    decoupled = (flags & _DECOUPLED) != 0
    zero = weight_decay * 0

    unscale = zero + 1
    if grad_scale is not None:
        unscale = unscale / tl.load(grad_scale).to(tl.float64)
    factor = tl.where((flags & _MAXIMIZE) != 0, -unscale, unscale)
    if sums is not None:
        norm = tl.sqrt(total) * tl.abs(unscale)
        clip = _clip_factor(norm, _double(group + _MAX_NORM, mask))
        factor = factor * clip
        first = tensor == 0
        skipped = tl.load(metrics + tensor * 0 + _SKIPPED, mask=first, other=0)
        tl.store(metrics + tensor * 0 + _NORM, norm, mask=first)
        tl.store(metrics + tensor * 0 + _CLIP_FACTOR, clip, mask=first)
        tl.store(metrics + tensor * 0 + _SKIPPED, tl.where(go, skipped, skipped + 1), mask=first)
    bias1 = 1 - _power(beta1, step)
    bias2 = 1 - _power(beta2, step)

    _put(scalars, scalars64, tensor, mask, tl.where(active, zero + 1, zero), ACTIVE, FLOAT64)
    _put(scalars, scalars64, tensor, mask, factor, GRAD_FACTOR, FLOAT64)
    _put(scalars, scalars64, tensor, mask, unscale, UNSCALE, FLOAT64)
    _put(scalars, scalars64, tensor, mask, _one_sided(1 - beta1), W1, FLOAT64)
    _put(scalars, scalars64, tensor, mask, _one_sided(1 - beta2), W2, FLOAT64)
    _put(scalars, scalars64, tensor, mask, 1 / tl.sqrt(bias2), RSQRT_BIAS2, FLOAT64)
    _put(scalars, scalars64, tensor, mask, _double(group + _EPS, mask), EPSILON, FLOAT64)
    _put(scalars, scalars64, tensor, mask, -lr / bias1, NEG_STEP_SIZE, FLOAT64)
    decay = tl.where(decoupled, -lr * weight_decay, zero)
    _put(scalars, scalars64, tensor, mask, decay, DECAY, FLOAT64)
    _put(scalars, scalars64, tensor, mask, tl.where(decoupled, zero, weight_decay), L2, FLOAT64)

    seed = tl.load(group + _SEED, mask=mask, other=0)
    key0, key1 = _random_keys(seed, step, tl.load(row + _POSITION, mask=mask, other=0))
    keys = (scalars + tensor * SCALARS).to(tl.pointer_type(tl.uint32), bitcast=True)
    tl.store(keys + KEY0, key0, mask=mask)
    tl.store(keys + KEY1, key1, mask=mask)


class Norm(NamedTuple):
    """What the schedule needs for clipping, and where it writes the metrics."""

    sums: Tensor  # float64 [any number up to SUMS]: of squares of all gradients, as they lie there
    metrics: Tensor  # float64 [METRICS]
    skip_nonfinite: bool


def schedule(
    front: Front,
    table: t.Table,
    memory: t.Memory,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Norm | None = None,
    counted: Tensor | None = None,
    rates: tuple[int, ...] = (),
) -> Launched | None:
    """Count a step for each tensor with a gradient and write its scalars.

    grad_scale, found_inf: float32, 0-dim, on the table's device, or None. counted: float64
    [n_tensors], where to write how many elements are updated unless the step is skipped; or None.
    rates: `pack_rates` of the lrs of all groups, or () where those of the table count; the last
    arguments of what is returned.
    """
    words, (grads, tensors, _) = memory.words.data_ptr(), table.offsets
    arguments = (
        memory.words,
        words + grads,
        words + tensors,
        memory.scalars,
        memory.scalars64,
        grad_scale,
        found_inf,
        None if norm is None else norm.sums,
        None if norm is None else norm.metrics,
        counted,
        table.n_tensors,
        0 if norm is None else norm.sums.numel(),
        *(rates or (0,) * (2 * t.RATES)),
    )
    constants = {
        "RATES": bool(rates),
        "SKIP_NONFINITE": norm is not None and norm.skip_nonfinite,
        "FLOAT64": table.float64,
        "TENSORS": _TENSORS_PER_PROGRAM,
        "OVERLAP": nvidia.overlaps(table.parameters, memory.words.device),
    }
    return front.launch(
        _schedule,
        ("schedule", *[x is None for x in arguments[5:10]], *constants.values()),
        -(-table.n_tensors // _TENSORS_PER_PROGRAM),
        arguments,
        lambda: Call(constants, {"enable_fp_fusion": False}),
    )
