"""The CPU path beside torch.optim.AdamW on CPU tensors: time ratios of interleaved pairs.

CPU speed is not what this package is for; it must only never be a reason not to use it. torch's
`fused=True` kernel, in C++, is the faster one on CPUs, and shown for that reason.

    python bench/cpu.py
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch
from machine import positive
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fused_adamw import FusedAdamW


def params(numel: int, tensors: int) -> list[torch.nn.Parameter]:
    """`tensors` equal float32 parameters of `numel` elements in total, with gradients."""
    made = [torch.nn.Parameter(torch.randn(numel // tensors)) for _ in range(tensors)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def step_seconds(optimizer: torch.optim.Optimizer) -> float:
    """Wall time of one step."""
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Print one line for each number of tensors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=positive, default=20_000_000, help="elements (default 20M)")
    parser.add_argument("--tensors", type=positive, nargs="+", default=[1, 148])
    parser.add_argument("--pairs", type=positive, default=15, help="interleaved pairs (default 15)")
    options = parser.parse_args()

    console = Console()
    console.print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}; {options.numel:,} float32 "
        f"parameters; median of {options.pairs} interleaved pairs"
    )
    columns = "tensors", "ours ms", "torch ms", "torch fused ms", "torch/ours", "torch fused/ours"
    table = Table(*columns, box=None)
    for tensors in options.tensors:
        optimizers = [
            FusedAdamW(params(options.numel, tensors)),
            torch.optim.AdamW(params(options.numel, tensors)),
            torch.optim.AdamW(params(options.numel, tensors), fused=True),
        ]
        for optimizer in optimizers:
            optimizer.step()
        rounds = [
            [step_seconds(optimizer) for optimizer in optimizers]
            for _ in track(
                range(options.pairs), f"{tensors} tensors", console=console, transient=True
            )
        ]
        medians = [statistics.median(times) * 1e3 for times in zip(*rounds, strict=True)]
        ratios = [statistics.median(r[i] / r[0] for r in rounds) for i in (1, 2)]
        table.add_row(str(tensors), *(f"{m:.1f}" for m in medians), *(f"{r:.2f}" for r in ratios))
    console.print(table)


if __name__ == "__main__":
    main()
