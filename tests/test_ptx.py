"""The kernels as compiled for a GPU (ptx.py), and that this tells a fault when it sees one.

    FUSED_ADAMW_PTX=sm_90 pytest tests/test_adamw.py tests/test_storage.py ...

runs all tests of these files that way; .ci/run does. Here some of them do, in a process of their
own, as Triton is imported either to interpret or to compile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import ptx
import pytest
import torch

TESTS = Path(__file__).parent
COPY = """
.visible .entry copy(
    .param .u64 .ptr .global .align 1 source,
    .param .u64 .ptr .global .align 1 target
)
.reqntid 32
{
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [source];
    ld.param.b64 %rd2, [target];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd3, %r1, STRIDE;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    { .reg .pred low; setp.lt.u32 low, %r1, 20;
      @!low bra $L__high; }
    ld.global.b32 { %r2 }, [ %rd4 + 0 ];
    st.global.b32 [ %rd5 + 0 ], { %r2 };
    bra.uni $L__end;
$L__high:
    st.global.b32 [ %rd5 + 0 ], { %r1 };
$L__end:
    ret;
}
"""


def run_copy(stride: int, numel: int = 32) -> torch.Tensor:
    """32 threads: the first 20 copy a number each, the others write their own."""
    source, target = (
        torch.arange(100, 132, dtype=torch.int32),
        torch.zeros(numel, dtype=torch.int32),
    )
    regions = [ptx.region(x.data_ptr(), x.nbytes) for x in (source, target)]
    code = ptx.parse(COPY.replace("STRIDE", str(stride)))
    arguments = {"source": source.data_ptr(), "target": target.data_ptr()}
    ptx.Machine(regions, lambda: ()).launch(code, arguments, programs=1, threads=32, shared=0)
    return target


def test_threads_that_part_meet_again() -> None:
    assert run_copy(4).tolist() == [*range(100, 120), *range(20, 32)]


def test_accesses_outside_of_tensors_and_across_words_are_errors() -> None:
    with pytest.raises(IndexError, match="in no tensor"):
        run_copy(4, numel=31)
    with pytest.raises(ValueError, match="not a multiple of 4"):
        run_copy(2)


def test_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0x30000000, 0x4F000000, (3, 5000)).astype(np.uint32)
    bits ^= rng.integers(0, 2, bits.shape).astype(np.uint32) << 31
    a, b, c = bits.view(np.float32)
    c[:2500] = -(a * b)[:2500] * rng.choice([1, 1 + 2.0**-20], 2500)  # most cancels
    for got, *factors in zip(ptx.fma32(a, b, c), a, b, c, strict=True):
        x, y, z = (Fraction(float(f)) for f in factors)
        want = x * y + z
        below, above = (np.nextafter(got, np.float32(x)) for x in (-np.inf, np.inf))
        error = abs(Fraction(float(got)) - want)
        assert error <= min(abs(Fraction(float(other)) - want) for other in (below, above))


def test_rounding_to_bfloat16_is_torchs() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32)
    x = bits.view(torch.float32)
    x = x[~x.isnan()]
    ours = torch.from_numpy(ptx.to_bf16(x.numpy()).view(np.int16))
    assert torch.equal(ours, x.bfloat16().view(torch.int16))
    between = x.double() * (1 + 2.0**-40)  # two float32
    between = between[between.abs() < torch.finfo(torch.float32).max]
    once = ptx.to_bf16(ptx.to_odd32(between.numpy())).view(np.int16)
    error = (torch.from_numpy(once).view(torch.bfloat16) - between).abs()
    assert (error <= (between.float().bfloat16() - between).abs()).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the tests itself")
def test_kernels_as_compiled() -> None:
    """Bits and errors as under the interpreter: all dtypes, then all formats."""
    pytest.importorskip("triton.backends.nvidia")
    env = {**os.environ, "FUSED_ADAMW_PTX": "sm_90"}
    env.pop("TRITON_INTERPRET", None)
    chosen = "(all_dtypes_at_once and default) or all_formats_in_one or encode_twins"
    files = [str(TESTS / f"test_{name}.py") for name in ("adamw", "storage", "formats")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", chosen, *files]
    # from there, as -m puts the folder on the path, and the repository's root holds `kernels`
    run = subprocess.run(command, env=env, cwd=TESTS, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:]
