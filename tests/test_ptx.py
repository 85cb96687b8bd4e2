"""The kernels as compiled for a GPU (ptx.py), and that this tells a fault when it sees one.

    pytest --ptx sm_90 tests/test_adamw.py tests/test_storage.py ...

runs all tests of these files that way; .ci/run does. Here some of them do, in a process of their
own, as Triton is imported either to interpret or to compile.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


def run_copy(stride: int, numel: int = 32, programs: int = 1) -> torch.Tensor:
    """32 threads: the first 20 copy a number each, the others write their own."""
    source = torch.arange(100, 132, dtype=torch.int32)
    target = torch.zeros(numel, dtype=torch.int32)
    regions = [ptx.region(x.data_ptr(), x.nbytes) for x in (source, target)]
    code = ptx.parse(COPY.replace("STRIDE", str(stride)))
    arguments = {"source": source.data_ptr(), "target": target.data_ptr()}
    ptx.Machine(regions, lambda: ()).launch(code, arguments, programs, threads=32, shared=0)
    return target


def test_threads_that_part_meet_again() -> None:
    assert run_copy(4).tolist() == [*range(100, 120), *range(20, 32)]


def test_accesses_outside_of_tensors_and_across_words_are_errors() -> None:
    with pytest.raises(IndexError, match="in no tensor"):
        run_copy(4, numel=31)
    with pytest.raises(ValueError, match="not a multiple of 4"):
        run_copy(2)


def test_programs_that_write_to_the_same_place_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="another one reads or writes"):
        run_copy(4, programs=2)


WAIT = "griddepcontrol.wait;"


@pytest.mark.parametrize(("source", "target"), [(1, 2), (2, 1), (2, 0)], ids=["raw", "waw", "war"])
def test_what_the_launch_before_touches_has_to_be_waited_for(source: int, target: int) -> None:
    """The first launch copies from 0 to 1; of the second some threads begin before they wait."""
    memory = [torch.arange(32, dtype=torch.int32) + 32 * i for i in range(3)]
    regions = [ptx.region(x.data_ptr(), x.nbytes) for x in memory]
    text = COPY.replace("STRIDE", "4")
    arguments = {"source": memory[0].data_ptr(), "target": memory[1].data_ptr()}
    first = ptx.Machine(regions, lambda: ())
    first.launch(ptx.parse(text), arguments, 1, threads=32, shared=0)
    arguments = {"source": memory[source].data_ptr(), "target": memory[target].data_ptr()}
    whole = text.replace("mov.u32 %r1", f"{WAIT} mov.u32 %r1")
    part = text.replace("ld.global.b32", f"{WAIT} ld.global.b32")  # the last 12 do not
    second = ptx.Machine(regions, lambda: (), first)
    second.launch(ptx.parse(whole), arguments, 1, threads=32, shared=0)
    for unready in (text, part) if target == 1 else (text,):
        with pytest.raises(RuntimeError, match="has not waited for the kernel before"):
            second.launch(ptx.parse(unready), arguments, 1, threads=32, shared=0)


def test_fma_rounds_once() -> None:
    """The sum lies next to the middle of two float32, by less than float64 can tell."""
    factor = np.full(3, 1 + 2.0**-12, np.float32)  # its square is 1 + 2^-11 + 2^-24, a tie
    c = np.array([2.0**-80, -(2.0**-80), 0], np.float32)
    got = ptx.fma32(factor, factor, c).view(np.uint32)
    assert got.tolist() == [0x3F801001, 0x3F801000, 0x3F801000]
    tiny, large = np.array([1e-30], np.float32), np.array([1e30], np.float32)
    assert ptx.fma32(tiny, tiny, tiny) == tiny
    with np.errstate(over="ignore"):
        assert ptx.fma32(large, large, -large) == np.inf


def test_rounding_to_bfloat16_is_torchs_and_from_float64_happens_once() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32)
    x = bits.view(torch.float32)
    x = x[~x.isnan()]
    ours = torch.from_numpy(ptx.to_bf16(x.numpy()).view(np.int16))
    assert torch.equal(ours, x.bfloat16().view(torch.int16))
    tie = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32).astype(np.float64)
    for times, want in ((1 - 2.0**-40, [0x3F80, 0x3F81]), (1 + 2.0**-40, [0x3F81, 0x3F82])):
        assert ptx.to_bf16(ptx.to_odd32(tie * times)).tolist() == want


def test_what_is_not_known_is_refused() -> None:
    for old, new in (
        ("mul.wide.u32", "mul.hi.u32"),
        ("add.s64 %rd4", "add.sat.s64 %rd4"),
        ("ld.global.b32", "ld.local.b32"),
    ):
        with pytest.raises(NotImplementedError):
            ptx.parse(COPY.replace(old, new))
    with pytest.raises(AssertionError, match="nothing writes"):
        ptx.parse(COPY.replace("mov.u32 %r1,", "mov.u32 %r8,"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the tests itself")
def test_kernels_as_compiled() -> None:
    """Bits and errors as under the interpreter: all dtypes, then all formats."""
    pytest.importorskip("triton.backends.nvidia")
    env = {key: x for key, x in os.environ.items() if key != "PYTEST_ADDOPTS"}
    chosen = "(all_dtypes_at_once and default) or all_formats_in_one or encode_twins"
    chosen += " or decode or widened or all_codes"
    files = [str(TESTS / f"test_{name}.py") for name in ("adamw", "storage", "formats")]
    command = [sys.executable, "-m", "pytest", "--ptx", "sm_90", "-q", "-p", "no:xdist"]
    run = subprocess.run(
        [*command, "-k", chosen, *files],
        env=env,
        cwd=TESTS,  # -m puts it on the path, and the repository's root holds `kernels`
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    assert "skipped" not in run.stdout
    launches = re.search(r"launches of sm_90: (\d+)", run.stdout)
    assert launches is not None
    assert int(launches[1]) >= 8
