"""The three plots of bench/step.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from providers import CLIP, EXTERNALS, FORMATS, FUSED, OPT_IN, OURS
from timing import AGAIN, Line

COLORS = dict(
    zip(
        [
            *(FUSED, "torch-foreach", "torch-loop", OURS, OPT_IN, *EXTERNALS),
            *(OURS + CLIP, FUSED + CLIP, *(OURS + name for name in FORMATS)),
        ],
        [
            *(f"C{i}" for i in range(10)),
            *("gold", "black", "darkred", "midnightblue"),
            *("salmon", "tomato", "firebrick", "orangered"),
        ],
        strict=True,
    )
)


def draw(lines: Sequence[Line], ceilings: dict[str, float], title: str, folder: Path) -> list[str]:
    """TB/s by case against the ceiling, host time by tensor count, memory a parameter.

    Returns the names of the files in the folder.
    """
    shown = [x for x in lines if x.wall and not x.problem and AGAIN not in x.provider]
    cases = list(dict.fromkeys(line.case for line in shown))
    providers = list(dict.fromkeys(line.provider for line in shown))
    if not shown:
        return []
    # bars one under the other, a gap between cases
    ys = {id(x): i + cases.index(x.case) for i, x in enumerate(shown)}
    ticks = [statistics.mean(ys[id(x)] for x in shown if x.case == case) for case in cases]
    bottom = max(ys.values()) + 1
    on_gpu = any(line.gpu for line in shown)

    for path, xlabel in (
        ("throughput.png", "TB/s: bytes that the step must move over its time"),
        ("memory.png", "bytes a parameter: kept by the optimizer, and pale what a step adds"),
    ):
        figure, axes = _figure(title, 1.2 + 0.13 * bottom)
        for line in shown:
            y, color = ys[id(line)], COLORS[line.provider]
            if path == "throughput.png":
                if line.tbs is None:
                    axes.text(0, y, " ?", color=color, size=6, va="center")
                else:
                    axes.barh(y, line.tbs, 0.9, color=color)
                continue
            state = (line.state_bytes or 0) / line.numel
            axes.barh(y, state, 0.9, color=color)
            extra = max(0.0, (line.peak_bytes or 0) / line.numel - state)
            axes.barh(y, extra, 0.9, left=state, color=color, alpha=0.35)
        for provider in providers:
            axes.barh(0, 0, color=COLORS[provider], label=provider)
        if path == "throughput.png":
            for (name, value), style in zip(ceilings.items(), ("-", ":"), strict=False):
                label = f"{name}: {value:.3g} TB/s"
                axes.axvline(value, color="black", linestyle=style, linewidth=1, label=label)
        axes.margins(x=0.03)
        axes.set_yticks(ticks, cases)
        axes.set(xlabel=xlabel, ylim=(bottom, -1))
        _finish(figure, axes, folder / path)

    figure, axes = _figure(title, 4.8)
    for provider in providers:
        points = sorted(
            (line.tensors, statistics.median(line.host or line.wall))
            for line in shown
            if line.provider == provider
        )
        color = COLORS[provider]
        axes.plot(*zip(*points, strict=True), "o", color=color, markersize=5, label=provider)
    what = "until step() returns" if on_gpu else "of step(), the arithmetic included"
    axes.set(xlabel="tensors", ylabel=f"µs {what}", xscale="log", yscale="log")
    for axis, limits, change in (
        (axes.xaxis, axes.get_xlim(), axes.set_xlim),
        (axes.yaxis, axes.get_ylim(), axes.set_ylim),
    ):  # whole decades, so that some tick has a label
        change(*(10.0**exponent for exponent in _decades(*limits)))
        axis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
        axis.set_minor_formatter("")
    _finish(figure, axes, folder / "host.png")
    return ["throughput.png", "memory.png", "host.png"]


def _decades(low: float, high: float) -> tuple[int, int]:
    return math.floor(math.log10(low)), math.ceil(math.log10(high))


def _figure(title: str, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9, max(3.0, height)), layout="constrained")
    figure.suptitle(title, fontsize=8)
    return figure, figure.subplots()


def _finish(figure: Figure, axes: Any, path: Path) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
