"""What a step costs on paper: bytes and instructions by format, and launches by case.

    python bench/floors.py      # prints the tables, and writes them into bench/README.md

Nothing here is measured. torch's launches follow from its sources: `multi_tensor_apply` cuts
tensors into chunks, and a launch ends when it is full of tensors or of chunks.
"""

from __future__ import annotations

import functools
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from blocks import rewrite, table
from cases import CASES, Case, count_bytes

from fused_adamw.kernels.table import QUANT_BLOCK

README = Path(__file__).parent / "README.md"
# A copy moves 4.3 TB/s on an H200, read and written; its 132 multiprocessors start instructions of
# 128 threads in each of 1.98e9 cycles a second: 7.8 a byte.
BYTES_PER_US = 4.3e6
INSTRUCTIONS_PER_BYTE = round(132 * 128 * 1980 / BYTES_PER_US, 1)


class Format(NamedTuple):
    """Bytes that an element takes in each of the streams of a step."""

    name: str
    param: int
    grad: int
    moment: float  # each of the two
    remainder: int = 0  # what the rounding of the parameter lost

    @property
    def moved(self) -> float:
        """Bytes read and written for one element: all but the gradient twice."""
        return 2 * (self.param + self.remainder + 2 * self.moment) + self.grad


# with the scales of the blocks: both moments' scales, read and written, are 0.1 B an element
EIGHT_BITS = 1 + 1 / QUANT_BLOCK  # and an exponent a block
FORMATS = (
    Format("fp32", 4, 4, 4),
    Format("bf16 params and gradients, fp32 moments", 2, 2, 4),
    Format("bf16", 2, 2, 2),
    Format("bf16 + 16-bit remainder, fp32 moments", 2, 2, 4, remainder=2),
    Format("bf16 + 16-bit remainder, 8-bit moments", 2, 2, EIGHT_BITS, remainder=2),
    Format("bf16, 8-bit moments", 2, 2, EIGHT_BITS),
)


class Limits(NamedTuple):
    """What one launch of torch's takes at most."""

    tensors_of_1_list: int  # the steps' += 1; the norm of each gradient; gradients times a factor
    tensors_of_4_lists: int  # the update: params, gradients and two moments
    chunks: int
    norms: int  # of tensors whose chunks' norms are put together


# aten/src/ATen/native/cuda/MultiTensorApply.cuh and ForeachReduceOp.cu of torch 2.13.0: kernel
# arguments of 32 KB in builds for CUDA 13 (pytorch#178641), else of 4 KB
LARGE = Limits(770, 252, 2240, norms=3200)
SMALL = Limits(110, 36, 320, norms=400)
CHUNK = 65536  # elements
OURS, OURS_WITH_CLIPPING = 2, 3  # schedule and update; the norm before them


def applied(numels: Iterable[int], tensors: int, chunks: int) -> int:
    """Launches of `multi_tensor_apply` over tensors of these sizes, in this order."""
    done = in_launch = taken = 0
    for numel in numels:
        left = -(-numel // CHUNK)
        in_launch += left > 0
        while left:
            part = min(left, chunks - taken)
            taken, left = taken + part, left - part
            if taken == chunks or in_launch == tensors:
                done, taken = done + 1, 0
                in_launch = int(left > 0)  # a tensor that is cut goes on in the next launch
    return done + (taken > 0)


def torch_launches(case: Case, limits: Limits) -> tuple[int, int]:
    """Launches of torch's fused AdamW: of the update, and of the steps' += 1.

    Each group's tensors are taken by dtype.
    """
    update = steps = 0
    for group in case.groups:
        for numels in _by_dtype((leaf.dtype, leaf.numel) for leaf in group.leaves).values():
            update += applied(numels, limits.tensors_of_4_lists, limits.chunks)
            steps += applied([1] * len(numels), limits.tensors_of_1_list, limits.chunks)
    return update, steps


def clip_launches(case: Case, limits: Limits) -> int:
    """Launches of torch's `clip_grad_norm_`, at least: the tensors' norms, then the multiplication.

    What lies between, one norm of many and the factor, is a handful and not counted. The factor
    has the dtype that all gradients promote to; gradients of another one are multiplied one by one.
    """
    by_dtype = _by_dtype((leaf.dtype, leaf.numel) for leaf in case.leaves)
    of_factor = functools.reduce(torch.promote_types, by_dtype)
    launches = 0
    for dtype, numels in by_dtype.items():
        whole = applied(numels, limits.tensors_of_1_list, limits.chunks)
        launches += whole + math.ceil(len(numels) / limits.norms)
        launches += whole if dtype == of_factor else sum(numel > 0 for numel in numels)
    return launches


def _by_dtype(sizes: Iterable[tuple[torch.dtype, int]]) -> dict[torch.dtype, list[int]]:
    found: defaultdict[torch.dtype, list[int]] = defaultdict(list)
    for dtype, numel in sizes:
        found[dtype].append(numel)
    return found


def tabulate_formats() -> str:
    """Bytes, time and instructions by format."""
    columns = ["format", "bytes a parameter", "with clipping", "ms for 1e9", "instructions"]
    rows = []
    for form in FORMATS:
        shown = f"{form.moved:.1f}".removesuffix(".0")
        rows.append(
            [
                form.name,
                shown,
                f"{form.moved + form.grad:.1f}".removesuffix(".0"),
                f"{1e6 * form.moved / BYTES_PER_US:.1f}",
                f"{INSTRUCTIONS_PER_BYTE * form.moved:.0f}",
            ]
        )
    return table(columns, rows)


def tabulate_launches() -> str:
    """Floor and launches of every case."""
    columns = ["case", "tensors", "groups", "elements", "floor µs", "ours"]
    columns += ["torch, new", "torch, old", "ours, clipping"]
    columns += ["torch, clipping, new", "torch, clipping, old"]
    rows = []
    for case in CASES.values():
        counts = [torch_launches(case, limits) for limits in (LARGE, SMALL)]
        clips = [clip_launches(case, limits) for limits in (LARGE, SMALL)]
        microseconds = count_bytes(case) / BYTES_PER_US
        rows.append(
            [
                case.name,
                f"{case.tensors:,}",
                f"{len(case.groups):,}",
                f"{case.numel:,}",
                f"{microseconds:,.0f}" if microseconds >= 100 else f"{microseconds:.1f}",
                str(OURS),
                *(f"{update:,} + {steps:,}" for update, steps in counts),
                str(OURS_WITH_CLIPPING),
                *(f"{sum(count) + clip:,}" for count, clip in zip(counts, clips, strict=True)),
            ]
        )
    return table(columns, rows)


def main() -> int:
    """Print the tables, and write them where they belong."""
    blocks = {"formats": tabulate_formats(), "launches": tabulate_launches()}
    print("\n\n".join(blocks.values()))
    print(f"\n{README}: {'rewritten' if rewrite(README, blocks) else 'as it was'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
