"""NVIDIA's instructions that Triton has no word for, or that LLVM does not find, as inline PTX.

Elsewhere (AMD, Intel, the interpreter) a constexpr leaves them out, and what Triton has stands in.
Prefetches are in prefetch.py. Instructions, their meaning and their names: PTX ISA,
https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


def is_nvidia(device: torch.device) -> bool:
    """Whether kernels for the device may hold PTX."""
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def graphs_overlap() -> bool:
    """Whether the driver lets kernels of a CUDA graph begin beside the one before: CUDA 12.3."""
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return version == 0 or version >= 12030  # 0: there is none, and who compiles needs none


@triton.jit
def _reciprocal(x):
    """1 / x, 1 ULP off at most; infinite if x is subnormal, and 0 if it is above 2^126."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _widen(x):
    """Float32 from bfloat16: each of a pair by one instruction, from the register it came in.

    LLVM parts a pair first, by one instruction more. It does so right behind the load, and with it
    a program would wait there for its elements before it has asked for those of later ones.
    """
    return tl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
        "=f,=f,r",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _and_or(x, y, z):
    """(x & y) | z of int32: ptxas takes two."""
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


# Programmatic dependent launch, from sm_90 on: the next kernel's programs may begin while those of
# this one run, if it is launched so (launch_pdl). What they need of this one they have to wait for.


@triton.jit
def _let_next_begin():
    """Allow the next kernel's programs to begin, once all of this one's have been here."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.u32 $0, 0;",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _wait_for_previous():
    """Wait until the kernel before has ended, and what it wrote can be read."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
