"""AdamW for every tensor of a device in one launch: the math, then the kernel that finds memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import table as t
from .columns import (
    ACTIVE,
    DECAY,
    EPSILON,
    GRAD_FACTOR,
    GROUP_WORDS,
    L2,
    MEASURES,
    NEG_STEP_SIZE,
    RSQRT_BIAS2,
    SCALARS,
    TENSOR_WORDS,
    UNSCALE,
    W1,
    W2,
)

_PARAM = tl.constexpr(t.PARAM)
_EXP_AVG = tl.constexpr(t.EXP_AVG)
_EXP_AVG_SQ = tl.constexpr(t.EXP_AVG_SQ)
_MAX_EXP_AVG_SQ = tl.constexpr(t.MAX_EXP_AVG_SQ)
_NUMEL = tl.constexpr(t.NUMEL)
_SIGNATURE = tl.constexpr(t.SIGNATURE)
_ADDED_SQUARES = tl.constexpr(t.ADDED_SQUARES)
_ADDED = tl.constexpr(t.ADDED)
_LOST = tl.constexpr(t.LOST)

_VECTOR = tl.constexpr(8)  # elements in 128 bits of a 16-bit format; 32-bit formats take two

_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _sqrt(x, EXACT: tl.constexpr):
    """Square root: IEEE if exact and always in float64, else the hardware's, 2^-23 off at most."""
    if EXACT and x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def _quotient(a, b, EXACT: tl.constexpr):
    """a / b: IEEE if exact and always in float64, else the hardware's, 2 ULP off at most."""
    if EXACT and a.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def _average(old, new, weight, square_error):
    """old + (1-beta) * (new-old), kept one-sided: weight is 1-beta, or -beta where beta <= 1/2."""
    return tl.fma(weight, square_error, tl.where(weight > 0, old, new))


