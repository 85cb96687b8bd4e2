"""How far p, m and v are from float64 after 1 to 10,000 steps: FusedAdamW beside torch's AdamW.

    python bench/accuracy.py                # 40 s on one core
    python bench/accuracy.py --steps 100

Every optimizer starts from the same parameters and is given the same gradients, in the parameters'
dtype. So is an AdamW in float64, written from the papers alone (tests/truth.py), which never rounds
to that dtype: it is where the same inputs lead without rounding. Writes OUT/accuracy.json and .png.

    error   |value - float64's|, in ULPs: median, 99th percentile and largest of all elements
    ULP     distance of neighbours in the dtype that the format stores, at the larger of float64's
            value and the one before this step: where a sum cancels, m or p may end next to 0, and
            what was rounded had the size of what cancelled
    step    the error of this step alone, against a float64 step from the optimizer's own stored
            state (in the JSON): it tells many roundings, which add up, from inexact arithmetic

Formats: fp32; bf16; bf16 parameters with fp32 moments. torch has not the last one: its bf16 stands
there beside ours, its moments in ULPs of fp32.

On a GPU the kernel runs, and beside it the reference, which is the CPU path. On a CPU the reference
runs, and the kernel's arithmetic is *emulated* (bench/emulated.py), once with IEEE division and
square root, as under `exact`, and once with these as wrong as the hardware's may be. What torch's
kernels err by on a CPU says nothing of its GPU kernels.

Marks behind ours: `<` at or under the best of torch's three, `~` at or under one of them, `>` above
all. What is not `<` is listed again with what the figures tell of the cause. Always exits with 0.

Why torch's fp32 drifts: it multiplies p by 1 - lr * weight_decay and v by beta2 in float32, here
1.7e-8 and 1.3e-8 off, in every step in the same direction. bf16 drifts, whoever computes it: once
an update is less than half an ULP, p and v stand still.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from emulated import EmulatedKernel
from machine import Device, describe
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from summary import number
from torch import Tensor
from torch.nn import Parameter

from fused_adamw import FusedAdamW

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from truth import TrueAdamW, real64, ulp

OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
LOOKS = (1, 2, 10, 100, 1_000, 10_000)  # steps after which errors are taken
KEYS = {"m": "exp_avg", "v": "exp_avg_sq"}
# Over 16 seeds, ratios of two medians of 4,096 errors, of as many roundings, have a standard
# deviation of up to 2.5 %; of two largest errors up to 60 %.
CHANCE = 1.03
WORST = "emulated, worst"
TORCHS = {
    "torch loop": functools.partial(torch.optim.AdamW, foreach=False),
    "torch foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "torch fused": functools.partial(torch.optim.AdamW, fused=True),
}
OURS_ON_CPU: dict[str, Callable[..., Any]] = {
    "reference": functools.partial(FusedAdamW, backend="reference"),
    "emulated kernel": EmulatedKernel,
    WORST: functools.partial(EmulatedKernel, approximate=True),
}
OURS_ON_GPU: dict[str, Callable[..., Any]] = {
    "kernel": functools.partial(FusedAdamW, backend="triton"),
    "reference": functools.partial(FusedAdamW, backend="reference"),
}


class Format(NamedTuple):
    """What is stored."""

    name: str
    param: torch.dtype  # gradients', too
    moments: torch.dtype

    def dtype(self, of: str) -> torch.dtype:
        """Dtype of p, m or v."""
        return self.param if of == "p" else self.moments


FORMATS = (
    Format("fp32", torch.float32, torch.float32),
    Format("bf16", torch.bfloat16, torch.bfloat16),
    Format("bf16, fp32 moments", torch.bfloat16, torch.float32),
)


class Errors(NamedTuple):
    """Of all elements, in ULPs."""

    median: float
    p99: float
    max: float


@dataclass(frozen=True)
class Cell:
    """One of p, m and v of a format after some steps: errors by optimizer."""

    format: str
    steps: int
    of: str
    errors: dict[str, Errors]
    step_errors: dict[str, Errors]  # of the last step alone

    def at_or_under(self, name: str, statistic: str) -> list[str]:
        """Those of torch's optimizers whose error is as large or larger."""
        mine = getattr(self.errors[name], statistic)
        return [other for other in TORCHS if mine <= getattr(self.errors[other], statistic)]

    def mark(self, name: str, statistic: str) -> str:
        """`<`, `~` or `>`: not above any of torch's, above some, above all."""
        count = len(self.at_or_under(name, statistic))
        return "<" if count == len(TORCHS) else "~" if count else ">"

    def cause(self, name: str, statistic: str) -> str:
        """What the figures tell of an error that is above torch's best."""
        mine, best = getattr(self.errors[name], statistic), _best(self.errors, statistic)
        step, best_step = (
            getattr(self.step_errors[name], statistic),
            _best(self.step_errors, statistic),
        )
        if not math.isfinite(mine):
            return "not finite"
        if mine <= CHANCE * best:
            return f"{mine / best - 1:.1%} more: no more roundings, which fell otherwise"
        alone = f"this step alone errs by {short(step)}, torch's by {short(best_step)}"
        if step <= CHANCE * best_step:
            return f"{alone}: no less exact, but what storage rounds off adds up otherwise"
        if name == WORST and self.of == "p":
            return f"{alone}: quotient and square root as wrong as the hardware's may be"
        return f"{alone}: the arithmetic itself"


