"""What the times of all rounds come down to: a table a case, means, noise, and step.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from cases import Case, count_bytes
from machine import ceiling
from providers import CLIP, OURS, rival
from rich.table import Table
from timing import AGAIN, Line


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """10th, 50th and 90th."""
    low, median, high = np.percentile(times, [10, 50, 90])
    return float(low), float(median), float(high)


def speedup(line: Line, lines: Sequence[Line], what: str) -> float | None:
    """How many times as fast as its rival among the lines."""
    name = line.case, rival(line.provider)
    base = next((x for x in lines if (x.case, x.provider) == name), None)
    return None if base is None else times_as_fast(line, base, what)


def times_as_fast(line: Line, base: Line, what: str) -> float | None:
    """The median of the ratios within rounds; None where one of both was not timed."""
    if line.problem or base.problem:
        return None
    mine: list[float] = getattr(line, what)
    others: list[float] = getattr(base, what)
    if not mine or not others:
        return None
    return statistics.median(b / a for a, b in zip(mine, others, strict=True))


def number(x: float | None, digits: int = 3) -> str:
    """Significant digits, thousands apart; a dash for what is not known."""
    if x is None:
        return "-"
    if 0 < abs(x) < 1:
        return f"{x:.{digits}f}" if abs(x) >= 0.01 else f"{x:.1g}"
    return f"{x:,.{max(0, digits - len(str(int(abs(x)))))}f}"


def percent(tbs: float | None, ceiling: float) -> str:
    """That a speed is of the ceiling; a dash where it is not known."""
    return number(None if tbs is None else 100 * tbs / ceiling)


COLUMNS = {  # and the least width of each, so that cases line up
    "provider": 24,
    "GPU us": 9,
    "p10": 9,
    "p90": 9,
    "wall us": 9,
    "host us": 9,
    "launches": 8,
    "copies": 6,
    "syncs": 5,
    "state B": 7,
    "peak B": 7,
    "TB/s": 6,
    "%": 5,
    "x GPU": 5,
    "x wall": 6,
}


def _count(of: int, what: str) -> str:
    return f"{of:,} {what}{'' if of == 1 else 's'}"


def tabulate(case: Case, lines: Sequence[Line], ceiling: float) -> Table:
    """One line a provider."""
    facts = [
        _count(case.tensors, "tensor"),
        _count(len(case.groups), "group"),
        f"{case.numel:,} parameters in {case.formats}",
        f"{count_bytes(case) / case.numel:.1f} bytes each to move",
    ]
    if any(CLIP in line.provider for line in lines):
        facts.append(f"{count_bytes(case, clips=True) / case.numel:.1f} with {CLIP}")
    title = f"[bold]{case.name}[/]  {', '.join(facts)}{', not aligned' * case.unaligned}"
    table = Table(box=None, title=title, title_justify="left", title_style="", pad_edge=False)
    for column, width in COLUMNS.items():
        side = "left" if column == "provider" else "right"
        table.add_column(column, justify=side, min_width=width, no_wrap=True)  # type: ignore[arg-type]
    for line in lines:
        style = "green" if line.provider.startswith(OURS) else ""
        if line.problem:
            continue
        times = line.device_times
        low, middle, high = percentiles(times) if times else (None, None, None)
        state, peak = (
            None if size is None else size / line.numel
            for size in (line.state_bytes, line.peak_bytes)
        )
        table.add_row(
            line.provider,
            number(middle) if line.gpu else "-",
            number(low),
            number(high),
            number(statistics.median(line.wall)),
            number(statistics.median(line.host) if line.host else None),
            number(line.launches, 0),
            number(line.copies, 0),
            number(line.syncs, 0),
            number(state),
            number(peak),
            number(line.tbs),
            percent(line.tbs, ceiling),
            number(speedup(line, lines, "gpu")),
            number(speedup(line, lines, "wall")),
            style=style,
        )
    return table


def means(lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    """Geometric mean over the cases of how many times as fast as its rival each provider is.

    By wall time, and by the GPU's over the `gpu_cases` in which that is known.
    """
    found: dict[str, dict[str, float]] = {}
    for provider in dict.fromkeys(line.provider for line in lines):
        own = [line for line in lines if line.provider == provider]
        for what, count in ("gpu", "gpu_cases"), ("wall", "cases"):
            ratios = [x for line in own if (x := speedup(line, lines, what)) is not None]
            if ratios:
                mean = {what: statistics.geometric_mean(ratios), count: len(ratios)}
                found.setdefault(provider, {}).update(mean)
    return found


def noise(lines: Sequence[Line]) -> list[float]:
    """By how much the medians of the same optimizer timed twice differ, one number a case."""
    medians = {
        (line.case, line.provider): statistics.median(line.device_times)
        for line in lines
        if line.device_times
    }
    return [
        abs(medians[case, provider.removesuffix(AGAIN)] / value - 1)
        for (case, provider), value in medians.items()
        if provider.endswith(AGAIN)
    ]


def write(
    path: Path,
    command: str,
    facts: dict[str, str],
    ceilings: dict[str, list[float]],
    lines: Sequence[Line],
    missing: dict[str, str],
) -> None:
    """All numbers, times one a round."""
    numbers = {
        "command": command,
        "machine": facts,
        "ceilings": {name: ceiling(values) for name, values in ceilings.items()},
        "ceilings_by_round": ceilings,
        "missing": missing,
        "geometric_means": means(lines),
        "noise": noise(lines),
        "lines": [
            {
                **asdict(line),
                **{
                    f"{what}_percentiles": percentiles(times)
                    for what in ("gpu", "wall", "host")
                    if (times := getattr(line, what))
                },
                "tbs": line.tbs,
                "rival": rival(line.provider),
                "times_rival": {what: speedup(line, lines, what) for what in ("gpu", "wall")},
            }
            for line in lines
        ],
    }
    path.write_text(json.dumps(numbers, indent=1))
