"""Storage formats: what is kept of a number between two steps. Arithmetic does not know them.

Twins of kernels/codecs.py by name, and equal to them in every bit.

* Remainder: a bfloat16 param and 16 bits in the state are the float32 master, exactly. Rounding is
  to nearest, ties away from zero: with ties to even, 65,537 float32 share one bfloat16.
* Master: float16 params keep a float32 copy.
* Stochastic rounding: up or down with the probabilities that make the mean right, so that updates
  smaller than half the distance of two numbers are not lost. The bits depend on seed, step,
  position of the param and index of the element in the whole tensor: alike on every replica and in
  every sharding, and again after a resume. 8 elements share one hash, of which each takes another
  multiple: a hash for each would cost more than the rounding.
* 8 bits: 64 neighbours share the exponent of their largest. With y = |x| / 2^exponent, in [0, 2),
  the code is cut out of the bits of y + floor, so that it is linear below the floor and logarithmic
  above, without a table, a division or a root. First moments have a sign and 4 binades of 32 codes
  and are rounded to nearest; second moments 16 binades of 16 codes, rounded stochastically, and
  what is not 0 does not become 0.

Why these. Error of the update, relative, against float64 moments after 20, 50, 100 and 200 steps of
bench/train.py's small model on a CPU (beta2 0.999; gradients of the float32 run):

    first moments, blocks of 64            nearest                    stochastic
      4 binades of 32                      1.9, 2.0, 1.9, 1.8 %       2.6, 2.7, 2.5, 2.4 %
      8 binades of 16                      2.8, 3.0, 2.7, 2.6 %       4.0, 4.2, 3.8, 3.7 %
      linear, scaled by the largest        1.9, 1.7, 1.5, 1.4 %       2.6, 2.4, 2.1, 2.0 %
      2y / (1 + y), the same               1.4, 1.4, 1.2, 1.2 %
    second moments
      8 binades of 32                      0.8, 1.4, 2.9, 5.6 %       1.1, 1.6, 2.2, 2.9 %
      16 binades of 16                     1.6, 2.9, 6.6, 13 %        2.0, 2.8, 3.9, 4.9 %
      32 binades of 8                      3.3, 6.6, 14, 26 %         3.9, 5.2, 6.9, 8.3 %
      linear in the root                   1.0, 1.4, 2.2, 3.6 %       1.3, 1.7, 2.3, 2.8 %
      linear in the fourth root            0.9, 1.4, 2.2, 3.8 %       1.3, 1.8, 2.5, 3.2 %
      bfloat16                             0.2, 0.3, 0.5, 0.9 %       0.3, 0.4, 0.6, 0.9 %

Second moments decay by a thousandth a step, less than half a code: rounded to nearest they stand
still, and their error grows without end. What is left with stochastic rounding is noise without
bias. 16 binades reach down to 2^-19 of the largest of a block, gradients to 2^-10 of it; 8 binades
and the roots are nearer in this model, but leave less (2^-12, 2^-16) where some features are much
larger than their neighbours, or want a root. Blocks of 32 to 256 made no difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import table as t

_LOW32 = 0xFFFFFFFF


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _float(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)


def decode_remainder(high: Tensor, remainder: Tensor) -> Tensor:
    """Float32 master of bfloat16 values and their 16-bit remainders (int16).

    A pair that no master rounds to was written from outside: then the master is what is seen.
    """
    alone = high.view(torch.int16).int() << 16
    master = _float(alone + remainder.int())
    return torch.where(master == master, master, _float(alone))


def _one_nan(x: Tensor) -> Tensor:
    """Bits of float32 values, those of every NaN alike: added to, they would become numbers."""
    return _bits(x).masked_fill(x.isnan(), 0x7FC00000)


def encode_remainder(master: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 as bfloat16, rounded to nearest with ties away from zero, and its remainder."""
    bits = _one_nan(master)
    high = ((bits + 0x8000) >> 16).to(torch.int16)
    return high.view(torch.bfloat16), bits.to(torch.int16)


def decode_master(param: Tensor, master: Tensor) -> Tensor:
    """The float32 master, unless the param has been written from outside since."""
    return torch.where(master.to(param.dtype) == param, master, param.float())


def random_words(group: Tensor, key0: int, key1: int) -> tuple[Tensor, Tensor]:
    """Two times 32 random bits for each group of elements, int64 in [0, 2^32).

    Chris Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/) with a key in two places;
    and one round more.
    """
    x = (group + key0 + (group >> 32) * 0x9E3779B9) & _LOW32
    x ^= x >> 16
    x = (x * 0x7FEB352D) & _LOW32
    x ^= x >> 15
    x = (x * 0x846CA68B + key1) & _LOW32
    x ^= x >> 16
    y = (x * 0x31848BAB + key0) & _LOW32
    return x, y ^ (y >> 14)


