"""AdamW for every tensor of a device in one launch: the kernel that finds memory, its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import nvidia
from . import table as t
from .codecs import (
    _decode_master,
    _decode_remainder,
    _decode_signed,
    _encode_remainder,
    _encode_signed,
    _round_stochastic,
)
from .columns import (
    ACTIVE,
    DECAY,
    EPSILON,
    EXP_AVG_AT,
    EXP_AVG_SCALE_AT,
    EXP_AVG_SQ_AT,
    EXP_AVG_SQ_SCALE_AT,
    GRAD_FACTOR,
    L2,
    MASTER_AT,
    MAX_EXP_AVG_SQ_AT,
    MAX_EXP_AVG_SQ_SCALE_AT,
    MEASURES,
    NEG_STEP_SIZE,
    NUMEL,
    PARAM_AT,
    QUANT_BLOCK,
    RSQRT_BIAS2,
    SCALARS,
    SIGNATURE,
    TENSOR_WORDS,
    UNSCALE,
    W1,
    W2,
)
from .columns import RANDOM_GROUP as _GROUP
from .front import Call, Front, Launched
from .launch_parameters import LaunchParameters
from .nvidia import _wait_for_previous
from .prefetch import _prefetch_ahead
from .streams import (
    _VECTOR,
    _at,
    _decode_second,
    _exponents_at,
    _exponents_mask,
    _load,
    _load_exponents,
    _random,
    _store,
    _store_second,
    _widened,
)
from .update import _HARDWARE, _IEEE, _RECIPROCAL, _adamw_update, _measure

_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
    None: tl.int1,  # no master: Triton 3.6 takes no None within a tuple
}


@triton.jit
def _block(
    tensor,  # the tensor's row of the table
    grad,  # address
    scalars,  # the tensor's row of scalars
    start,  # of the block, in elements of the tensor
    first,  # the part of the block to update: [first, last)
    last,
    later,  # where to look up what to prefetch: prefetch.py
    PARAM: tl.constexpr,  # storage dtypes
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTER: tl.constexpr,  # int16, float32, or int1 for none
    STOCHASTIC: tl.constexpr,
    COLUMNS: tl.constexpr,  # a shard of columns
    ALIGNED: tl.constexpr,  # then first is 0
    STORE_GRAD: tl.constexpr,
    MEASURE: tl.constexpr,
    BLOCK: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    PLAIN: tl.constexpr,
    PTX: tl.constexpr,
    LOAD_CACHE: tl.constexpr,
    STORE_CACHE: tl.constexpr,
    EVICTION: tl.constexpr,
    CAPPED: tl.constexpr,  # whether the registers are
    PREFETCH: tl.constexpr,  # whether to ask for what later programs read
    PREFETCH_ELEMENTS: tl.constexpr,  # elements, too, not only the words that lead to them
):
    """Update part of a block; its measures, which are 0 where they are not wanted."""
    COMPUTE: tl.constexpr = tl.float64 if PARAM == tl.float64 else tl.float32
    # made in here: a lane shared by both paths goes through shared memory from layout to layout
    lane = tl.arange(0, BLOCK)
    mask = lane < last
    if not ALIGNED:
        mask &= lane >= first
    exponents_mask = _exponents_mask(first, last, BLOCK)
    group = tl.arange(0, BLOCK // _GROUP)
    exponents_stored = exponents_mask & (group % (QUANT_BLOCK // _GROUP) == 0)
    p_at = _at(tl.load(tensor + PARAM_AT), start, lane, PARAM, ALIGNED)
    g_at = _at(grad, start, lane, GRAD, ALIGNED)
    m_at = _at(tl.load(tensor + EXP_AVG_AT), start, lane, EXP_AVG, ALIGNED)
    v_at = _at(tl.load(tensor + EXP_AVG_SQ_AT), start, lane, EXP_AVG_SQ, ALIGNED)
    m_exponents_at = _exponents_at(tensor, start, EXP_AVG_SCALE_AT, BLOCK)
    v_exponents_at = _exponents_at(tensor, start, EXP_AVG_SQ_SCALE_AT, BLOCK)
    m_exponents = _load_exponents(m_exponents_at, exponents_mask, EXP_AVG)
    v_exponents = _load_exponents(v_exponents_at, exponents_mask, EXP_AVG_SQ)
    g = _load(g_at, mask, LOAD_CACHE, EVICTION)
    m = _load(m_at, mask, LOAD_CACHE, EVICTION)
    v = _load(v_at, mask, LOAD_CACHE, EVICTION)
    p = _load(p_at, mask, LOAD_CACHE, EVICTION)
    if MASTER != tl.int1:
        master_at = _at(tl.load(tensor + MASTER_AT), start, lane, MASTER, ALIGNED)
        master = _load(master_at, mask, LOAD_CACHE, EVICTION)
    if AMSGRAD:
        v_max_at = _at(tl.load(tensor + MAX_EXP_AVG_SQ_AT), start, lane, EXP_AVG_SQ, ALIGNED)
        v_max_exponents_at = _exponents_at(tensor, start, MAX_EXP_AVG_SQ_SCALE_AT, BLOCK)
        v_max = _load(v_max_at, mask, LOAD_CACHE, EVICTION)
        v_max_exponents = _load_exponents(v_max_exponents_at, exponents_mask, EXP_AVG_SQ)

    # Between the loads and the first use of what they bring: before, the program's own elements
    # would come later; after, the look-ups in here would wait for them.
    if ALIGNED and PREFETCH:
        _prefetch_ahead(
            tensor, later, PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, AMSGRAD, MASTER, PREFETCH_ELEMENTS,
            BLOCK,
        )  # fmt: skip

    TOGETHER: tl.constexpr = PTX and ALIGNED  # several in a register, else one by one
    g = _widened(g, COMPUTE, TOGETHER)
    if EXP_AVG == tl.uint8:
        m = _decode_signed(m, m_exponents, TOGETHER)
    else:
        m = _widened(m, COMPUTE, TOGETHER)
    v = _decode_second(v, v_exponents, COMPUTE, TOGETHER)
    v_max = _decode_second(v_max, v_max_exponents, COMPUTE, TOGETHER) if AMSGRAD else v
    if MASTER == tl.int1:
        p = _widened(p, COMPUTE, TOGETHER)
    elif MASTER == tl.int16:
        p = _decode_remainder(p, master, TOGETHER)
    else:
        p = _decode_master(p, master)
    if STORE_GRAD:  # GradScaler's clients find the unscaled gradients behind, as torch leaves them
        unscaled = (g * tl.load(scalars + UNSCALE)).to(GRAD)
        _store(g_at, unscaled, mask, STORE_CACHE, EVICTION)
    largest: tl.constexpr = (
        1.7976931348623157e308 if COMPUTE == tl.float64 else 3.4028234663852886e38
    )
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
        0.0 if PLAIN else tl.load(scalars + L2),
        AMSGRAD,
        ARITHMETIC,
        0 if EXP_AVG_SQ == tl.uint8 else largest,  # the largest code is half of it
        PLAIN,
    )
    if not ALIGNED:  # else whole quantisation blocks are masked, and their codes are not stored
        if EXP_AVG == tl.uint8:
            m = tl.where(mask, m, 0.0)
        if EXP_AVG_SQ == tl.uint8:
            v, v_max = tl.where(mask, v, 0.0), tl.where(mask, v_max, 0.0)
    for_param, for_second = 0, 0
    if STOCHASTIC or EXP_AVG_SQ == tl.uint8:
        for_second, for_param = _random(tensor, scalars, start, lane, COLUMNS, ALIGNED, BLOCK)
    kept = p  # as it is read in the next step: masters are exact
    if MASTER == tl.int16:
        high, remainder = _encode_remainder(p)
        _store(p_at, high, mask, STORE_CACHE, EVICTION)
        _store(master_at, remainder, mask, STORE_CACHE, EVICTION)
    elif MASTER == tl.float32:
        _store(p_at, p.to(PARAM), mask, STORE_CACHE, EVICTION)
        _store(master_at, p, mask, STORE_CACHE, EVICTION)
    elif STOCHASTIC and PARAM == tl.bfloat16:
        kept = _round_stochastic(p, for_param)
        _store(p_at, kept, mask, STORE_CACHE, EVICTION)
    else:
        kept = p.to(PARAM)
        _store(p_at, kept, mask, STORE_CACHE, EVICTION)
    if CAPPED and not ALIGNED:  # found anew: kept until here they would be spilled
        m_exponents_at = _exponents_at(tensor, start, EXP_AVG_SCALE_AT, BLOCK)
        v_exponents_at = _exponents_at(tensor, start, EXP_AVG_SQ_SCALE_AT, BLOCK)
    if EXP_AVG == tl.uint8:
        code, exponents = _encode_signed(m, TOGETHER)
        tl.store(m_exponents_at, exponents, mask=exponents_stored)
        _store(m_at, code, mask, STORE_CACHE, EVICTION)
    else:
        _store(m_at, m.to(EXP_AVG), mask, STORE_CACHE, EVICTION)
    _store_second(
        v_at, v_exponents_at, v, for_second, mask, exponents_stored, EXP_AVG_SQ, STOCHASTIC,
        TOGETHER, STORE_CACHE, EVICTION,
    )  # fmt: skip
    if AMSGRAD:
        _store_second(
            v_max_at, v_max_exponents_at, v_max, for_second, mask, exponents_stored, EXP_AVG_SQ,
            STOCHASTIC, TOGETHER, STORE_CACHE, EVICTION,
        )  # fmt: skip
    measures = tl.zeros([MEASURES], tl.float32)
    if MEASURE:
        measures = _measure(added, old, kept.to(COMPUTE), mask)
    return measures


@triton.jit
def _dispatch(
    tensor, grad, signature, aligned, scalars, scalars64, index, start, numel, later,
    SIGNATURES: tl.constexpr, STORE_GRAD: tl.constexpr, MEASURE: tl.constexpr, BLOCK: tl.constexpr,
    ARITHMETIC: tl.constexpr, PLAIN: tl.constexpr, PTX: tl.constexpr, LOAD_CACHE: tl.constexpr,
    STORE_CACHE: tl.constexpr, EVICTION: tl.constexpr, CAPPED: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    """Update a block by the code of its tensor's signature, and of its alignment."""
    measures = tl.zeros([MEASURES], tl.float32)
    size = tl.minimum(numel - start, BLOCK).to(tl.uint32)  # to be divided by an `and` alone
    for i in tl.static_range(len(SIGNATURES)):
        if signature == i:
            # Elements before `vectors` go in 128-bit accesses; the bound is a multiple of the
            # vector, else the mask would break them up. What is left goes one by one: at most 7
            # elements, in 8-bit formats at most 63, so that no quantisation block is cut in two,
            # or all of an unaligned tensor. Each path casts its own pointers: a shared one would
            # carry the hint across.
            if SIGNATURES[i][2] == tl.uint8 or SIGNATURES[i][3] == tl.uint8:
                vectors = tl.where(aligned, size // QUANT_BLOCK, 0) * QUANT_BLOCK
            else:
                vectors = tl.where(aligned, size // _VECTOR, 0) * _VECTOR
            if SIGNATURES[i][0] == tl.float64:
                row = scalars64 + index * SCALARS
            else:
                row = scalars + index * SCALARS
            if vectors > 0:
                measures += _block(
                    tensor, grad, row, start, 0, vectors, later,
                    SIGNATURES[i][0], SIGNATURES[i][1], SIGNATURES[i][2], SIGNATURES[i][3],
                    SIGNATURES[i][4], SIGNATURES[i][5], SIGNATURES[i][6], SIGNATURES[i][7], True,
                    STORE_GRAD, MEASURE, BLOCK, ARITHMETIC, PLAIN, PTX, LOAD_CACHE, STORE_CACHE,
                    EVICTION, CAPPED, PREFETCH, SIGNATURES[i][8],
                )  # fmt: skip
            if vectors < size:
                measures += _block(
                    tensor, grad, row, start, vectors, size, later,
                    SIGNATURES[i][0], SIGNATURES[i][1], SIGNATURES[i][2], SIGNATURES[i][3],
                    SIGNATURES[i][4], SIGNATURES[i][5], SIGNATURES[i][6], SIGNATURES[i][7], False,
                    STORE_GRAD, MEASURE, BLOCK, ARITHMETIC, PLAIN, PTX, LOAD_CACHE, STORE_CACHE,
                    EVICTION, CAPPED, PREFETCH, SIGNATURES[i][8],
                )  # fmt: skip
    return measures


@triton.jit(do_not_specialize=["grads", "tensors", "chunks", "chunk_shift", "ahead"])
def _adamw(
    grads: tl.int64,  # addresses of parts of the table, int64: see table.py
    tensors: tl.int64,
    chunks: tl.int64,
    scalars,  # float32 [n_tensors, SCALARS]
    scalars64,  # float64, the same
    rows,  # float32 [n_programs, MEASURES], written where a program updates; or None
    chunk_shift,  # log2 of the blocks in a chunk: a division would cost 2 instructions an element
    ahead,  # programs between those that prefetch and those that read
    SIGNATURES: tl.constexpr,  # t.Signature as a tuple, in Triton's dtypes
    STORE_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a program
    ARITHMETIC: tl.constexpr,
    PLAIN: tl.constexpr,
    PTX: tl.constexpr,  # whether there may be NVIDIA's own instructions: nvidia.py
    OVERLAP: tl.constexpr,  # whether programs begin before the schedule has ended
    LOAD_CACHE: tl.constexpr,
    STORE_CACHE: tl.constexpr,
    EVICTION: tl.constexpr,
    CAPPED: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    grads = grads.to(tl.pointer_type(tl.int64))
    tensors = tensors.to(tl.pointer_type(tl.int64))
    chunks = chunks.to(tl.pointer_type(tl.int64))
    program = tl.program_id(0)
    item = program >> chunk_shift
    chunk = tl.load(chunks + item)
    index = chunk.to(tl.int32)
    block = (chunk >> 32) + (program - (item << chunk_shift))
    start = block * (BLOCKS * BLOCK)  # int64: tensors pass 2^31
    tensor = tensors + index * TENSOR_WORDS
    numel = tl.load(tensor + NUMEL)
    grad = tl.load(grads + index)
    signature = tl.load(tensor + SIGNATURE)
    aligned = ((signature >> 32) | (grad & 15)).to(tl.int32) == 0
    signature = signature.to(tl.int32)
    if OVERLAP:  # the words were there before the schedule began; it writes the scalars
        _wait_for_previous()
    active = tl.load(scalars + index * SCALARS + ACTIVE)
    if (start >= numel) | (grad == 0) | (active == 0):
        return

    later = grads, tensors, scalars, chunks, program, ahead, chunk_shift
    measures = tl.zeros([MEASURES], tl.float32)
    for _ in range(BLOCKS):
        if start < numel:
            measures += _dispatch(
                tensor, grad, signature, aligned, scalars, scalars64, index, start, numel, later,
                SIGNATURES, STORE_GRAD, rows is not None, BLOCK, ARITHMETIC, PLAIN, PTX, LOAD_CACHE,
                STORE_CACHE, EVICTION, CAPPED, PREFETCH,
            )  # fmt: skip
        start += BLOCK
    if rows is not None:
        tl.store(rows + program.to(tl.int64) * MEASURES + tl.arange(0, MEASURES), measures)


def constexpr_signatures(signatures: tuple[t.Signature, ...]) -> tuple[tuple[object, ...], ...]:
    """Signatures as the kernel takes them: in Triton's dtypes, with what they prefetch."""
    return tuple(
        (
            *(_TRITON_DTYPES[d] for d in s[:4]),
            s.amsgrad,
            _TRITON_DTYPES[s.master],
            *s[6:],
            s.prefetches_elements,
        )
        for s in signatures
    )


def _arithmetic(parameters: LaunchParameters, device: torch.device) -> tl.constexpr:
    if parameters.exact:
        return _IEEE
    return _RECIPROCAL if nvidia.is_nvidia(device) else _HARDWARE


def _prefetches(table: t.Table, device: torch.device) -> bool:
    # a program of several blocks would ask anew with each
    one_block = table.parameters.blocks_per_program == 1
    return table.ahead > 0 and one_block and nvidia.is_nvidia(device)


def launch_options(
    table: t.Table, device: torch.device, store_grad: bool, measure: bool
) -> dict[str, int | bool]:
    """Options of the launch.

    Fewer registers let more programs share a multiprocessor: 56 let 9, 64 let 8, 72 let 7. ptxas
    likes to take more, and does without (it spills, if anything, in the path of a tensor's last
    elements) where it is told to. Not told are kernels that store gradients or measure, which do
    spill then, and masters with other moments than 8-bit ones, which take 64 to 72 as it is. What
    it gains is measured by bench/tune.py, on H200s for stochastic rounding and 8-bit moments; for
    one dtype on an H100, nothing (there Triton 3.6 takes 56 as it is, and 3.9 would take 76).
    """
    tuned, signatures = table.parameters, table.signatures
    cap = 0
    if any(s.quantised for s in signatures):
        cap = tuned.maxnreg_int8
    elif not any(s.master is not None for s in signatures):
        several = len({dtype for s in signatures for dtype in s[:4]}) > 1
        stochastic = any(s.stochastic for s in signatures)
        one = tuned.maxnreg_random if stochastic else tuned.maxnreg_one
        if tuned.maxnreg_one and any(s.amsgrad for s in signatures):
            one = tuned.maxnreg
        cap = tuned.maxnreg if several else one
    wide = table.float64 or store_grad or measure or any(s.columns for s in signatures)
    options = {"num_warps": tuned.num_warps, "enable_fp_fusion": False}
    if nvidia.overlaps(tuned, device):
        options["launch_pdl"] = True
    if cap and not wide and nvidia.is_nvidia(device):
        options["maxnreg"] = cap
    return options


def adamw(
    front: Front, table: t.Table, memory: t.Memory, store_grad: bool, rows: Tensor | None = None
) -> Launched | None:
    """Update every tensor of the table whose gradient is present; `schedule` must have run.

    As the launch before this one, on the same stream: with `overlap` programs begin beside it.

    Moves `Signature.bytes_per_element` an element, and one write more of the gradient with
    `store_grad`, which leaves unscaled gradients behind. rows: float32 [n_programs, MEASURES], in
    which each program that updates leaves its sums, 16 bytes written for 1,024 elements; or None.
    """
    if not table.n_programs:
        return None
    return front.launch(
        _adamw,
        ("adamw", table.signatures, table.parameters, store_grad, rows is None),
        table.n_programs,
        _arguments(table, memory, rows),
        lambda: _call(table, memory, store_grad, rows),
    )


def compile_for(
    table: t.Table, memory: t.Memory, store_grad: bool, rows: Tensor | None = None
) -> None:
    """Compile what `adamw` will launch, so that it fails before the schedule has counted a step."""
    if isinstance(_adamw, triton.runtime.JITFunction):  # the interpreter compiles nothing
        constants, options = _call(table, memory, store_grad, rows)
        _adamw.warmup(*_arguments(table, memory, rows), grid=(1,), **constants, **options)


def _arguments(table: t.Table, memory: t.Memory, rows: Tensor | None) -> tuple[object, ...]:
    words, (grads, tensors, chunks) = memory.words.data_ptr(), table.offsets
    return (
        words + grads,
        words + tensors,
        words + chunks,
        memory.scalars,
        memory.scalars64,
        rows,
        table.blocks_per_chunk.bit_length() - 1,
        table.ahead,
    )


def _call(table: t.Table, memory: t.Memory, store_grad: bool, rows: Tensor | None) -> Call:
    tuned, device = table.parameters, memory.words.device
    options = launch_options(table, device, store_grad, rows is not None)
    constants = {
        "SIGNATURES": constexpr_signatures(table.signatures),
        "STORE_GRAD": store_grad,
        "BLOCK": tuned.block,
        "BLOCKS": tuned.blocks_per_program,
        "ARITHMETIC": _arithmetic(tuned, device).value,
        "PLAIN": tuned.plain,
        "PTX": nvidia.is_nvidia(device),
        "OVERLAP": nvidia.overlaps(tuned, device),
        "LOAD_CACHE": tuned.load_cache,
        "STORE_CACHE": tuned.store_cache,
        "EVICTION": tuned.eviction,
        "CAPPED": "maxnreg" in options,
        "PREFETCH": _prefetches(table, device),
    }
    return Call(constants, options)
