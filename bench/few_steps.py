"""A few steps over all dtypes, sizes and alignments, or large ones of one format.

What compute-sanitizer and ncu look at:

    compute-sanitizer --tool memcheck python bench/few_steps.py
    ncu --kernel-name regex:_adamw python bench/few_steps.py --format bf16+master+int8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from providers import FORMATS
from torch import Tensor

from fused_adamw import FusedAdamW

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (1, 7, 1025, 70_000)  # one element, less than a vector, a block and one, many blocks
STORED: dict[str, tuple[torch.dtype, Mapping[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    **{f"bf16{name}": (torch.bfloat16, options) for name, (options, _) in FORMATS.items()},
}


def few_steps(tensors: Sequence[Tensor], options: Mapping[str, Any]) -> bool:
    """Three steps; whether all parameters are finite after them."""
    params = [torch.nn.Parameter(x) for x in tensors]
    optimizer = FusedAdamW(params, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return all(bool(p.isfinite().all()) for p in params)


def every_path(device: str) -> Iterator[tuple[str, list[Tensor], Mapping[str, Any]]]:
    """All dtypes in one launch, then each format with clipping and metrics."""
    unaligned = [torch.randn(5001, device=device)[1:]]
    every = [torch.randn(n, device=device).to(dtype) for dtype in DTYPES for n in SIZES]
    yield "all dtypes", every + unaligned, {"amsgrad": True}
    for name, (dtype, options) in STORED.items():
        tensors = [torch.randn(n, device=device).to(dtype) for n in (*SIZES, 5001)]
        tensors[-1] = tensors[-1][1:]
        yield name, tensors, {**options, "max_grad_norm": 1.0, "group_metrics": True}


def main() -> int:
    """Exit with 1 if a parameter is not finite after the steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", choices=STORED, help="only this, in 4 tensors of --numel")
    parser.add_argument("--numel", type=int, default=2**24, help="default: %(default)s")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = every_path(device)
    if args.format is not None:
        dtype, options = STORED[args.format]
        large = [torch.randn(args.numel, device=device).to(dtype) for _ in range(4)]
        runs = iter([(args.format, large, options)])
    failed = False
    for name, tensors, options in runs:
        finite = few_steps(tensors, options)
        print(f"{device}, {name}: {len(tensors)} tensors, 3 steps, finite: {finite}")
        failed |= not finite
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
