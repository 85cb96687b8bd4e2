"""Storage formats on the device: what a load has to decode, and a store to encode.

Twins of fused_adamw/formats.py by name, and equal to them in every bit: integer operations, and
float32 operations that are rounded exactly, nothing else. What the formats are is said there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as t

_QUANT_BLOCK = tl.constexpr(t.QUANT_BLOCK)
_SIGNED_SHIFT = tl.constexpr(23 - t.SIGNED_MANTISSA)
_HALF = tl.constexpr(1 << (22 - t.SIGNED_MANTISSA))  # of a signed code
_SIGNED_FLOOR = tl.constexpr(t.SIGNED_FLOOR)
_SIGNED_ZERO = tl.constexpr(t.SIGNED_ZERO)
_SIGNED_CARRY = tl.constexpr(t.SIGNED_CARRY)
_UNSIGNED_SHIFT = tl.constexpr(23 - t.UNSIGNED_MANTISSA)
_MIDDLE = tl.constexpr(1 << (6 - t.UNSIGNED_MANTISSA))  # between two random numbers
_UNSIGNED_FLOOR = tl.constexpr(t.UNSIGNED_FLOOR)
_UNSIGNED_ZERO = tl.constexpr(t.UNSIGNED_ZERO)
_UNSIGNED_CARRY = tl.constexpr(t.UNSIGNED_CARRY)


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
def _decode_remainder(high, remainder):
    """Float32 master from the bfloat16 that everyone sees and its 16-bit remainder."""
    alone = high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    master = _float(alone + remainder.to(tl.int32))
    return tl.where(master == master, master, _float(alone))  # else written from outside since


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
def _random_bits(index, key0, key1):
    """32 random bits for each int64 index; keys are uint32."""
    x = index.to(tl.uint32) + key0 + (index >> 32).to(tl.uint32) * 0x9E3779B9
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x = x * 0x846CA68B + key1
    return x ^ (x >> 16)


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
    """Float32 to one of its two bfloat16 neighbours; random: int32 in [0, 2^16)."""
    high = tl.where(x == x, _bits(x) + random, 0x7FC00000) >> 16
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _spread(x, BLOCK: tl.constexpr):
    """One value a quantisation block, for each of its elements."""
    wide = tl.broadcast_to(x[:, None], [BLOCK // _QUANT_BLOCK, _QUANT_BLOCK])
    return tl.reshape(wide, [BLOCK])


@triton.jit
def _scaled(x, exponents, BLOCK: tl.constexpr):
    """x times 2^(exponent - 127) of its quantisation block; exponents: int32, 0 for zeros."""
    return x * _spread(_float(exponents << 23), BLOCK)


@triton.jit
def _decode_signed(code, exponents, BLOCK: tl.constexpr):
    """Float32 from codes, uint8 [BLOCK], and their blocks' exponents, uint8."""
    code = code.to(tl.int32)
    x = _float(((code & 0x7F) + _SIGNED_ZERO) << _SIGNED_SHIFT) - _SIGNED_FLOOR
    x = _scaled(x, exponents.to(tl.int32), BLOCK)
    return _float(_bits(x) | ((code & 0x80) << 24))


@triton.jit
def _decode_unsigned(code, exponents, BLOCK: tl.constexpr):
    """The same for values that are not negative."""
    x = _float((code.to(tl.int32) + _UNSIGNED_ZERO) << _UNSIGNED_SHIFT) - _UNSIGNED_FLOOR
    return _scaled(x, exponents.to(tl.int32), BLOCK)


@triton.jit
def _block_exponents(bits, CARRY: tl.constexpr, BLOCK: tl.constexpr):
    """Exponent of the largest value of each quantisation block, from the bits of magnitudes."""
    largest = tl.max(tl.reshape(bits, [BLOCK // _QUANT_BLOCK, _QUANT_BLOCK]), axis=1)
    return tl.minimum(tl.maximum((tl.minimum(largest, 0x7F800000) + CARRY) >> 23, 1), 253)


@triton.jit
def _cut(y, between, SHIFT: tl.constexpr, ZERO: tl.constexpr, LEAST, MOST: tl.constexpr):
    """Codes, offset by ZERO, from the top bits of y; unsigned, so that NaN is above all."""
    bits = y.to(tl.uint32, bitcast=True) + between
    return tl.minimum(tl.maximum((bits >> SHIFT).to(tl.int32), ZERO + LEAST), ZERO + MOST)


@triton.jit
def _encode_signed(x, BLOCK: tl.constexpr):
    """Codes of float32 values, rounded to nearest, and the exponents of their blocks."""
    bits = _bits(x)
    magnitude = bits & 0x7FFFFFFF
    exponents = _block_exponents(magnitude, _SIGNED_CARRY, BLOCK)
    y = _scaled(_float(magnitude), 254 - exponents, BLOCK) + _SIGNED_FLOOR
    code = _cut(y, _HALF, _SIGNED_SHIFT, _SIGNED_ZERO, 0, 0x7F) & 0x7F
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8), exponents.to(tl.uint8)


@triton.jit
def _encode_unsigned(x, random, BLOCK: tl.constexpr):
    """Codes of values that are not negative, rounded stochastically; random: [0, 2^16)."""
    magnitude = _bits(x) & 0x7FFFFFFF
    exponents = _block_exponents(magnitude, _UNSIGNED_CARRY, BLOCK)
    y = _scaled(_float(magnitude), 254 - exponents, BLOCK) + _UNSIGNED_FLOOR
    between = (random << (_UNSIGNED_SHIFT - 16)) + _MIDDLE
    code = _cut(y, between, _UNSIGNED_SHIFT, _UNSIGNED_ZERO, tl.minimum(magnitude, 1), 0xFF)
    return code.to(tl.uint8), exponents.to(tl.uint8)
