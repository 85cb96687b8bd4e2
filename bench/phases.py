"""Where the host's time of a step goes, in the conditions of bench/step.py.

    python bench/phases.py                          # some cases; without a GPU tiny ones
    python bench/phases.py --cases vit-b --rounds 50

For each case and provider a line: wall and host time of a step as step.py has them, and what of the
host's the parts of ours take, those that contain others first. To be told apart they are wrapped,
which adds less than 1 us to each. Medians of the rounds, in us.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from cases import CASES, TINY_CASES, make
from machine import Device, describe, positive
from providers import CLIP, FUSED, OURS, PROVIDERS, entering
from rich.console import Console
from timing import Entrant, Gradients, Line

from fused_adamw import FusedAdamW, launch, optimizer, plan

# in the order of a step
PARTS: tuple[tuple[Any, str], ...] = (
    (FusedAdamW, "_update"),
    (FusedAdamW, "_asked"),
    (FusedAdamW, "_members"),
    (optimizer, "local_grads"),
    (FusedAdamW, "_current_plan"),
    (plan, "look"),
    (plan, "follow"),
    (FusedAdamW, "_prepare"),
    (launch.Launcher, "upload"),
    (launch.Launcher, "sum_squares"),
    (launch.Launcher, "launch"),
    (plan, "written_by"),
    (torch.autograd.graph, "increment_version"),
)


@contextlib.contextmanager
def measured(into: dict[str, float]) -> Iterator[None]:
    """Within it each part adds what it takes, in us."""

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                into[name] = into.get(name, 0.0) + 1e6 * (time.perf_counter() - start)

        return run

    with contextlib.ExitStack() as stack:
        for place, name in PARTS:
            patch = mock.patch.object(place, name, wrapped(name, getattr(place, name)))
            stack.enter_context(patch)
        yield


def time_phases(
    entrant: Entrant, device: Device, grads: Gradients, rounds: int
) -> dict[str, float]:
    """Medians of wall and host time, and of the parts that ran."""
    found: dict[str, list[float]] = {"wall": [], "host": []}
    parts: dict[str, float] = {}
    with measured(parts):
        for _ in range(rounds):
            entrant.prepare(grads)
            device.flush()
            device.synchronize()
            parts.clear()
            start = time.perf_counter()
            entrant.step()
            found["host"].append(1e6 * (time.perf_counter() - start))
            device.synchronize()
            found["wall"].append(1e6 * (time.perf_counter() - start))
            for name, took in parts.items():
                found.setdefault(name, []).append(took)
    order = ["wall", "host", *dict.fromkeys(name for _, name in PARTS)]
    return {name: statistics.median(found[name]) for name in order if name in found}


def main() -> None:
    """Print a line for each case and provider."""
    every = {**CASES, **TINY_CASES}
    device = Device()
    some = ["gpt2", "vit-b", "465-groups", "moe-10000", "10000x64"] if device.cuda else ["tiny"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=every, metavar="CASE", default=some)
    parser.add_argument("--rounds", type=positive, default=20, help="default: %(default)s")
    parser.add_argument("--commit", help="for a copy of the checkout, where git cannot tell")
    args = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    console.print(" | ".join(f"{key} {x}" for key, x in describe(device, args.commit).items()))
    names = [OURS, OURS + CLIP, FUSED, FUSED + CLIP]
    for case in (every[name] for name in dict.fromkeys(args.cases)):
        groups = make(case, device.device)
        params = [p for group in groups for p in group["params"]]
        grads = Gradients(case, params, device.device)
        for name, provider in entering({x: PROVIDERS[x] for x in names}, case.name, None).items():
            line = Line(case.name, name, case.tensors, case.numel, 0)
            entrant = Entrant(provider, groups, grads, device, line)
            gc.collect()
            parts = time_phases(entrant, device, grads, args.rounds)
            shown = ", ".join(f"{part} {took:,.0f}" for part, took in parts.items())
            console.print(f"{case.name}, {name}: {shown}")
            del entrant
        del groups, params, grads
        gc.collect()
        if device.cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
