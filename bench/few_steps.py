"""A few steps over all dtypes, sizes and alignments: what compute-sanitizer and ncu look at.

compute-sanitizer --tool memcheck python bench/few_steps.py
ncu --kernel-name regex:_adamw python bench/few_steps.py --numel 16777216
"""

from __future__ import annotations

import argparse
import sys

import torch

from fused_adamw import FusedAdamW

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def main() -> int:
    """Exit with 1 if a parameter is not finite after the steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=70_000, help="largest tensor (default 70,000)")
    numel: int = parser.parse_args().numel
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (1, 7, 1025, numel)  # one element, less than a vector, a block and one, many blocks
    tensors = [torch.randn(n, device=device).to(dtype) for dtype in DTYPES for n in sizes]
    tensors.append(torch.randn(5001, device=device)[1:])  # not aligned to 16 bytes
    params = [torch.nn.Parameter(x) for x in tensors]
    optimizer = FusedAdamW(params, amsgrad=True)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    finite = all(bool(p.isfinite().all()) for p in params)
    print(f"{device}: {len(params)} tensors, 3 steps, finite: {finite}")
    return 0 if finite else 1


if __name__ == "__main__":
    sys.exit(main())