def _best(errors: dict[str, Errors], statistic: str) -> float:
    return min(float(getattr(errors[name], statistic)) for name in TORCHS)


def short(x: float) -> str:
    """Three digits, in 7 characters at most."""
    return f"{x:.0e}" if x >= 1e5 or not math.isfinite(x) else number(x)


def gradients(numel: int, seed: int) -> Iterator[Tensor]:
    """Gradients as training makes them: float32 [numel], without end.

    The size of an element's is log-normal around 1e-4, a decade either way (one sigma); it is
    noise five times as large as its mean; all of a step are louder or softer together (a factor of
    2, one sigma); and one element in 8 is of a rare embedding, 0 in nine steps of ten.
    """
    random = torch.Generator().manual_seed(seed)
    size = 1e-4 * 10 ** torch.randn(numel, generator=random)
    mean = 0.2 * torch.randn(numel, generator=random).sign()
    rare = torch.rand(numel, generator=random) < 1 / 8
    while True:
        loudness = 2 ** torch.randn(1, generator=random)
        grad = size * loudness * (mean + torch.randn(numel, generator=random))
        silent = rare & (torch.rand(numel, generator=random) < 0.9)
        yield grad.masked_fill_(silent, 0)


class Racer:
    """One optimizer, with a parameter for each format that it has."""

    def __init__(
        self,
        build: Callable[..., Any],
        formats: Sequence[Format],
        start: Tensor,
        device: torch.device,
    ) -> None:
        self.params = {f: Parameter(start.to(device, f.param, copy=True)) for f in formats}
        self.optimizer = build(list(self.params.values()), **OPTIONS)
        for f, p in self.params.items():
            if f.moments != f.param:
                zeros = (torch.zeros_like(p, dtype=f.moments) for _ in KEYS)
                step = torch.zeros((), device=device)
                self.optimizer.state[p] = {
                    "step": step,
                    **dict(zip(KEYS.values(), zeros, strict=True)),
                }

    def run_in(self, f: Format) -> Format:
        """The format itself, or the one with the same parameters that is run in its place."""
        return f if f in self.params else next(x for x in self.params if x.param == f.param)

    def values(self, f: Format) -> dict[str, Tensor]:
        """p, m and v in float64 on the CPU."""
        p = self.params[self.run_in(f)]
        state = self.optimizer.state.get(p, {})
        zeros = torch.zeros_like(p)
        return {"p": real64(p), **{of: real64(state.get(key, zeros)) for of, key in KEYS.items()}}

    def step(self, grads: dict[torch.dtype, Tensor]) -> None:
        """One step with the gradient of each dtype."""
        for f, p in self.params.items():
            p.grad = grads[f.param]
        self.optimizer.step()


def true_values(exact: TrueAdamW) -> dict[str, Tensor]:
    """p, m and v."""
    return {"p": exact.p, "m": exact.m, "v": exact.v}


