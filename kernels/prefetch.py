"""Asking L2 for what programs will read some microseconds from now, so that they need not wait.

A program looks up its chunk, then its tensor's row, then loads its elements, and waits for memory
each time: until a tensor's turn comes, elements have driven its row out of the cache, and where an
element has few bytes, too few are under way to cover the time that they take. So one thread of a
program asks for what comes later: elements, at twice the distance the words that lead to them, at
three times the list of chunks. It does so between the program's own loads and the first use of what
they bring, where the wait for memory covers it. No bit of any result depends on it.

Where instructions are short, with 8-bit moments, one program in eight asks for all of them: on an
H200 each asking for itself took 3.5 % longer, with masters 0.5 % (bench/results/h200/order.txt).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as t
from .columns import (
    EXP_AVG_AT,
    EXP_AVG_SCALE_AT,
    EXP_AVG_SQ_AT,
    EXP_AVG_SQ_SCALE_AT,
    MASTER_AT,
    MAX_EXP_AVG_SQ_AT,
    MAX_EXP_AVG_SQ_SCALE_AT,
    NUMEL,
    PARAM_AT,
    QUANT_BLOCK,
    SCALARS,
    SIGNATURE,
    TENSOR_WORDS,
)

_UNIT_SHIFT = tl.constexpr(t.PREFETCH_UNIT.bit_length() - 1)


@triton.jit
def _is_first_thread():
    """Whether this is the program's first thread: a condition that splits a warp."""
    thread = tl.inline_asm_elementwise(
        "mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=True, pack=1
    )
    return thread == 0


@triton.jit
def _ask(address, size):
    """Prefetch so many bytes, if any: address and size are multiples of 16."""
    tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0;"
        " @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _prefetch(begin, end):
    """From one address to another: back to the last multiple of 16, and not beyond the end's."""
    begin, end = begin & -16, end & -16
    _ask(begin, (end - begin).to(tl.int32))


@triton.jit
def _prefetch_words(at, BYTES: tl.constexpr):
    """Of the table, or of the scalars; to the end of the last 16 bytes, which is theirs."""
    begin = at.to(tl.int64, bitcast=True)
    _prefetch(begin, begin + BYTES + 15)


@triton.jit
def _prefetch_elements(address, start, size, DTYPE: tl.constexpr):
    item: tl.constexpr = DTYPE.primitive_bitwidth // 8
    _prefetch(address + start * item, address + (start + size) * item)


@triton.jit
def _prefetch_moment(
    tensor, start, size, AT: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr
):
    _prefetch_elements(tl.load(tensor + AT), start, size, DTYPE)
    if DTYPE == tl.uint8:
        exponents = tl.load(tensor + SCALE)
        _prefetch_elements(exponents, start // QUANT_BLOCK, size // QUANT_BLOCK, tl.uint8)


@triton.jit
def _prefetch_tables(later):
    """The list of chunks at three times the distance, and at twice a tensor that begins there."""
    grads, tensors, scalars, chunks, program, ahead, chunk_shift = later
    last = tl.num_programs(0) - 1
    _prefetch_words(chunks + (tl.minimum(program + 3 * ahead, last) >> chunk_shift), 8)
    chunk = tl.load(chunks + (tl.minimum(program + 2 * ahead, last) >> chunk_shift))
    if chunk >> 32 == 0:
        index = chunk & 0xFFFFFFFF
        _prefetch_words(tensors + index * TENSOR_WORDS, TENSOR_WORDS * 8)
        _prefetch_words(grads + index, 8)
        _prefetch_words(scalars + index * SCALARS, SCALARS * 4)


@triton.jit
def _prefetch_unit(
    own, later, size, PARAM: tl.constexpr, GRAD: tl.constexpr, EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr, AMSGRAD: tl.constexpr, MASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements of one or several programs, where they have the signature of this program's own."""
    grads, tensors, _, chunks, program, ahead, chunk_shift = later
    program = tl.minimum(program + ahead, tl.num_programs(0) - 1)
    item = program >> chunk_shift
    chunk = tl.load(chunks + item)
    index = chunk & 0xFFFFFFFF
    start = ((chunk >> 32) + (program - (item << chunk_shift))) * BLOCK
    tensor = tensors + index * TENSOR_WORDS
    size = tl.minimum(tl.load(tensor + NUMEL) - start, size)  # negative past the end
    grad = tl.load(grads + index)
    signature = tl.load(own + SIGNATURE).to(tl.int32)
    if (grad != 0) & (tl.load(tensor + SIGNATURE).to(tl.int32) == signature):
        _prefetch_elements(tl.load(tensor + PARAM_AT), start, size, PARAM)
        _prefetch_elements(grad, start, size, GRAD)
        _prefetch_moment(tensor, start, size, EXP_AVG_AT, EXP_AVG_SCALE_AT, EXP_AVG)
        _prefetch_moment(tensor, start, size, EXP_AVG_SQ_AT, EXP_AVG_SQ_SCALE_AT, EXP_AVG_SQ)
        if AMSGRAD:
            _prefetch_moment(
                tensor, start, size, MAX_EXP_AVG_SQ_AT, MAX_EXP_AVG_SQ_SCALE_AT, EXP_AVG_SQ
            )
        if MASTER != tl.int1:
            _prefetch_elements(tl.load(tensor + MASTER_AT), start, size, MASTER)


@triton.jit
def _prefetch_ahead(
    own,  # the row of this program's tensor
    later,  # grads, tensors, scalars, chunks, program, ahead, chunk_shift: as _adamw has them
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    AMSGRAD: tl.constexpr,
    MASTER: tl.constexpr,
    ELEMENTS: tl.constexpr,  # whether to ask for elements, or for the table alone
    BLOCK: tl.constexpr,
):
    """Ask for what the programs from `program + ahead` on will read."""
    _, _, _, _, program, _, chunk_shift = later
    unit_shift = 0
    if EXP_AVG == tl.uint8 or EXP_AVG_SQ == tl.uint8:  # instructions are short there
        unit_shift = tl.minimum(chunk_shift, _UNIT_SHIFT)
    if program & ((1 << unit_shift) - 1) == 0:  # noqa: SIM102  # so the others skip it at once
        if _is_first_thread():
            _prefetch_tables(later)
            if ELEMENTS:
                _prefetch_unit(
                    own, later, BLOCK << unit_shift,
                    PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, AMSGRAD, MASTER, BLOCK,
                )  # fmt: skip
