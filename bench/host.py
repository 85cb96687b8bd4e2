"""What a step costs on the host when nothing has moved, beside what torch's AdamW spends there.

The launches are stubbed on our side and left out on torch's. Two parts of ours are compared with
torch's `_init_group` and `_group_tensors_by_device_and_dtype`: validation (the objects, addresses
and dtypes of params and states, addresses and dtypes of gradients, layouts of params and gradients,
all against the last step's), and the whole step with its version counters and hooks. Rounds are
interleaved in one run and compared as ratios: on a shared CPU machine the microseconds themselves
are noise.

    python bench/host.py
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fused_adamw import FusedAdamW, optimizer


class StubbedLauncher:
    """A launcher that launches nothing."""

    def __init__(self, device: torch.device) -> None:
        self.captured: list[Any] = []

    def prepare(self, *args: object, **kwargs: object) -> None:
        """Do nothing."""

    def upload(self, *args: object) -> None:
        """Do nothing."""

    def launch(self, *args: object) -> None:
        """Do nothing."""


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def params(count: int) -> list[torch.nn.Parameter]:
    """Small parameters with gradients: the host's cost does not depend on their size."""
    made = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(count)]
    for p in made:
        p.grad = torch.randn(8, 8)
    return made


def validation(adamw: FusedAdamW) -> Callable[[], None]:
    """That all is as it was in the last step."""

    def run() -> None:
        before = adamw._plan
        now, _ = adamw._current_plan()
        assert now is before

    return run


def torchs_host_part(adamw: torch.optim.AdamW) -> Callable[[], None]:
    """The part of torch's step that comes before its launches."""

    def run() -> None:
        for group in adamw.param_groups:
            lists: list[list[torch.Tensor]] = [[] for _ in range(6)]
            adamw._init_group(group, *lists)  # type: ignore[no-untyped-call]
            adamw._group_tensors_by_device_and_dtype(lists)  # type: ignore[arg-type]

    return run


def main() -> None:
    """Print one line for each number of tensors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, nargs="+", default=[1, 100, 1000, 10000])
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds (default 31)")
    options = parser.parse_args()

    console = Console()
    console.print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}; median of {options.rounds} interleaved rounds"
    )
    columns = "us: tensors", "validation", "step", "torch (t.)", "validation / t.", "step / t."
    table = Table(*columns, box=None)
    with mock.patch.object(optimizer, "Launcher", StubbedLauncher):
        for count in options.tensors:
            ours = FusedAdamW(params(count), backend="triton")
            theirs = torch.optim.AdamW(params(count), foreach=True)
            ours.step()
            theirs.step()
            parts = validation(ours), ours.step, torchs_host_part(theirs)
            rounds = [
                [seconds(part) for part in parts]
                for _ in track(
                    range(options.rounds), f"{count} tensors", console=console, transient=True
                )
            ]
            medians = [statistics.median(times) * 1e6 for times in zip(*rounds, strict=True)]
            ratios = [statistics.median(r[i] / r[2] for r in rounds) for i in (0, 1)]
            table.add_row(
                f"{count:,}", *(f"{m:.0f}" for m in medians), *(f"{r:.2f}" for r in ratios)
            )
    console.print(table)


if __name__ == "__main__":
    main()