def true_step(values: dict[str, Tensor], steps: int, grad: Tensor) -> dict[str, Tensor]:
    """p, m and v one float64 step later, from those after so many steps."""
    exact = TrueAdamW(values["p"], **OPTIONS)
    exact.m, exact.v, exact.t = values["m"], values["v"], steps
    exact.step(grad)
    return true_values(exact)


def summarize(value: Tensor, exact: Tensor, before: Tensor, dtype: torch.dtype) -> Errors:
    """Errors of float64 tensors in ULPs of the dtype; NaN where one of them is."""
    errors = (value - exact).abs() / ulp(torch.maximum(exact.abs(), before.abs()), dtype)
    return Errors(float(errors.median()), float(errors.quantile(0.99)), float(errors.max()))


def race(
    racers: dict[str, Racer],
    start: Tensor,
    steps: int,
    seed: int,
    device: torch.device,
    advance: Callable[[], object],
) -> list[Cell]:
    """Take the steps with all of them and with float64, and look on the way."""
    dtypes = {f.param for f in FORMATS}
    truths = {dtype: TrueAdamW(start.to(dtype), **OPTIONS) for dtype in dtypes}
    cells: list[Cell] = []
    for t, grad in zip(range(1, steps + 1), gradients(start.numel(), seed), strict=False):
        here = {dtype: grad.to(dtype) for dtype in dtypes}
        there = {dtype: x.to(device) for dtype, x in here.items()}
        looked = t in LOOKS
        if looked:
            before = {dtype: true_values(exact) for dtype, exact in truths.items()}
            own = {n: {f: racer.values(f) for f in FORMATS} for n, racer in racers.items()}
        for racer in racers.values():
            racer.step(there)
        for dtype, exact in truths.items():
            exact.step(here[dtype])
        if looked:
            for f in FORMATS:
                now = {name: racer.values(f) for name, racer in racers.items()}
                exact_now = true_values(truths[f.param])
                own_now = {n: true_step(own[n][f], t - 1, here[f.param]) for n in racers}
                for of in ("p", *KEYS):
                    scale = before[f.param][of]
                    dtype = f.dtype(of)
                    cells.append(
                        Cell(
                            f.name,
                            t,
                            of,
                            {
                                n: summarize(x[of], exact_now[of], scale, dtype)
                                for n, x in now.items()
                            },
                            {
                                n: summarize(x[of], own_now[n][of], scale, dtype)
                                for n, x in now.items()
                            },
                        )
                    )
        advance()
    return cells


def tabulate(cells: Sequence[Cell], ours: Sequence[str]) -> list[Table]:
    """A table a format: a row for each of p, m and v after each number of steps."""
    tables = []
    for f in FORMATS:
        table = Table(title=f"{f.name}: error in ULPs, median / p99 / max", title_justify="left")
        table.add_column("steps", justify="right")
        table.add_column("of")
        for name in (*ours, *TORCHS):
            table.add_column(name, justify="right", no_wrap=True, style="green" * (name in ours))
        for cell in (cell for cell in cells if cell.format == f.name):
            row = [
                " ".join(
                    f"{short(value):>7}{cell.mark(name, statistic) if name in ours else ''}"
                    for statistic, value in zip(Errors._fields, errors, strict=True)
                )
                for name, errors in cell.errors.items()
            ]
            table.add_row(f"{cell.steps:,}", cell.of, *row, end_section=cell.of == "v")
        tables.append(table)
    return tables


def not_under(cells: Sequence[Cell], ours: Sequence[str]) -> list[dict[str, Any]]:
    """Every figure of ours that is above torch's best, with the cause."""
    return [
        {
            "format": cell.format,
            "steps": cell.steps,
            "of": cell.of,
            "statistic": statistic,
            "optimizer": name,
            "mark": cell.mark(name, statistic),
            "error": getattr(cell.errors[name], statistic),
            "torch": {other: getattr(cell.errors[other], statistic) for other in TORCHS},
            "cause": cell.cause(name, statistic),
        }
        for name in ours
        for cell in cells
        for statistic in Errors._fields
        if cell.mark(name, statistic) != "<"
    ]