@triton.jit
def _adamw_update(
    p, g, m, v, v_max, w1, w2, rsqrt_bias2, eps, neg_step_size, decay, l2,
    AMSGRAD: tl.constexpr, EXACT: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One AdamW update of values in the compute dtype; the scalars are schedule.py's.

    The last value is what was added to p, before any rounding to p's own spacing.
    """
    g = tl.where(l2 != 0, tl.fma(p, l2, g), g)
    m = _average(m, g, w1, g - m)
    # An overflowed second moment counts as the largest number: inf - inf would be NaN. It still is
    # where g * g itself overflows with beta2 <= 1/2; a select against that costs 8 registers.
    v = tl.minimum(v, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    v = _average(v, g * g, w2, tl.fma(g, g, -v))
    if AMSGRAD:
        v_max = tl.maximum(v_max, v, propagate_nan=tl.PropagateNan.ALL)
        d = _sqrt(v_max, EXACT) * rsqrt_bias2 + eps
    else:
        d = _sqrt(v, EXACT) * rsqrt_bias2 + eps
    decayed = tl.where(decay != 0, tl.fma(p, decay, p), p)
    quotient = _quotient(m, d, EXACT)
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


@triton.jit
def _at(address, start, lane, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to a block's elements. Vector access needs the hint on the pointer, right here."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start + lane


@triton.jit
def _load(at, mask, CACHE: tl.constexpr, EVICTION: tl.constexpr):
    return tl.load(at, mask=mask, cache_modifier=CACHE, eviction_policy=EVICTION)


@triton.jit
def _store(at, value, mask, CACHE: tl.constexpr, EVICTION: tl.constexpr):
    tl.store(at, value, mask=mask, cache_modifier=CACHE, eviction_policy=EVICTION)


@triton.jit
def _block(
    tensor,  # the tensor's row of the table
    grad,  # address
    scalars,  # the tensor's row of scalars
    start,  # of the block, in elements of the tensor
    first,  # the part of the block to update: [first, last)
    last,
    PARAM: tl.constexpr,  # storage dtypes
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    AMSGRAD: tl.constexpr,
    ALIGNED: tl.constexpr,  # then first is 0
    STORE_GRAD: tl.constexpr,
    MEASURE: tl.constexpr,
    BLOCK: tl.constexpr,
    EXACT: tl.constexpr,
    LOAD_CACHE: tl.constexpr,
    STORE_CACHE: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Update part of a block; its measures, which are 0 where they are not wanted."""
    COMPUTE: tl.constexpr = tl.float64 if PARAM == tl.float64 else tl.float32
    # made in here: a lane shared by both paths goes through shared memory from layout to layout
    lane = tl.arange(0, BLOCK)
    mask = lane < last
    if not ALIGNED:
        mask &= lane >= first
    p_at = _at(tl.load(tensor + _PARAM), start, lane, PARAM, ALIGNED)
    g_at = _at(grad, start, lane, GRAD, ALIGNED)
    m_at = _at(tl.load(tensor + _EXP_AVG), start, lane, EXP_AVG, ALIGNED)
    v_at = _at(tl.load(tensor + _EXP_AVG_SQ), start, lane, EXP_AVG_SQ, ALIGNED)
    g = _load(g_at, mask, LOAD_CACHE, EVICTION).to(COMPUTE)
    m = _load(m_at, mask, LOAD_CACHE, EVICTION).to(COMPUTE)
    v = _load(v_at, mask, LOAD_CACHE, EVICTION).to(COMPUTE)
    p = _load(p_at, mask, LOAD_CACHE, EVICTION).to(COMPUTE)
    v_max = v
    if AMSGRAD:
        v_max_at = _at(tl.load(tensor + _MAX_EXP_AVG_SQ), start, lane, EXP_AVG_SQ, ALIGNED)
        v_max = _load(v_max_at, mask, LOAD_CACHE, EVICTION).to(COMPUTE)

    if STORE_GRAD:  # GradScaler's clients find the unscaled gradients behind, as torch leaves them
        unscaled = (g * tl.load(scalars + UNSCALE)).to(GRAD)
        _store(g_at, unscaled, mask, STORE_CACHE, EVICTION)
    old = p
    p, m, v, v_max, added = _adamw_update(
        p,
        g * tl.load(scalars + GRAD_FACTOR),
        m,
        v,
        v_max,
        tl.load(scalars + W1),
        tl.load(scalars + W2),
        tl.load(scalars + RSQRT_BIAS2),
        tl.load(scalars + EPSILON),
        tl.load(scalars + NEG_STEP_SIZE),
        tl.load(scalars + DECAY),
        tl.load(scalars + L2),
        AMSGRAD,
        EXACT,
        1.7976931348623157e308 if COMPUTE == tl.float64 else 3.4028234663852886e38,
    )
    kept = p.to(PARAM)
    _store(p_at, kept, mask, STORE_CACHE, EVICTION)
    _store(m_at, m.to(EXP_AVG), mask, STORE_CACHE, EVICTION)
    _store(v_at, v.to(EXP_AVG_SQ), mask, STORE_CACHE, EVICTION)
    if AMSGRAD:
        _store(v_max_at, v_max.to(EXP_AVG_SQ), mask, STORE_CACHE, EVICTION)
    measures = tl.zeros([MEASURES], tl.float32)
    if MEASURE:
        measures = _measure(added, old, kept.to(COMPUTE), mask)
    return measures


@triton.jit
def _dispatch(
    tensor, grad, scalars, scalars64, index, start, numel,
    SIGNATURES: tl.constexpr, STORE_GRAD: tl.constexpr, MEASURE: tl.constexpr, BLOCK: tl.constexpr,
    EXACT: tl.constexpr, LOAD_CACHE: tl.constexpr, STORE_CACHE: tl.constexpr,
    EVICTION: tl.constexpr,
):  # fmt: skip
    """Update a block by the code of its tensor's signature, and of its alignment."""
    measures = tl.zeros([MEASURES], tl.float32)
    addresses = tl.load(tensor + _PARAM) | tl.load(tensor + _EXP_AVG) | grad
    addresses |= tl.load(tensor + _EXP_AVG_SQ) | tl.load(tensor + _MAX_EXP_AVG_SQ)
    size = tl.minimum(numel - start, BLOCK).to(tl.int32)
    # Elements before `vectors` go in 128-bit accesses; the bound is a multiple of the vector, else
    # the mask would break them up. What is left, at most 7 elements or all of an unaligned tensor,
    # goes one by one. Each path casts its own pointers: a shared one would carry the hint across.
    vectors = tl.where(addresses % 16 == 0, size // _VECTOR, 0) * _VECTOR
    signature = tl.load(tensor + _SIGNATURE)
    for i in tl.static_range(len(SIGNATURES)):
        if signature == i:
            if SIGNATURES[i][0] == tl.float64:
                row = scalars64 + index * SCALARS
            else:
                row = scalars + index * SCALARS
            if vectors > 0:
                measures += _block(
                    tensor, grad, row, start, 0, vectors,
                    SIGNATURES[i][0], SIGNATURES[i][1], SIGNATURES[i][2], SIGNATURES[i][3],
                    SIGNATURES[i][4], True, STORE_GRAD, MEASURE, BLOCK, EXACT, LOAD_CACHE,
                    STORE_CACHE, EVICTION,
                )  # fmt: skip
            if vectors < size:
                measures += _block(
                    tensor, grad, row, start, vectors, size,
                    SIGNATURES[i][0], SIGNATURES[i][1], SIGNATURES[i][2], SIGNATURES[i][3],
                    SIGNATURES[i][4], False, STORE_GRAD, MEASURE, BLOCK, EXACT, LOAD_CACHE,
                    STORE_CACHE, EVICTION,
                )  # fmt: skip
    return measures


@triton.jit(do_not_specialize=["n_groups", "n_tensors", "blocks_per_chunk"])
def _adamw(
    words,  # int64 [n_words]: see table.py
    scalars,  # float32 [n_tensors, SCALARS]
    scalars64,  # float64, the same
    rows,  # float32 [n_programs, MEASURES], written where a program updates; or None
    n_groups,
    n_tensors,
    blocks_per_chunk,
    SIGNATURES: tl.constexpr,  # ((param, grad, exp_avg, exp_avg_sq, amsgrad), ...)
    STORE_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a program
    EXACT: tl.constexpr,
    LOAD_CACHE: tl.constexpr,
    STORE_CACHE: tl.constexpr,
    EVICTION: tl.constexpr,
):
    grads = words + n_groups * GROUP_WORDS
    tensors = grads + n_tensors
    chunks = tensors + n_tensors * TENSOR_WORDS
    program = tl.program_id(0)
    chunk = tl.load(chunks + program // blocks_per_chunk)
    index = chunk & 0xFFFFFFFF
    start = ((chunk >> 32) + program % blocks_per_chunk) * (
        BLOCKS * BLOCK
    )  # int64: tensors pass 2^31
    tensor = tensors + index * TENSOR_WORDS
    numel = tl.load(tensor + _NUMEL)
    grad = tl.load(grads + index)
    active = tl.load(scalars + index * SCALARS + ACTIVE)
    if (start >= numel) | (grad == 0) | (active == 0):
        return

    measures = tl.zeros([MEASURES], tl.float32)
    for _ in range(BLOCKS):
        if start < numel:
            measures += _dispatch(
                tensor, grad, scalars, scalars64, index, start, numel, SIGNATURES, STORE_GRAD,
                rows is not None, BLOCK, EXACT, LOAD_CACHE, STORE_CACHE, EVICTION,
            )  # fmt: skip
        start += BLOCK
    if rows is not None:
        tl.store(rows + program.to(tl.int64) * MEASURES + tl.arange(0, MEASURES), measures)


def constexpr_signatures(signatures: tuple[t.Signature, ...]) -> tuple[tuple[object, ...], ...]:
    """Signatures as the kernel takes them: Triton's dtypes in place of torch's."""
    return tuple((*(_TRITON_DTYPES[d] for d in s[:4]), s.amsgrad) for s in signatures)


def launch_options(
    table: t.Table, device: torch.device, store_grad: bool, measure: bool
) -> dict[str, int | bool]:
    """Options of the launch.

    64 registers let 8 programs share a multiprocessor: for several dtypes ptxas takes up to 72
    unless it is told to take 64, which it then does without a spill (Triton 3.6; 3.9 spills 8 bytes
    a thread on sm_80). Told the same, kernels that store gradients do spill; they take up to 80,
    and float64 120.
    """
    mixed = len({dtype for s in table.signatures for dtype in s[:4]}) > 1
    nvidia = device.type == "cuda" and torch.version.hip is None
    plain = not (table.float64 or store_grad or measure)
    cap = nvidia and mixed and plain and table.parameters.maxnreg
    return {
        "num_warps": table.parameters.num_warps,
        "enable_fp_fusion": False,
        **({"maxnreg": cap} if cap else {}),
    }


def adamw(table: t.Table, memory: t.Memory, store_grad: bool, rows: Tensor | None = None) -> None:
    """Update every tensor of the table whose gradient is present; `schedule` must have run.

    Moves `Signature.bytes_per_element` an element, and one write more of the gradient with
    `store_grad`, which leaves unscaled gradients behind. rows: float32 [n_programs, MEASURES], in
    which each program that updates leaves its sums, 16 bytes written for 1,024 elements; or None.
    """
    if table.n_programs:
        arguments, options = _call(table, memory, store_grad, rows)
        _adamw[(table.n_programs,)](*arguments, **options)


def compile_for(
    table: t.Table, memory: t.Memory, store_grad: bool, rows: Tensor | None = None
) -> None:
    """Compile what `adamw` will launch, so that it fails before the schedule has counted a step."""
    if isinstance(_adamw, triton.runtime.JITFunction):  # the interpreter compiles nothing
        arguments, options = _call(table, memory, store_grad, rows)
        _adamw.warmup(*arguments, grid=(1,), **options)


def _call(
    table: t.Table, memory: t.Memory, store_grad: bool, rows: Tensor | None
) -> tuple[tuple[object, ...], dict[str, object]]:
    arguments = (
        memory.words,
        memory.scalars,
        memory.scalars64,
        rows,
        table.n_groups,
        table.n_tensors,
        table.blocks_per_chunk,
    )
    tuned = table.parameters
    constexprs = {
        "SIGNATURES": constexpr_signatures(table.signatures),
        "STORE_GRAD": store_grad,
        "BLOCK": tuned.block,
        "BLOCKS": tuned.blocks_per_program,
        "EXACT": tuned.exact,
        "LOAD_CACHE": tuned.load_cache,
        "STORE_CACHE": tuned.store_cache,
        "EVICTION": tuned.eviction,
    }
    chosen = launch_options(table, memory.words.device, store_grad, rows is not None)
    return arguments, {**constexprs, **chosen}
