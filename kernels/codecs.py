"""Storage formats on the device: what a load has to decode, and a store to encode.

Twins of fused_adamw/formats.py by name, and equal to them in every bit: integer operations, and
float32 operations that are rounded exactly, nothing else. What the formats are is said there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as t
from .columns import QUANT_BLOCK
from .columns import RANDOM_GROUP as _GROUP
from .nvidia import _and_or, _bytes, _signed_halves, _top_bytes, _unsigned_codes

_SIGNED_SHIFT = tl.constexpr(23 - t.SIGNED_MANTISSA)
_SIGNED_BITS = tl.constexpr(0x7F << (23 - t.SIGNED_MANTISSA))  # of a code, shifted
_SIGNED_ZERO = tl.constexpr(t.SIGNED_ZERO << (23 - t.SIGNED_MANTISSA))
_SIGNED_FLOOR = tl.constexpr(t.SIGNED_FLOOR)
_SIGNED_CARRY = tl.constexpr(t.SIGNED_CARRY)
_SIGNED_LARGEST = tl.constexpr(t.SIGNED_LARGEST)
_SIGNED_HALF = tl.constexpr(1 << (22 - t.SIGNED_MANTISSA))
_UNSIGNED_SHIFT = tl.constexpr(23 - t.UNSIGNED_MANTISSA)
_UNSIGNED_ZERO = tl.constexpr(t.UNSIGNED_ZERO << (23 - t.UNSIGNED_MANTISSA))
_UNSIGNED_ONE = tl.constexpr((t.UNSIGNED_ZERO + 1) << (23 - t.UNSIGNED_MANTISSA))
_UNSIGNED_FLOOR = tl.constexpr(t.UNSIGNED_FLOOR)
_UNSIGNED_CARRY = tl.constexpr(t.UNSIGNED_CARRY)
_UNSIGNED_LARGEST = tl.constexpr(t.UNSIGNED_LARGEST)
_BINADE = tl.constexpr(1 << 23)
_SIGN = tl.constexpr(-(2**31))
_POWER1 = tl.constexpr(t.RANDOM_MULTIPLIER)
_POWER2 = tl.constexpr(t.RANDOM_MULTIPLIER**2 % 2**32)
_POWER4 = tl.constexpr(t.RANDOM_MULTIPLIER**4 % 2**32)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _one_nan(x):
    """Bits of float32 values, those of every NaN alike: added to, they would become numbers."""
    return tl.where(x != x, 0x7FC00000, _bits(x))


@triton.jit
def _decode_remainder(high, remainder, PTX: tl.constexpr):
    """Float32 master from the bfloat16 that everyone sees and its 16-bit remainder."""
    alone = _float(high.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    rest = _signed_halves(remainder) if PTX else remainder.to(tl.int32)
    master = _float(_bits(alone) + rest)
    return tl.where(master == master, master, alone)  # else written from outside since


@triton.jit
def _encode_remainder(master):
    """A float32 as bfloat16, rounded to nearest, ties away from zero, and the remainder, int16."""
    bits = _one_nan(master)
    high = ((bits + 0x8000) >> 16).to(tl.int16)
    return high.to(tl.bfloat16, bitcast=True), bits.to(tl.int16)


@triton.jit
def _decode_master(param, master):
    """The float32 master, unless the param has been written from outside since."""
    return tl.where(master.to(param.dtype) == param, master, param.to(tl.float32))


@triton.jit
def _random_words(group, key0, key1):
    """Two times 32 random bits for each group of RANDOM_GROUP elements, int64; keys are uint32."""
    x = group.to(tl.uint32) + key0 + (group >> 32).to(tl.uint32) * 0x9E3779B9
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x = x * 0x846CA68B + key1
    x ^= x >> 16
    y = x * 0x31848BAB + key0
    return x, y ^ (y >> 14)


@triton.jit
def _random_bits(word, k):
    """32 random bits for the k-th element of a group, the upper ones best; k: int32."""
    x = word * tl.where((k & 1) != 0, _POWER1, 1).to(tl.uint32)
    x = x * tl.where((k & 2) != 0, _POWER2, 1).to(tl.uint32)
    return x * tl.where((k & 4) != 0, _POWER4, 1).to(tl.uint32)


@triton.jit
def _mixed(x):
    """A uint64 with its bits mixed: one round of SplitMix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _random_keys(seed, step, position):
    """Two uint32 for one update of one tensor, from int64s."""
    key = _mixed(seed.to(tl.uint64) + 0x9E3779B97F4A7C15)
    key = _mixed(key + position.to(tl.uint64))
    key = _mixed(key + step.to(tl.uint64))
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def _round_stochastic(x, random):
    """Float32 to one of its two bfloat16 neighbours; random: uint32."""
    high = tl.where(x == x, _bits(x) + (random >> 16).to(tl.int32), 0x7FC00000) >> 16
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _repeat(x, TIMES: tl.constexpr):
    """[n] as [n * TIMES], each value TIMES times."""
    wide = tl.broadcast_to(x[:, None], [x.shape[0], TIMES])
    return tl.reshape(wide, [x.shape[0] * TIMES])


