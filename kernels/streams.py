"""A program's elements: where they lie, how they are loaded and stored, and their random bits."""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as t
from .codecs import (
    _decode_unsigned,
    _encode_unsigned,
    _random_bits,
    _random_words,
    _repeat,
    _round_stochastic,
)
from .columns import KEY0, KEY1, QUANT_BLOCK
from .columns import RANDOM_GROUP as _GROUP
from .nvidia import _widen

_FIRST = tl.constexpr(t.FIRST)
_INNER = tl.constexpr(t.INNER)
_INNER_WHOLE = tl.constexpr(t.INNER_WHOLE)

_VECTOR = tl.constexpr(8)  # elements in 128 bits of a 16-bit format; 32-bit formats take two
_GROUP_SHIFT = tl.constexpr(t.RANDOM_GROUP.bit_length() - 1)


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
def _exponents_at(tensor, start, COLUMN: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to exponents, for each group of 8 elements to that of its quantisation block."""
    at = tl.load(tensor + COLUMN).to(tl.pointer_type(tl.uint8)) + start // QUANT_BLOCK
    return at + tl.arange(0, BLOCK // _GROUP) // (QUANT_BLOCK // _GROUP)


@triton.jit
def _exponents_mask(first, last, BLOCK: tl.constexpr):
    begin = tl.arange(0, BLOCK // _GROUP) // (QUANT_BLOCK // _GROUP) * QUANT_BLOCK
    return (begin >= first) & (begin < last)


@triton.jit
def _random(
    tensor, scalars, start, lane, COLUMNS: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr
):
    """Two times 32 random bits for each element, by its place in the whole tensor."""
    at = tl.arange(0, BLOCK // _GROUP) * _GROUP if GROUPED else lane
    begin = start + tl.load(tensor + _FIRST)
    if COLUMNS:  # each row leaves out those of the whole tensor's elements that others have
        inner = tl.load(tensor + _INNER)
        row = start // inner
        begun = at - tl.minimum((row + 1) * inner - start, BLOCK).to(tl.int32)
        more = begun // tl.minimum(inner, BLOCK).to(tl.int32) + 1
        row += tl.where(begun < 0, 0, more)
        index = begin + at + row * (tl.load(tensor + _INNER_WHOLE) - inner)
        group, k = index >> _GROUP_SHIFT, (index & (_GROUP - 1)).to(tl.int32)
    else:  # shifts, and 32 bits where they are enough: fewer registers
        within = (begin & (_GROUP - 1)).to(tl.int32) + at
        group, k = (begin >> _GROUP_SHIFT) + (within >> _GROUP_SHIFT), within & (_GROUP - 1)
    keys = scalars.to(tl.pointer_type(tl.uint32), bitcast=True)
    x, y = _random_words(group, tl.load(keys + KEY0), tl.load(keys + KEY1))
    if GROUPED:  # one hash for 8 elements, whose powers are constants then
        x, y, k = _repeat(x, _GROUP), _repeat(y, _GROUP), lane % _GROUP
    return _random_bits(x, k), _random_bits(y, k)


@triton.jit
def _load_exponents(at, mask, FORMAT: tl.constexpr):
    """Those of 8-bit moments; 0 for others, which have none."""
    return tl.load(at, mask=mask, other=0) if FORMAT == tl.uint8 else 0


@triton.jit
def _widened(x, COMPUTE: tl.constexpr, PTX: tl.constexpr):
    """As the dtype of the arithmetic."""
    narrow: tl.constexpr = x.dtype == tl.bfloat16 or x.dtype == tl.float16
    return (_widen(x) if PTX and narrow else x).to(COMPUTE)


@triton.jit
def _decode_second(x, exponents, COMPUTE: tl.constexpr, PTX: tl.constexpr):
    if x.dtype == tl.uint8:
        return _decode_unsigned(x, exponents, PTX)
    return _widened(x, COMPUTE, PTX)


@triton.jit
def _store_second(
    at, exponents_at, x, random, mask, exponents_mask, FORMAT: tl.constexpr,
    STOCHASTIC: tl.constexpr, PTX: tl.constexpr, CACHE: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    if FORMAT == tl.uint8:
        code, exponents = _encode_unsigned(x, random, PTX)
        tl.store(exponents_at, exponents, mask=exponents_mask)
        _store(at, code, mask, CACHE, EVICTION)
    elif STOCHASTIC and FORMAT == tl.bfloat16:
        _store(at, _round_stochastic(x, random), mask, CACHE, EVICTION)
    else:
        _store(at, x.to(FORMAT), mask, CACHE, EVICTION)