def draw(cells: Sequence[Cell], names: Sequence[str], title: str, path: Path) -> None:
    """Medians (lines) and largest errors (dots) over the steps: a row a format; p, m and v."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    figure.suptitle(title, fontsize=8)
    panels = figure.subplots(len(FORMATS), 3, sharex=True)
    for row, f in zip(panels, FORMATS, strict=True):
        for axes, of in zip(row, ("p", *KEYS), strict=True):
            shown = [cell for cell in cells if (cell.format, cell.of) == (f.name, of)]
            steps = [cell.steps for cell in shown]
            for i, name in enumerate(names):
                # many coincide: the later ones are thinner, so that all are seen
                look: dict[str, Any] = {"color": f"C{i}", "linewidth": 9 * 0.65**i}
                errors = [cell.errors[name] for cell in shown]
                axes.plot(steps, [x.median for x in errors], label=name, **look)
                axes.plot(steps, [x.max for x in errors], ":", **look)
            axes.set(xscale="log", yscale="log", title=f"{f.name}: {of}")
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("ULPs: median, dotted max")
    for axes in panels[-1]:
        axes.set_xlabel("steps")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8
    )
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=LOOKS[-1], help="default: %(default)s")
    parser.add_argument("--numel", type=int, default=4096, help="elements (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/accuracy"), help="here: %(default)s")
    parser.add_argument("--commit", help="for a copy of the checkout, where git cannot tell")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.numel < 1:
        parser.error(f"--steps {args.steps} --numel {args.numel}: nothing would be compared")

    device = Device()
    ours = OURS_ON_GPU if device.cuda else OURS_ON_CPU
    start = 0.02 * torch.randn(args.numel, generator=torch.Generator().manual_seed(args.seed + 1))
    own_in_torch = [f for f in FORMATS if f.param == f.moments]
    racers = {name: Racer(build, FORMATS, start, device.device) for name, build in ours.items()}
    racers |= {
        name: Racer(build, own_in_torch, start, device.device) for name, build in TORCHS.items()
    }
    facts = describe(device, args.commit)
    title = " | ".join(
        value if key == "device" else f"{key} {value}" for key, value in facts.items()
    )
    title += f" | {args.numel:,} elements"
    console = Console(highlight=False)
    console.width = max(console.width, 30 + 30 * len(racers))
    console.print(title, soft_wrap=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("steps", total=args.steps)
        cells = race(
            racers,
            start,
            args.steps,
            args.seed,
            device.device,
            functools.partial(progress.advance, task),
        )

    args.out.mkdir(parents=True, exist_ok=True)
    above = not_under(cells, list(ours))
    numbers = {
        "machine": facts,
        "options": OPTIONS,
        "numel": args.numel,
        "seed": args.seed,
        "cells": [
            {
                **asdict(cell),
                "errors": {name: x._asdict() for name, x in cell.errors.items()},
                "step_errors": {name: x._asdict() for name, x in cell.step_errors.items()},
                "at_or_under": {
                    name: {s: cell.at_or_under(name, s) for s in Errors._fields} for name in ours
                },
            }
            for cell in cells
        ],
        "not_under": above,
    }
    (args.out / "accuracy.json").write_text(json.dumps(numbers, indent=1))
    draw(cells, list(racers), title, args.out / "accuracy.png")

    for table in tabulate(cells, list(ours)):
        console.print(table)
    total = len(cells) * len(Errors._fields)
    for name in ours:
        own = [x["mark"] for x in above if x["optimizer"] == name]
        console.print(
            f"{name}: {total - len(own)} of {total} figures at or under the best of torch's, "
            f"{own.count('~')} at or under one of them, {own.count('>')} above all"
        )
    if above:
        listed = Table(
            "not under the best of torch's", "format", "steps", "of", "", "ours", "torch's", "cause"
        )
        for x in above:
            listed.add_row(
                x["optimizer"],
                x["format"],
                f"{x['steps']:,}",
                x["of"],
                x["statistic"],
                f"{short(x['error'])}{x['mark']}",
                " ".join(short(value) for value in x["torch"].values()),
                x["cause"],
            )
        console.print(listed)
    console.print(f"{args.out / 'accuracy.json'}, accuracy.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
