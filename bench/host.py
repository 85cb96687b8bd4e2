"""What a step costs on the host, beside what torch's AdamW spends there.

    python bench/host.py

First when nothing has moved: the launches are stubbed on our side and left out on torch's. Two
parts of ours are compared with torch's `_init_group` and `_group_tensors_by_device_and_dtype`:
validation (the objects, addresses and dtypes of params and states, addresses and dtypes of
gradients, layouts of params and gradients, all against the last step's), and the whole step with
its version counters and hooks.

Then, where there is a GPU, whole steps beside torch's fused ones, from an idle GPU until step()
returns: with another learning rate in each, as schedulers give it, with gradients in new memory,
with both, with a fifth of the gradients missing; and each once more with cold caches, after 256 MB
have been written.

Rounds are interleaved in one run and compared as ratios: on a shared machine the microseconds
themselves are noise.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from machine import positive
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from timing import decay_lr

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


def params(count: int, device: torch.device | None = None) -> list[torch.nn.Parameter]:
    """Small parameters with gradients: the host's cost does not depend on their size."""
    made = [torch.nn.Parameter(torch.randn(8, 8, device=device)) for _ in range(count)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def validation(adamw: FusedAdamW) -> Callable[[], None]:
    """That all is as it was in the last step."""

    def run() -> None:
        before = adamw._plan
        now, _ = adamw._current_plan(adamw._members(), None, with_norm=False)
        assert now is before

    return run


def torchs_host_part(adamw: torch.optim.AdamW) -> Callable[[], None]:
    """The part of torch's step that comes before its launches."""
    wants_amsgrad = "amsgrad" in inspect.signature(adamw._init_group).parameters  # torch 2.6

    def run() -> None:
        for group in adamw.param_groups:
            lists: list[list[torch.Tensor]] = [[] for _ in range(6)]
            arguments: list[Any] = [*lists]
            if wants_amsgrad:
                arguments.insert(2, group["amsgrad"])
            adamw._init_group(group, *arguments)  # type: ignore[no-untyped-call]
            adamw._group_tensors_by_device_and_dtype(lists)  # type: ignore[arg-type]

    return run


def new_lr(optimizer: torch.optim.Optimizer) -> None:
    """As a scheduler does it."""
    decay_lr(optimizer.param_groups)


def new_gradients(optimizer: torch.optim.Optimizer) -> None:
    """All of them while the old ones are there: elsewhere in memory."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, grad in zip(params, [torch.randn_like(p) for p in params], strict=True):
        p.grad = grad


def idle_experts(optimizer: torch.optim.Optimizer) -> None:
    """A fifth of the gradients is missing, others in each step; of one to four none is."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for p in random.sample(group["params"], len(group["params"]) // 5):
            p.grad = None


CHANGES: dict[str, Sequence[Callable[[torch.optim.Optimizer], None]]] = {
    "nothing": (),
    "lr": (new_lr,),
    "gradients": (new_gradients,),
    "both": (new_lr, new_gradients),
    "idle experts": (idle_experts,),
}


def as_trained(count: int, rounds: int, device: torch.device, advance: Callable[[], None]) -> Table:
    """Host times of whole steps, ours and torch's fused ones, in two groups."""
    table = Table("new in each step", "caches", "ours", "torch fused", "ours / t.", box=None)
    optimizers: list[torch.optim.Optimizer] = []
    for make in FusedAdamW, lambda groups: torch.optim.AdamW(groups, fused=True):
        made = params(count, device)
        half = {"params": made[count // 2 :], "weight_decay": 0.0}
        groups: list[dict[str, Any]] = [{"params": made[: count // 2]}, half]
        groups = groups if count > 1 else [half]
        optimizers.append(make(groups))
    cache = torch.zeros(2**26)
    for what, cold in itertools.product(CHANGES, (False, True)):
        times = []
        for number in range(3 + rounds):
            row = []
            for entrant in optimizers:
                for change in CHANGES[what]:
                    change(entrant)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if cold:
                    cache.add_(1)
                row.append(seconds(entrant.step))
            if number >= 3:
                times.append(row)
        ours, theirs = (statistics.median(x) * 1e6 for x in zip(*times, strict=True))
        ratio = statistics.median(a / b for a, b in times)
        cells = f"{ours:.0f}", f"{theirs:.0f}", f"{ratio:.2f}"
        table.add_row(what, "cold" if cold else "warm", *cells)
        advance()
    return table


def main() -> None:
    """Print one line for each number of tensors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=positive, nargs="+", default=[1, 100, 1000, 10000])
    parser.add_argument(
        "--rounds", type=positive, default=31, help="interleaved rounds (default 31)"
    )
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
    if torch.cuda.is_available():
        for count in options.tensors:
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task(f"{count} tensors", total=2 * len(CHANGES))
                trained = as_trained(
                    count,
                    options.rounds,
                    torch.device("cuda"),
                    functools.partial(progress.advance, task),
                )
            name = torch.cuda.get_device_name()
            console.print(f"\nus on the host, {count:,} tensors on {name}")
            console.print(trained)


if __name__ == "__main__":
    main()
