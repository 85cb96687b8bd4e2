"""Codecs: twins bitwise equal, over all codes and the awkward values; remainder, random bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_adamw import formats
from fused_adamw.kernels import codecs, nvidia
from fused_adamw.kernels import table as t

each = pytest.mark.parametrize
N = 1024
EDGES = [
    *(0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x00007FFF, 0x00008000, 0x00008001),
    *(0x3F7F7FFF, 0x3F7F8000, 0x3F800000, 0x3F808000, 0x3F80FFFF, 0x7F7F7FFF, 0x7F7F8000),
    *(0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7F80FFFF, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF),
]


def floats(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def edges() -> Tensor:
    """Float32 at every boundary, of both signs."""
    bits = torch.tensor(EDGES, dtype=torch.int64)
    return floats(torch.cat([bits, bits - 2**31]))


def awkward() -> Tensor:
    """Random bit patterns, all binades, and the edges: subnormals, NaN, infinity, -0."""
    some = torch.randint(-(2**31), 2**31, (8 * N,), dtype=torch.int64)
    return floats(torch.cat([some, edges().view(torch.int32).long().repeat(8)]))


def same_bits(a: Tensor, b: Tensor) -> None:
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    assert a.dtype == b.dtype
    kind = kinds.get(a.dtype, a.dtype)
    wrong = a.cpu().view(kind) != b.cpu().view(kind)
    assert not wrong.any(), (int(wrong.nonzero()[0]), a[wrong][:4], b[wrong][:4])


def in_blocks(
    kernel: Any, inputs: list[Tensor], outputs: list[tuple[torch.dtype, int]], *constants: Any
) -> Any:
    """Run a codec over inputs of whole blocks of N, [n] or [n / 64]; outputs: dtype, divisor."""
    n = len(inputs[0])
    outs = [torch.full((n // by,), 77, dtype=d, device=inputs[0].device) for d, by in outputs]
    kernel[(n // N,)](*inputs, *outs, *constants, N, enable_fp_fusion=False)  # as the step
    return outs[0] if len(outs) == 1 else outs


def padded(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(-len(x) % N)])


@triton.jit
def _decode_remainder(a, b, out, PTX: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, codecs._decode_remainder(tl.load(a + i), tl.load(b + i), PTX))


@triton.jit
def _decode_master(a, b, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, codecs._decode_master(tl.load(a + i), tl.load(b + i)))


@triton.jit
def _encode_remainder(x, high, remainder, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = codecs._encode_remainder(tl.load(x + i))
    tl.store(high + i, a)
    tl.store(remainder + i, b)


@triton.jit
def _round_stochastic(x, random, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(random + i).to(tl.uint32)
    tl.store(out + i, codecs._round_stochastic(tl.load(x + i), bits))


@triton.jit
def _random(index, keys, out0, out1, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key0, key1 = tl.load(keys + i * 0).to(tl.uint32), tl.load(keys + i * 0 + 1).to(tl.uint32)
    at = tl.load(index + i)
    x, y = codecs._random_words(at // 8, key0, key1)
    k = (at % 8).to(tl.int32)
    tl.store(out0 + i, codecs._random_bits(x, k).to(tl.int64))
    tl.store(out1 + i, codecs._random_bits(y, k).to(tl.int64))


@triton.jit
def _keys(seed, step, position, out0, out1, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = codecs._random_keys(tl.load(seed + i), tl.load(step + i), tl.load(position + i))
    tl.store(out0 + i, a.to(tl.int64))
    tl.store(out1 + i, b.to(tl.int64))


@triton.jit
def _encode(
    x, random, code, exponent, SIGNED: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0) * BLOCK
    i = start + tl.arange(0, BLOCK)
    if SIGNED:
        a, b = codecs._encode_signed(tl.load(x + i), PTX)
    else:
        a, b = codecs._encode_unsigned(tl.load(x + i), tl.load(random + i).to(tl.uint32), PTX)
    tl.store(code + i, a)
    group = tl.arange(0, BLOCK // 8)
    tl.store(exponent + start // 64 + group // 8, b, mask=group % 8 == 0)


@triton.jit
def _decode(code, exponent, out, SIGNED: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    i = start + tl.arange(0, BLOCK)
    e = tl.load(exponent + start // 64 + tl.arange(0, BLOCK // 8) // 8)
    if SIGNED:
        x = codecs._decode_signed(tl.load(code + i), e, PTX)
    else:
        x = codecs._decode_unsigned(tl.load(code + i), e, PTX)
    tl.store(out + i, x)


@triton.jit
def _widen(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, nvidia._widen(tl.load(x + i)))


@each("remainder", [0, 1, -1, 0x7FFF, -0x8000, 0x1234, "random"])
def test_decode_remainder_of_all_bfloat16(device: torch.device, remainder: Any) -> None:
    high = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    if remainder == "random":
        rest = torch.randint(-(2**15), 2**15, (2**16,), dtype=torch.int16)
    else:
        rest = torch.full((2**16,), remainder, dtype=torch.int16)
    got = formats.decode_remainder(high, rest)
    if device.type == "cuda" or remainder in ("random", -1):  # 64 programs, 10 ms each
        inputs = [high.to(device), rest.to(device)]
        twin = in_blocks(_decode_remainder, inputs, [(torch.float32, 1)], nvidia.is_nvidia(device))
        same_bits(got, twin)
    seen = high.float()
    # a weight that was written from outside is followed to half a unit of its last place
    finite = seen.isfinite()
    step = torch.exp2(torch.frexp(seen).exponent.double() - 8).clamp(min=2.0**-133)
    assert ((got - seen).abs() <= step / 2 * 1.0001)[finite & got.isfinite()].all()
    assert got.isnan()[seen.isnan()].all()
    assert (got.sign() == seen.sign())[finite & (seen != 0)].all()
    zero = seen == 0
    assert (got[zero].view(torch.int32) < 0).equal(seen[zero].view(torch.int32) < 0)


def test_remainder_keeps_all_bits(device: torch.device) -> None:
    """Every rounding position: all values of the low 17 bits, in binades at both ends."""
    low = torch.arange(2**17, dtype=torch.int64)
    tops = torch.tensor([0, 0x00800000, 0x3F800000, 0x40FE0000, 0x7F7E0000], dtype=torch.int64)
    bits = (tops[:, None] + low).flatten()
    for x in (floats(bits), floats(bits - 2**31), awkward()):
        number = ~x.isnan()
        high, rest = formats.encode_remainder(x)
        same_bits(formats.decode_remainder(high, rest)[number], x[number])
        assert (high.isnan() & (rest == 0))[~number].all()
        # to nearest: nothing that bfloat16 has is nearer
        finite = x.abs() < 3e38
        nearest = x.bfloat16().double()
        assert ((high.double() - x).abs() == (nearest - x).abs())[finite].all()
    x = padded(awkward()).to(device)
    twins = in_blocks(_encode_remainder, [x], [(torch.bfloat16, 1), (torch.int16, 1)])
    for twin, own in zip(twins, formats.encode_remainder(x), strict=True):
        same_bits(own, twin)


def test_decode_master(device: torch.device) -> None:
    master = torch.randn(N, device=device)
    param = master.half()
    param[::3] = 2.5
    got = formats.decode_master(param, master)
    assert torch.equal(got[1::3], master[1::3])
    assert (got[::3] == 2.5).all()
    outputs = [(torch.float32, 1)]
    same_bits(got, in_blocks(_decode_master, [param, master], outputs))


def test_stochastic_rounding_twins_and_what_stays(device: torch.device) -> None:
    x = padded(awkward()).to(device)
    random = torch.randint(0, 2**32, x.shape, device=device)
    got = formats.round_stochastic(x, random)
    outputs = [(torch.bfloat16, 1)]
    same_bits(got, in_blocks(_round_stochastic, [x, random], outputs))
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    for r in (0, 2**16, 2**31, 2**32 - 1):
        kept = formats.round_stochastic(every.float(), torch.full((2**16,), r))
        nan = every.isnan()
        assert kept.isnan().equal(nan)
        same_bits(kept[~nan], every[~nan])


@each("draw", [0, 1], ids=["second", "param"])
@each("value", [1.0009, -3.1234567e-5, 1.5e-40, 255.99])
def test_stochastic_rounding_is_unbiased(value: float, draw: int) -> None:
    n = 2**20
    x = torch.full((n,), value)
    index = torch.arange(n) + 2**33 - 5
    random = formats.random_bits(index, *formats.random_keys(7, 11, 13))[draw]
    rounded = formats.round_stochastic(x, random).double()
    down, up = rounded.min().item(), rounded.max().item()
    assert down < x[0].item() < up
    share = (x[0].item() - down) / (up - down)
    sigma = math.sqrt(share * (1 - share) / n)
    assert abs((rounded == up).double().mean().item() - share) < 5 * sigma


def test_random_bits(device: torch.device) -> None:
    index = torch.randint(0, 2**48, (N,), dtype=torch.int64)
    index[:4] = torch.tensor([0, 2**32 - 1, 2**32, 2**47])
    args = [torch.randint(0, 2**31, (N,), dtype=torch.int64) for _ in range(3)]
    args[0][0], args[1][1], args[2][2] = 2**63 - 1, 0, 0
    keys = [formats.random_keys(*(int(x[i]) for x in args)) for i in range(N)]
    twins = in_blocks(_keys, [x.to(device) for x in args], [(torch.int64, 1)] * 2)
    assert [tuple(pair) for pair in zip(*(x.tolist() for x in twins), strict=True)] == keys
    pair = torch.tensor(keys[5], dtype=torch.int64, device=device)
    twins = in_blocks(_random, [index.to(device), pair], [(torch.int64, 1)] * 2)
    for own, twin in zip(formats.random_bits(index, *keys[5]), twins, strict=True):
        same_bits(own, twin)


def draws(n: int, *key: int) -> tuple[Tensor, Tensor]:
    """The upper 16 bits of both, as they round a bfloat16, for elements [0, n)."""
    second, param = formats.random_bits(torch.arange(n), *formats.random_keys(*key))
    return second >> 16, param >> 16


def correlated(a: Tensor, b: Tensor) -> float:
    """The correlation of two draws from [0, 2^16), in standard deviations of none."""
    middle = 2**15 - 0.5
    a, b = a.double() - middle, b.double() - middle
    return abs((a * b).mean().item()) * 12 / 2**32 * math.sqrt(a.numel())


@each("which", [0, 1], ids=["second", "param"])
def test_random_bits_are_uniform(which: int) -> None:
    """Each bit, each pair of neighbours in each place of a group, and sums over groups."""
    n = 2**17
    x = draws(n, 0, 1, 0)[which]
    for bit in range(16):
        ones = ((x >> bit) & 1).double()
        assert abs(ones.mean().item() - 0.5) < 5 * 0.5 / math.sqrt(n)
    for apart in (1, 2, 4):
        for place in range(8):
            a, b = (x.roll(-shift).view(-1, 8)[:-1, place] for shift in (0, apart))
            counts = torch.bincount((a >> 12) * 16 + (b >> 12), minlength=256).double()
            expected = len(a) / 256
            chi2 = ((counts - expected) ** 2 / expected).sum().item()
            assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255), (apart, place)
    sums = (x.double() / 2**16 - 0.5).view(-1, 8).sum(1)
    wanted = 8 / 12  # the variance of 8 independent ones, and below the standard deviation of it
    deviation = math.sqrt((8 * (1 / 80 - 3 / 144) + 2 * wanted**2) / len(sums))
    assert abs((sums**2).mean().item() - wanted) < 5 * deviation


def test_random_bits_differ() -> None:
    """No correlation of neighbours, steps, tensors, seeds, or the two draws of an element."""
    n = 2**16
    second, param = draws(n, 0, 1, 0)
    for a in (second, param):
        for apart in (*range(1, 17), 64, 1024, 4096):
            assert correlated(a[apart:], a[:-apart]) < 5, apart
        for i in range(8):
            for j in range(i):
                assert correlated(a.view(-1, 8)[:, i], a.view(-1, 8)[:, j]) < 5, (i, j)
    for i in range(8):
        for j in range(8):
            assert correlated(second.view(-1, 8)[:, i], param.view(-1, 8)[:, j]) < 5, (i, j)
    for key in ((1, 1, 0), (0, 2, 0), (0, 1, 1)):
        for other in draws(n, *key):
            for apart in range(9):
                assert correlated(second[apart:], other[: n - apart]) < 5, (key, apart)
                assert correlated(param[apart:], other[: n - apart]) < 5, (key, apart)


def test_random_bits_of_an_element_over_the_steps() -> None:
    steps = 2**11
    for line in zip(*(draws(64, 5, step, 3) for step in range(steps)), strict=True):
        x = torch.stack(line)  # [steps, 64]
        assert abs(x.double().mean().item() / 2**16 - 0.5) < 5 / math.sqrt(12 * x.numel())
        for apart in (1, 2, 3, 10, 1000):
            assert correlated(x[apart:], x[:-apart]) < 5, apart


@each("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_widened_numbers_are_the_same(device: torch.device, dtype: torch.dtype) -> None:
    if not nvidia.is_nvidia(device):
        pytest.skip("NVIDIA's instructions")
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = in_blocks(_widen, [x.to(device)], [(torch.float32, 1)]).cpu()
    nan = x.isnan()
    same_bits(x.float()[~nan], got[~nan])
    assert got[nan].isnan().all()
    if dtype == torch.bfloat16:  # they keep their bits
        same_bits(floats(x.view(torch.int16).long() << 16), got)


@each("signed", [True, False], ids=["signed", "unsigned"])
def test_all_codes_of_all_exponents(device: torch.device, signed: bool) -> None:
    """Each code decodes to a value of its own, in order, and is encoded as itself again."""
    code = torch.arange(256, dtype=torch.uint8)
    decode = formats.decode_signed if signed else formats.decode_unsigned
    for exponent in (1, 2, 20, 127, 200, 253):
        e = torch.full((4,), exponent, dtype=torch.uint8)
        x = decode(code, e)
        magnitudes = x[: 128 if signed else 256]
        assert magnitudes[0] == 0
        assert (magnitudes.diff() > 0).all()
        assert not signed or torch.equal(x[128:], -magnitudes)
        assert magnitudes[-1] < 2.0 ** (exponent - 126)
        wide, e = padded(code), torch.cat([e, e.new_full((12,), exponent)])
        inputs, constants = [wide.to(device), e.to(device)], (signed, nvidia.is_nvidia(device))
        twin = in_blocks(_decode, inputs, [(torch.float32, 1)], *constants)
        same_bits(decode(wide, e), twin)
        # blocks of 64 that hold their largest code: the exponent comes back, and so do the codes
        top = torch.full((256,), 127 if signed else 255, dtype=torch.uint8)
        blocks = torch.stack([code, top], 1).flatten()
        x = decode(blocks, torch.full((8,), exponent, dtype=torch.uint8))
        middle = torch.full((512,), 2**31)
        again = formats.encode_signed(x) if signed else formats.encode_unsigned(x, middle)
        keep = slice(None) if exponent > 20 else slice(64, None)  # subnormals have fewer bits
        assert torch.equal(again[0][keep], blocks[keep])
        assert (again[1] == exponent).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of signalling NaN
@each("signed", [True, False], ids=["signed", "unsigned"])
@each("kind", ["awkward", "alike"])
def test_encode_twins(device: torch.device, signed: bool, kind: str) -> None:
    x = awkward() if kind == "awkward" else torch.randn(8 * N) * 10.0 ** -torch.rand(8 * N)
    x = padded(x if signed else x.abs()).to(device)
    random = torch.randint(0, 2**32, x.shape, device=device)
    own = formats.encode_signed(x) if signed else formats.encode_unsigned(x, random)
    outputs, constants = [(torch.uint8, 1), (torch.uint8, 64)], (signed, nvidia.is_nvidia(device))
    twins = in_blocks(_encode, [x, random], outputs, *constants)
    for a, b in zip(own, twins, strict=True):
        same_bits(a, b)


def test_signed_is_nearest() -> None:
    """No other code of the block decodes to a value that is nearer."""
    x = torch.randn(64 * 64) * 10.0 ** (-3 * torch.rand(64 * 64))
    code, exponent = formats.encode_signed(x)
    got = formats.decode_signed(code, exponent)
    every = torch.arange(256, dtype=torch.uint8)
    for block in range(64):
        e = exponent[block].repeat(4)
        values = formats.decode_signed(every, e)
        part = slice(64 * block, 64 * block + 64)
        best = (x[part, None] - values).abs().amin(1)
        # halfway is told in the bits of y + floor, which are rounded once
        assert ((x[part] - got[part]).abs() <= best * (1 + 1e-6) + 1e-12).all()


def test_unsigned_is_unbiased_down_to_its_least_code() -> None:
    n = 2**14
    values = torch.tensor([2.0, 1.9370117, 1.0, 0.7, 3.3e-2, 1e-3, 1.3e-4, 1.5e-5])
    x = values[:, None].expand(8, n).T.contiguous()
    block = torch.cat([x, x.new_full((n, 56), 0.5)], 1).flatten()
    random, _ = formats.random_bits(torch.arange(len(block)), 1, 2)
    code, exponent = formats.encode_unsigned(block, random)
    got = formats.decode_unsigned(code, exponent).view(n, 64)[:, :8].double()
    for i, value in enumerate(values.tolist()):
        down, up = got[:, i].min().item(), got[:, i].max().item()
        assert down <= value <= up
        sigma = (up - down) / 2 / math.sqrt(n)
        assert abs(got[:, i].mean().item() - value) <= 5 * sigma, value


@each("ratio", [1.0, 1e-3, 1e-6, 1e-10, 1e-30])
@each("largest", [1e30, 1.0, 1e-10, 1e-36, 1e-44])
def test_second_moments_never_become_zero(ratio: float, largest: float) -> None:
    x = torch.full((64,), largest * ratio)
    x[3] = largest
    x[5] = 0
    for r in (0, 2**32 - 1):
        code, exponent = formats.encode_unsigned(x, torch.full((64,), r))
        got = formats.decode_unsigned(code, exponent)
        assert ((got > 0) == (x > 0)).all()


def test_blocks_that_are_not_whole() -> None:
    for n in (0, 1, 63, 64, 65, 130):
        x = torch.randn(n)
        code, exponent = formats.encode_signed(x)
        assert (len(code), len(exponent)) == (n, -(-n // t.QUANT_BLOCK))
        got = formats.decode_signed(code, exponent)
        torch.testing.assert_close(got, x, rtol=0.05, atol=0.05)


def test_nothing_but_numbers_comes_of_a_block_with_nan() -> None:
    """A NaN's weight is NaN at once; its neighbours' moments stay numbers."""
    x = torch.rand(128)
    x[5], x[70] = torch.nan, torch.inf
    for code, exponent, decode in (
        (*formats.encode_signed(x), formats.decode_signed),
        (*formats.encode_unsigned(x, torch.zeros(128, dtype=torch.int64)), formats.decode_unsigned),
    ):
        assert (exponent == 253).all()
        assert decode(code, exponent).isfinite().all()


@each("largest", [1.86, 1.9, 1.9375, 1.97, 1.9999])
def test_the_largest_of_a_block_is_not_cut_off(largest: float) -> None:
    """Rounded up it would leave the codes, if the exponent did not make room."""
    n = 2**14
    x = torch.full((n, 64), largest * 0.4)
    x[:, 7] = largest
    code, exponent = formats.encode_signed(x.flatten())
    got = formats.decode_signed(code, exponent).view(n, 64)[0, 7].item()
    assert abs(got - largest) <= 2.0**-5, "half a code, of the widest"
    random, _ = formats.random_bits(torch.arange(64 * n), 3, 4)
    code, exponent = formats.encode_unsigned(x.flatten(), random)
    mean = formats.decode_unsigned(code, exponent).view(n, 64)[:, 7].double().mean().item()
    assert abs(mean - largest) <= 5 * 2.0**-4 / 2 / math.sqrt(n)
