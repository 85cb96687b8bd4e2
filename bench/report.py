"""Write the tables of results from what bench/step.py measured: no figure is typed by hand.

    python bench/report.py                                  # of all bench/results/*/step.json
    python bench/report.py out/step/step.json --cpu --readme out/cpu.md

Each bench/results/*/README.md has its own run, and README that of the card with the fastest memory,
with a line for each of the others; the second command writes the runs that are named into one file.
Without any results README says that no GPU has run this yet. A CPU's run is refused unless asked
for, and then called one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blocks import replaced, table, write
from machine import ceiling
from providers import CLIP, FORMATS, FUSED, OURS
from summary import number, percent

ROOT = Path(__file__).parents[1]
CEILING = "4R3W fp32"
NO_GPU = (
    "**No GPU has run this yet.** There is no GPU figure here, in particular none against torch's\n"
    "fused kernel, because none was measured."
)
FORMAT_COLUMNS = (
    "storage format",
    "bytes a parameter, kept by the optimizer",
    "µs",
    "TB/s",
    "% of ceiling",
    "x torch fused, same weights",
    "x torch fused, fp32",
)
COLUMNS = (
    "case",
    "tensors",
    "elements",
    "torch fused µs",
    "ours µs",
    "x",
    "x from idle",
    "TB/s",
    "% of ceiling",
    "launches, ours / torch's",
    "host µs, ours / torch's",
)


def load(path: Path, cpu: bool = False) -> dict[str, Any]:
    """The numbers of a run.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another file, has no times of ours and of torch's fused AdamW, does not
            name its commit, or comes from a CPU while `cpu` is not set.
    """
    try:
        numbers: dict[str, Any] = json.loads(path.read_text())
        machine = numbers["machine"]
        timed = [line for line in numbers["lines"] if line["wall"] and not line["problem"]]
        commit, device = machine["commit"], machine["device"]
        known = [line["gpu"] for line in timed if not line.get("waited")]
        numbers["on_gpu"] = "CUDA" in machine and all(known)
        numbers["command"], numbers["ceilings_by_round"][CEILING]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a step.json as bench/step.py writes it now "
            f"({type(error).__name__}: {error}). Run bench/step.py again."
        ) from None
    if not {OURS, FUSED} <= {line["provider"] for line in timed}:
        raise ValueError(
            f"{path} lacks times of {OURS} or of {FUSED} on {device}; a table compares the two. "
            "Run bench/step.py with both."
        )
    if not numbers["on_gpu"] and not cpu:
        raise ValueError(
            f"{path} comes from a CPU ({device}), whose times must not pose as a GPU's. Run "
            "bench/step.py on a GPU, or ask for a table that says so with --cpu."
        )
    if commit == "unknown":
        raise ValueError(
            f"{path} does not say which commit ran. Give bench/step.py the --commit where git "
            "cannot tell."
        )
    return numbers


def render(numbers: dict[str, Any]) -> str:
    """Caption, table, and what to know when reading it."""
    facts = numbers["machine"]
    most = ceiling(numbers["ceilings_by_round"][CEILING])
    what = "gpu" if numbers["on_gpu"] else "wall"
    lines = {(line["case"], line["provider"]): line for line in numbers["lines"]}
    pairs = [
        (f"{case}, clipped" if clip else case, lines[case, OURS + clip], lines[case, FUSED + clip])
        for case in dict.fromkeys(case for case, _ in lines)
        for clip in ("", CLIP)
        if {(case, OURS + clip), (case, FUSED + clip)} <= lines.keys()
    ]
    rows = [_row(label, ours, theirs, what, most) for label, ours, theirs in pairs]
    rows += _means(numbers["geometric_means"], what)
    parts = [_caption(facts, numbers["command"]), table(COLUMNS, rows)]
    formats = list(_format_rows(lines, what, most))
    if formats:
        parts.append(table(FORMAT_COLUMNS, formats))
    if not numbers["on_gpu"]:
        parts.insert(0, "**Times of a CPU, which say nothing of a GPU.**")
    parts.append(" ".join(_notes(numbers, most, [x for pair in pairs for x in pair[1:]])))
    return "\n\n".join(parts)


def _caption(facts: dict[str, str], command: str) -> str:
    names = {"driver": "driver ", "CUDA": "CUDA ", "torch": "torch ", "triton": "Triton "}
    known = [f"**{facts['device']}**", *(names[key] + facts[key] for key in names if key in facts)]
    commit = f"commit `{facts['commit'].removesuffix('+')}`"
    known.append(commit + " with changes" * facts["commit"].endswith("+"))
    return f"{', '.join(known)}: `{command}`"


def _median(line: dict[str, Any], what: str) -> float | None:
    """Of the times of all rounds; None where they are not known."""
    times = line[what]
    return statistics.median(times) if times and not line["problem"] else None


def _row(
    label: str, ours: dict[str, Any], theirs: dict[str, Any], what: str, most: float
) -> list[str]:
    def median(line: dict[str, Any], key: str) -> str:
        return number(_median(line, key))

    tbs = None if ours["problem"] else ours["tbs"]
    return [
        label,
        f"{ours['tensors']:,}",
        f"{ours['numel']:,}",
        median(theirs, what),
        median(ours, what),
        number(ours["times_rival"][what]),
        number(ours["times_rival"]["wall"]),
        number(tbs),
        percent(tbs, most),
        f"{number(ours['launches'], 0)} / {number(theirs['launches'], 0)}",
        f"{median(ours, 'host')} / {median(theirs, 'host')}",
    ]


def _format_rows(
    lines: dict[tuple[str, str], dict[str, Any]], what: str, most: float
) -> Iterator[list[str]]:
    """Our storage formats, beside torch's fused AdamW on the same model in float32, too."""
    for (case, provider), line in lines.items():
        name = provider.removeprefix(OURS)
        if name not in FORMATS or line["problem"]:
            continue
        middle = _median(line, what)
        in_fp32 = lines.get((case.removesuffix("-bf16"), FUSED)) if "-bf16" in case else None
        theirs = _median(in_fp32, what) if in_fp32 else None
        yield [
            f"{case}, {name.removeprefix('+').replace('+', ' + ')}",
            number((line["state_bytes"] or 0) / line["numel"]),
            number(middle),
            number(line["tbs"]),
            percent(line["tbs"], most),
            number(line["times_rival"][what]),
            number(theirs / middle if theirs and middle else None),
        ]