# Exponents of blocks are held once for each group of 8 elements, [n / 8]: that is once a thread on
# the vector path, so that they stay in registers. Held once a block they go through shared memory.


@triton.jit
def _decode_signed(code, exponents, PTX: tl.constexpr):
    """Float32 from codes, uint8 [n], and exponents, uint8 [n / 8]."""
    spread = _bytes(code, True) if PTX else code.to(tl.int8, bitcast=True).to(tl.int32)
    shifted = spread << _SIGNED_SHIFT
    scale = _float(exponents.to(tl.int32) << 23)
    if PTX:
        x = _float(_and_or(shifted, _SIGNED_BITS, _SIGNED_ZERO))
    else:
        x = _float((shifted & _SIGNED_BITS) | _SIGNED_ZERO)
    x = tl.fma(x, _repeat(scale, _GROUP), _repeat(scale * -_SIGNED_FLOOR, _GROUP))
    return _float(_bits(x) | (shifted & _SIGN))


@triton.jit
def _decode_unsigned(code, exponents, PTX: tl.constexpr):
    """The same for values that are not negative."""
    # half of it, with twice the scale: so shift and addition are one instruction, and no `or`
    wide = _bytes(code, False) if PTX else code.to(tl.int32)
    x = _float((wide << _UNSIGNED_SHIFT) + (_UNSIGNED_ZERO - _BINADE))
    scale = _float((exponents.to(tl.int32) + 1) << 23)
    return tl.fma(x, _repeat(scale, _GROUP), _repeat(scale * (-_UNSIGNED_FLOOR / 2), _GROUP))


@triton.jit
def _magnitude(x, LARGEST: tl.constexpr):
    """|x|, or the largest that has a code, given as bits; in place of NaN, too."""
    largest = tl.full([], LARGEST, tl.int32).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < largest, tl.abs(x), largest)


@triton.jit
def _block_exponents(magnitude, CARRY: tl.constexpr):
    """Exponent of the largest value of each quantisation block, int32 [n / 8]."""
    groups: tl.constexpr = magnitude.shape[0] // _GROUP
    largest = tl.max(tl.reshape(_bits(magnitude), [groups, _GROUP]), axis=1)  # within a thread
    in_block: tl.constexpr = QUANT_BLOCK // _GROUP
    largest = tl.max(tl.reshape(largest, [groups // in_block, in_block]), axis=1)
    return _repeat(tl.maximum((largest + CARRY) >> 23, 1), in_block)


@triton.jit
def _encode_signed(x, PTX: tl.constexpr):
    """Codes of float32 values [n], rounded to nearest, and exponents, uint8 [n / 8]."""
    magnitude = _magnitude(x, _SIGNED_LARGEST)
    exponents = _block_exponents(magnitude, _SIGNED_CARRY)
    scale = _float((254 - exponents) << 23)
    y = tl.fma(magnitude, _repeat(scale, _GROUP), _SIGNED_FLOOR)
    # the code moves to the top, and above it bit 25 of y, which is set: it is in [2^-3, 2)
    code = (_bits(y) << (24 - _SIGNED_SHIFT)) + ((_SIGNED_HALF << (24 - _SIGNED_SHIFT)) + _SIGN)
    code |= _bits(x) & _SIGN
    code = _top_bytes(code) if PTX else (code >> 24).to(tl.uint8)
    return code, exponents.to(tl.uint8)


@triton.jit
def _encode_unsigned(x, random, PTX: tl.constexpr):
    """The same of values that are not negative, rounded stochastically; random: uint32."""
    magnitude = _magnitude(x, _UNSIGNED_LARGEST)
    exponents = _block_exponents(magnitude, _UNSIGNED_CARRY)
    scale = _float((254 - exponents) << 23)
    y = tl.fma(magnitude, _repeat(scale, _GROUP), _UNSIGNED_FLOOR)
    code = _bits(y) + (random >> (32 - _UNSIGNED_SHIFT)).to(tl.int32)
    code = tl.where(magnitude != 0, tl.maximum(code, _UNSIGNED_ONE), code)
    code = _unsigned_codes(code) if PTX else (code >> _UNSIGNED_SHIFT).to(tl.uint8)
    return code, exponents.to(tl.uint8)
