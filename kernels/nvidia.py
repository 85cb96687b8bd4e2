"""What only NVIDIA has: instructions, as inline PTX, and launches that overlap.

Elsewhere (AMD, Intel, the interpreter) a constexpr leaves them out, and what Triton has stands in.
Prefetches are in prefetch.py. Triton's own words for dependent launch are in its NVIDIA backend,
which builds for others lack. Instructions, their meaning and their names: PTX ISA,
https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys

import torch
import triton
import triton.language as tl

from .launch_parameters import LaunchParameters
from .table import UNSIGNED_MANTISSA

_CUT = tl.constexpr(
    "{ .reg .b32 low, high; prmt.b32 low, $1, $2, 0x7632; prmt.b32 high, $3, $4, 0x7632;"
    f" shr.u32 low, low, {7 - UNSIGNED_MANTISSA}; shr.u32 high, high, {7 - UNSIGNED_MANTISSA};"
    " prmt.b32 $0, low, high, 0x6420; }"
)


def is_nvidia(device: torch.device) -> bool:
    """Whether kernels for the device may hold PTX."""
    return device.type == "cuda" and torch.version.hip is None


def overlaps(parameters: LaunchParameters, device: torch.device) -> bool:
    """Whether the update's programs begin while the schedule runs, and wait for its scalars.

    Not with drivers before CUDA 12.3, whose graphs cannot hold that.
    """
    if not (parameters.overlap and is_nvidia(device)):
        return False
    return driver_version() >= 12030 or not torch.cuda.is_available()  # compiled for elsewhere


@functools.cache
def driver_version() -> int:
    """The CUDA version that the driver has, 12030 for 12.3; 0 where there is none to ask."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(version))
    return version.value


@triton.jit
def _reciprocal(x):
    """1 / x, 1 ULP off at most; infinite if x is subnormal, and 0 if it is above 2^126."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


# LLVM parts pairs and fours of narrow elements by itself, but likes to do so right behind the load:
# a program then waits for its elements before it has asked for those of later ones. So these take
# the register that they came in.


@triton.jit
def _widen(x):
    """Float32 from bfloat16 or float16, an instruction each: LLVM takes 1.5 for the former."""
    ASM: tl.constexpr = (
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        if x.dtype == tl.bfloat16
        else "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
        " cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
    )
    return tl.inline_asm_elementwise(ASM, "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def _signed_halves(x):
    """Int32 from int16, by an instruction each."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $2, 0, 0x9910; prmt.b32 $1, $2, 0, 0xbb32;",
        "=r,=r,r",
        [x],
        dtype=tl.int32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _bytes(x, SIGNED: tl.constexpr):
    """The same from uint8, or from the bits of int8 as uint8."""
    ASM: tl.constexpr = (
        "prmt.b32 $0, $4, 0, 0x8880; prmt.b32 $1, $4, 0, 0x9991;"
        " prmt.b32 $2, $4, 0, 0xaaa2; prmt.b32 $3, $4, 0, 0xbbb3;"
        if SIGNED
        else "prmt.b32 $0, $4, 0, 0x4440; prmt.b32 $1, $4, 0, 0x4441;"
        " prmt.b32 $2, $4, 0, 0x4442; prmt.b32 $3, $4, 0, 0x4443;"
    )
    return tl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,r", [x], dtype=tl.int32, is_pure=True, pack=4
    )


@triton.jit
def _and_or(x, y, z):
    """(x & y) | z of int32, in one instruction: ptxas takes two if two of them are constants."""
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xea;", "=r,r,r,r", [x, y, z], dtype=tl.int32, is_pure=True,
        pack=1,
    )  # fmt: skip


@triton.jit
def _top_bytes(x):
    """The upper 8 bits of each int32, as uint8: four by three instructions, not shifted first."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 low, high; prmt.b32 low, $1, $2, 0x0073; prmt.b32 high, $3, $4, 0x0073;"
        " prmt.b32 $0, low, high, 0x5410; }",
        "=r,r,r,r,r",
        [x],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _unsigned_codes(x):
    """The 8 bits of each int32 that are a code, as uint8: two are shifted at once, not each."""
    return tl.inline_asm_elementwise(_CUT, "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4)


# Programmatic dependent launch, from sm_90 on: the next kernel's programs may begin while those of
# this one run, if it is launched so (launch_pdl). What they need of this one they have to wait for.
# What was there before this one began needs no waiting: this is a launch like any other, behind all
# that came before, and so no cache has anything older.


@triton.jit
def _control_grid(ASM: tl.constexpr):
    """An instruction for what it does; Triton wants a value of it."""
    tl.inline_asm_elementwise(ASM, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _let_next_begin():
    """Allow the next kernel's programs to begin, once all of this one's have been here."""
    _control_grid("griddepcontrol.launch_dependents; mov.u32 $0, 0;")


@triton.jit
def _wait_for_previous():
    """Wait until the kernel before has ended, and what it wrote can be read."""
    _control_grid("griddepcontrol.wait; mov.u32 $0, 0;")