def _means(means: dict[str, dict[str, float]], what: str) -> Iterator[list[str]]:
    for provider, kind in (OURS, ""), (OURS + CLIP, ", clipped"):
        mean = means.get(provider, {})
        if what in mean:
            cases, of_gpu = mean["cases"], mean.get("gpu_cases", mean["cases"])
            label = f"geometric mean of {cases}{kind}"
            label += f" (x: of {of_gpu})" * (what == "gpu" and of_gpu != cases)
            bold = [f"**{number(mean[key])}**" for key in (what, "wall")]
            yield [label, *[""] * 4, *bold, *[""] * 4]


def _notes(numbers: dict[str, Any], most: float, lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    counts = [len(line["wall"]) for line in lines if line["wall"]]
    least, largest = min(counts, default=0), max(counts, default=0)
    yield f"Medians of {least}{f' to {largest}' if largest > least else ''} rounds;"
    yield "x: times as fast, the median of the ratios within rounds;"
    yield "from idle: until an idle GPU is idle again, so that the host's time shows."
    if any(CLIP in line["provider"] for line in lines):
        yield "Clipped: the norm within our step, `clip_grad_norm_` before torch's."
    rounds = numbers["ceilings_by_round"][CEILING]
    yield (
        f"The ceiling is {number(most)} TB/s, a stream of 4 reads and 3 writes an "
        f"element measured in the same run ({sum(x < 0.95 * most for x in rounds)} of its "
        f"{len(rounds)} rounds were more than 5 % slower)."
    )
    if numbers["noise"]:
        middle, most_noise = statistics.median(numbers["noise"]), max(numbers["noise"])
        yield (
            f"Noise: the same optimizer timed twice differs by {middle:.1%} (median), "
            f"{most_noise:.1%} (largest)."
        )
    syncs = [x["syncs"] for x in lines if x["provider"].startswith(OURS) and not x["problem"]]
    if None not in syncs:
        yield f"Waits of the host for the GPU that torch sees in our steps: {sum(syncs)}."
    waited = [
        f"{x['case']}, {x['provider']}"
        for x in numbers["lines"]
        if x.get("waited") and x["provider"].startswith((OURS, FUSED))  # or it is not shown
    ]
    if waited:
        yield f"Not known, as the GPU waited for the host within it: {'; '.join(waited)}."
    failed = [f"{x['case']}, {x['provider']}: {x['problem']}" for x in lines if x["problem"]]
    if failed:
        yield f"Not timed: {'; '.join(failed)}."


def block(runs: Sequence[dict[str, Any]]) -> str:
    """What a file says of these runs."""
    return "\n\n".join(map(render, runs)) or NO_GPU


def _summary(numbers: dict[str, Any], folder: Path) -> str:
    """A line of a run that is told elsewhere."""
    facts, means = numbers["machine"], numbers["geometric_means"]
    found = "; ".join(
        f"{number(means[provider]['gpu'])} times as fast{kind} ({number(means[provider]['wall'])} "
        "from idle)"
        for provider, kind in ((OURS, ""), (OURS + CLIP, ", clipped"))
        if "gpu" in means.get(provider, {})
    )
    link = f"[{facts['device']}]({folder.relative_to(ROOT).as_posix()}/README.md)"
    return f"Also measured: {link}, commit `{facts['commit']}`, geometric means {found}."


def blocks_by_file() -> dict[Path, str]:
    """What README, and that of each folder of results, say. OSError, ValueError as `load`."""
    runs = {path.parent: load(path) for path in results()}
    most = {folder: ceiling(run["ceilings_by_round"][CEILING]) for folder, run in runs.items()}
    order = sorted(runs, key=most.__getitem__, reverse=True)
    shown = [block([runs[folder] for folder in order[:1]])]
    shown += [_summary(runs[folder], folder) for folder in order[1:]]
    files = {folder / "README.md": block([run]) for folder, run in runs.items()}
    return {ROOT / "README.md": "\n\n".join(shown), **files}


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite what is between two comments of files; 1 and an error if that cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, metavar="step.json")
    parser.add_argument("--cpu", action="store_true", help="take a CPU's run, too")
    parser.add_argument("--readme", type=Path, help="where the runs that are named go")
    args = parser.parse_args(argv)
    if bool(args.paths) != bool(args.readme):
        parser.error("name runs and --readme, or neither")
    try:
        if args.paths:
            files = {args.readme: block([load(path, args.cpu) for path in args.paths])}
        else:
            files = blocks_by_file()
        texts = {path: replaced(path, {"results": text}) for path, text in files.items()}
        for path, text in texts.items():  # all of them can be written, or none is
            print(f"{path}: {'rewritten' if write(path, text) else 'as it was'}")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def results() -> list[Path]:
    """What was measured, by GPU."""
    return sorted((ROOT / "bench" / "results").glob("*/step.json"))


if __name__ == "__main__":
    sys.exit(main())
