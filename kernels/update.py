"""The math, without addresses: one AdamW update of values that a program has in registers.

Its twin is `adamw_update` in fused_adamw/reference.py, which reads like the paper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as t
from .columns import MEASURES
from .nvidia import _reciprocal

# how float32 is divided, and its root taken
_HARDWARE, _IEEE, _RECIPROCAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_ADDED_SQUARES = tl.constexpr(t.ADDED_SQUARES)
_ADDED = tl.constexpr(t.ADDED)
_LOST = tl.constexpr(t.LOST)


@triton.jit
def _sqrt(x, ARITHMETIC: tl.constexpr):
    """Square root: IEEE if exact and always in float64, else the hardware's, 2^-23 off at most."""
    if ARITHMETIC == _IEEE and x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def _quotient(a, b, ARITHMETIC: tl.constexpr):
    """a / b: IEEE if exact and always in float64, else 2 ULP off at most.

    By the reciprocal it is 2 instructions, not 9; that of a subnormal b is infinite, and 0 where b
    is above 2^126, so that launch.py asks for IEEE where eps makes either possible.
    """
    if ARITHMETIC == _IEEE and a.dtype == tl.float32:
        return tl.div_rn(a, b)
    if ARITHMETIC == _RECIPROCAL and a.dtype == tl.float32:
        return a * _reciprocal(b)
    return a / b


@triton.jit
def _average(old, new, weight, difference, PLAIN: tl.constexpr):
    """old + (1-beta) * (new-old), kept one-sided: weight is 1-beta, or -beta where beta <= 1/2."""
    return tl.fma(weight, difference, old if PLAIN else tl.where(weight > 0, old, new))


@triton.jit
def _adamw_update(
    p, g, m, v, v_max, w1, w2, rsqrt_bias2, eps, neg_step_size, decay, l2,
    AMSGRAD: tl.constexpr, ARITHMETIC: tl.constexpr, LARGEST: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """One AdamW update of values in the compute dtype; the scalars are schedule.py's.

    The last value is what was added to p, before any rounding to p's own spacing.

    LARGEST: number of the compute dtype, or 0 where v is below it as it is. PLAIN: l2 is 0, and the
    weights are positive, as nearly everyone has them: the same bits, by 2 to 4 instructions less.
    """
    if not PLAIN:
        g = tl.where(l2 != 0, tl.fma(p, l2, g), g)
    m = _average(m, g, w1, g - m, PLAIN)
    # An overflowed second moment counts as the largest number: inf - inf would be NaN. It still is
    # where g * g itself overflows with beta2 <= 1/2; a select against that costs 8 registers.
    if LARGEST != 0:
        v = tl.minimum(v, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    v = _average(v, g * g, w2, tl.fma(g, g, v * -1.0), PLAIN)  # -v would be 0 - v, an instruction
    if AMSGRAD:
        v_max = tl.maximum(v_max, v, propagate_nan=tl.PropagateNan.ALL)
        d = _sqrt(v_max, ARITHMETIC) * rsqrt_bias2 + eps
    else:
        d = _sqrt(v, ARITHMETIC) * rsqrt_bias2 + eps
    decayed = tl.where(decay != 0, tl.fma(p, decay, p), p)
    quotient = _quotient(m, d, ARITHMETIC)
    added = tl.fma(neg_step_size, quotient, tl.where(decay != 0, p * decay, 0))
    p = tl.fma(neg_step_size, quotient, decayed)
    return p, m, v, v_max, added


@triton.jit
def _measure(added, old, kept, mask):
    """Sums over a block, float32 [MEASURES]; kept: the param as it is read in the next step.

    Squares are float32: those of numbers below 1e-22 vanish, above 1e19 they are infinite.
    """
    added = tl.where(mask, added, 0)
    moves = added != 0
    lost = moves & (kept == old)
    kept = tl.where(mask, kept, 0)
    counts = tl.sum(moves.to(tl.int32) + (lost.to(tl.int32) << 16), axis=0)  # blocks are smaller
    column = tl.arange(0, MEASURES)
    counted = tl.where(column == _LOST, counts >> 16, counts & 0xFFFF).to(tl.float32)
    squares = tl.where(
        column == _ADDED_SQUARES, tl.sum(added * added, axis=0), tl.sum(kept * kept, axis=0)
    )
    return tl.where(column < _ADDED, squares.to(tl.float32), counted)