def random_bits(index: Tensor, key0: int, key1: int) -> tuple[Tensor, Tensor]:
    """Two times 32 random bits for each index, int64 in [0, 2^32), the upper ones best."""
    powers = [pow(t.RANDOM_MULTIPLIER, k, 2**32) for k in range(t.RANDOM_GROUP)]
    power = torch.tensor(powers, device=index.device)[index % t.RANDOM_GROUP]
    x, y = random_words(index // t.RANDOM_GROUP, key0, key1)
    return (x * power) & _LOW32, (y * power) & _LOW32


def _mixed(x: int) -> int:
    low64 = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & low64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & low64
    return x ^ (x >> 31)


def random_keys(seed: int, step: int, position: int) -> tuple[int, int]:
    """Keys for one update of one tensor: SplitMix64 over the three, one after the other."""
    key = 0x9E3779B97F4A7C15
    for x in (seed, position, step):
        key = _mixed((key + x) & (2**64 - 1))
    return key & _LOW32, key >> 32


def round_stochastic(x: Tensor, random: Tensor) -> Tensor:
    """Float32 to one of its two bfloat16 neighbours. random: int64 in [0, 2^32).

    What bfloat16 can represent, infinity and NaN stay as they are.
    """
    high = (_bits(x) + (random >> 16).int()).masked_fill_(x.isnan(), 0x7FC00000) >> 16
    return high.to(torch.int16).view(torch.bfloat16)


def _blocks(x: Tensor) -> Tensor:
    """[n] as [blocks, QUANT_BLOCK], with zeros behind its end."""
    missing = -len(x) % t.QUANT_BLOCK
    if missing:
        x = torch.cat([x, x.new_zeros(missing)])
    return x.view(-1, t.QUANT_BLOCK)


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """[n] times the scale of each block."""
    return (_blocks(x) * scale[:, None]).view(-1)[: len(x)]


def decode_signed(code: Tensor, exponents: Tensor) -> Tensor:
    """Float32 [n] from codes, uint8 [n], and their blocks' exponents, uint8 [n / 64, up]."""
    whole = code.int()
    bits = ((whole & 0x7F) + t.SIGNED_ZERO) << (23 - t.SIGNED_MANTISSA)
    x = _scaled(_float(bits) - t.SIGNED_FLOOR, _float(exponents.int() << 23))
    return _float(_bits(x) | ((whole & 0x80) << 24))


def decode_unsigned(code: Tensor, exponents: Tensor) -> Tensor:
    """The same for values that are not negative."""
    bits = (code.int() + t.UNSIGNED_ZERO) << (23 - t.UNSIGNED_MANTISSA)
    x = (_float(bits) - t.UNSIGNED_FLOOR) / 2
    return _scaled(x, _float((exponents.int() + 1) << 23))


def _magnitude(x: Tensor, largest: int) -> Tensor:
    """|x|, or the largest that has a code, given as bits; in place of NaN, too."""
    bits = _bits(x) & 0x7FFFFFFF
    return _float(bits.clamp_(max=largest))


def _block_exponents(magnitude: Tensor, carry: int) -> Tensor:
    return ((_blocks(_bits(magnitude)).amax(1) + carry) >> 23).clamp_(min=1)


def encode_signed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of float32 values [n], rounded to nearest, and the exponents of their blocks."""
    shift = 23 - t.SIGNED_MANTISSA
    magnitude = _magnitude(x, t.SIGNED_LARGEST)
    exponents = _block_exponents(magnitude, t.SIGNED_CARRY)
    y = _scaled(magnitude, _float((254 - exponents) << 23)) + t.SIGNED_FLOOR
    code = ((_bits(y) + (1 << (shift - 1))) >> shift) - t.SIGNED_ZERO
    return (code | ((_bits(x) >> 24) & 0x80)).to(torch.uint8), exponents.to(torch.uint8)


def encode_unsigned(x: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of values that are not negative, rounded stochastically; random: int64 < 2^32."""
    shift = 23 - t.UNSIGNED_MANTISSA
    magnitude = _magnitude(x, t.UNSIGNED_LARGEST)
    exponents = _block_exponents(magnitude, t.UNSIGNED_CARRY)
    y = _scaled(magnitude, _float((254 - exponents) << 23)) + t.UNSIGNED_FLOOR
    code = ((_bits(y) + (random >> (32 - shift)).int()) >> shift) - t.UNSIGNED_ZERO
    code = torch.maximum(code, (magnitude != 0).int())
    return code.to(torch.uint8), exponents.to(torch.uint8)
