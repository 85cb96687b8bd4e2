"""Time one optimizer step: FusedAdamW beside torch's AdamW and others, on real parameter lists.

    python bench/step.py                                # on a CPU without the largest cases
    python bench/step.py --cases gpt2 moe-10000 --rounds 50
    python bench/step.py --providers fused_adamw torch-fused torch-compiled

Writes OUT/step.json and three plots. A round times every provider once, in a new random order,
and ratios are taken within rounds. One optimizer is timed twice: what its two lines differ by is
noise. Before each timed step fresh random gradients are written, the learning rate changes, as with
a scheduler (but torch-compiled's, which would be compiled anew), and the cache is flushed.

    GPU     between CUDA events around step(), enqueued behind enough other work that the GPU
            never waits for the host: what the step costs on the device (median, p10 and p90,
            on a CPU those of the wall time)
    wall    from an idle GPU until it is idle again
    host    from an idle GPU until step() returns
    state B, peak B   bytes a parameter that the optimizer keeps, and keeps and uses in a step
    TB/s    bytes that the step must move (`count_bytes`) over GPU time, on a CPU over wall time;
            % of a stream of 4 reads and 3 writes an element, measured in the same run, 3 times
            before each case and after all (the median of the faster half)
    launches, copies   of a step that finds one gradient moved, by torch's profiler
    syncs   how often torch sees the host wait for the GPU in a step (`set_sync_debug_mode`)
    x       times as fast as torch's fused AdamW
    +clip   with the norm of all gradients clipped: ours within the step, torch's fused AdamW behind
            `clip_grad_norm_`, and these two compared with each other; in some cases, or named
    +sr, +master, +int8   our storage formats (`FORMATS` in providers.py), in some cases, or named;
            their % is that of their own fewer bytes, the fraction of their floor

What runs: providers.py on cases.py; how it is timed: timing.py and machine.py; what is told of it:
summary.py and plots.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from cases import CASES, TINY_CASES, Case
from machine import Device, ceiling, describe, measure_ceilings, positive
from plots import draw
from providers import EXTERNALS, LARGEST_ON_CPU, OURS, PROVIDERS, entering, find_providers
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from summary import COLUMNS, means, noise, number, tabulate, write
from timing import LEAST_ROUNDS, Line, run_case


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, plot."""
    every = {**CASES, **TINY_CASES}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=every, metavar="CASE", help=", ".join(every))
    names = [*PROVIDERS, *EXTERNALS]
    parser.add_argument(
        "--providers", nargs="+", choices=names, metavar="PROVIDER", help=", ".join(names)
    )
    parser.add_argument("--rounds", type=positive, default=20, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/step"), help="default: %(default)s")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=8.0,
        help=f"of rounds in a case, beyond the first {LEAST_ROUNDS} (default: %(default)s)",
    )
    parser.add_argument("--commit", help="for a copy of the checkout, where git cannot tell")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out is a file, {args.out}: name a folder")

    device = Device()
    cases = [every[name] for name in dict.fromkeys(args.cases or CASES)]
    skipped: list[Case] = []
    if not args.cases and not device.cuda:
        skipped = [case for case in cases if case.numel > LARGEST_ON_CPU]
        cases = [case for case in cases if case not in skipped]
    providers, missing = find_providers(args.providers, device.cuda)

    console = Console(highlight=False)
    widest = sum(COLUMNS.values()) + 2 * len(COLUMNS)
    console.width = max(console.width, widest)
    facts = describe(device, args.commit)
    title = " | ".join(
        value if key == "device" else f"{key} {value}" for key, value in facts.items()
    )
    console.print(title, soft_wrap=True)
    if missing:
        reasons = (f"{name} ({reason})" for name, reason in missing.items())
        console.print(f"left out: {', '.join(reasons)}", soft_wrap=True)
    if skipped:
        names_of = ", ".join(case.name for case in skipped)
        console.print(f"a CPU skips these unless they are named: {names_of}", soft_wrap=True)

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "step.json"
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "bench/step.py", *words])
    ceilings: dict[str, list[float]] = {}
    by_case: dict[str, list[Line]] = {}
    lines: list[Line] = []
    columns = *Progress.get_default_columns()[:3], TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("ceilings", total=len(cases))
        for index, case in enumerate(cases):
            progress.update(task, description=case.name, completed=index)
            measure_ceilings(device, ceilings, 3)
            by_case[case.name] = run_case(
                case,
                entering(providers, case.name, args.providers),
                device,
                args.rounds,
                args.max_seconds,
                functools.partial(progress.advance, task),
            )
            lines.extend(by_case[case.name])
            write(path, command, facts, ceilings, lines, missing)  # what is known survives a crash
            gc.collect()
            # after an illegal access every CUDA call raises: the table still wants to be printed
            with contextlib.suppress(RuntimeError):
                if device.cuda:
                    torch.cuda.empty_cache()
        with contextlib.suppress(RuntimeError):
            measure_ceilings(device, ceilings, 3)
    write(path, command, facts, ceilings, lines, missing)

    sustained = {name: ceiling(values) for name, values in ceilings.items()}
    measured = (
        f"{name} {sustained[name]:.3g} ({min(values):.3g} to {max(values):.3g})"
        for name, values in ceilings.items()
    )
    console.print(
        "ceilings in TB/s, before each case and after all:", ", ".join(measured), soft_wrap=True
    )
    if not device.cuda:
        console.print("(no ceiling on a CPU: a stream of torch operations, slower than one loop)")
    for case in cases:
        console.print()
        console.print(tabulate(case, by_case[case.name], sustained["4R3W fp32"]))
        for line in by_case[case.name]:
            if line.problem:
                console.print(f"{line.provider:<{COLUMNS['provider']}}  [yellow]{line.problem}[/]")
    console.print()
    summary = Table("geometric mean, times as fast", "GPU", "cases", "wall", "cases", box=None)
    for column in summary.columns[1:]:
        column.justify = "right"
    for provider, mean in means(lines).items():
        summary.add_row(
            provider,
            number(mean.get("gpu")),
            number(mean.get("gpu_cases"), 0),
            number(mean["wall"]),
            number(mean["cases"], 0),
        )
    if summary.row_count:
        console.print(summary)
    doubled = noise(lines)
    if doubled:
        console.print(
            f"noise: the same optimizer timed twice differs by {statistics.median(doubled):.1%} "
            f"(median), {max(doubled):.1%} (largest)"
        )
    shown = {name: sustained[name] for name in ("4R3W fp32", "copy fp32")}
    drawn = draw(lines, shown, title, args.out)
    console.print(", ".join([str(path), *drawn]))
    return 1 if any(line.failed for line in lines if line.provider.startswith(OURS)) else 0


if __name__ == "__main__":
    sys.exit(main())
