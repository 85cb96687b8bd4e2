"""What each storage format does to a final loss: the GPT of train.py, from the same seeds.

    python bench/quality.py                         # 6 formats, 5 seeds; on a GPU --size gpt2
    python bench/quality.py --size tiny --steps 50  # a minute

A seed gives weights and batches, so that losses are compared in pairs. Only storage differs: the
forward pass is computed from float32 copies of the weights (on a GPU under bfloat16 autocast, as in
train.py), and gradients have the weights' dtype. Writes OUT/quality.json and OUT/quality.png. Runs
that are in quality.json already are not repeated: what was cut off goes on, more seeds add to it.
README's table is written by

    python bench/quality.py --out bench/results/quality --readme README.md

Exits with 1 if a loss is not finite.

The learning rate is a tenth of train.py's: updates of the usual large-model size, which bfloat16
weights lose without masters or stochastic rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blocks import rewrite
from blocks import table as markdown
from machine import find_commit
from matplotlib.figure import Figure
from processes import in_processes
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from train import BETAS, CLIP, GPT, SIZES, Size, Text, Training, machine

from fused_adamw import FusedAdamW


@dataclass(frozen=True)
class Format:
    """Dtype of weights and gradients, and FusedAdamW's options."""

    weights: torch.dtype
    options: dict[str, Any]


FP32, BF16, STOCHASTIC, MASTER_INT8 = "fp32", "bf16", "bf16 + SR", "bf16 + master + int8"
FORMATS = {
    FP32: Format(torch.float32, {}),
    BF16: Format(torch.bfloat16, {}),
    STOCHASTIC: Format(torch.bfloat16, {"stochastic_rounding": True}),
    "bf16 + master": Format(torch.bfloat16, {"master_weights": True, "state_dtype": torch.float32}),
    MASTER_INT8: Format(torch.bfloat16, {"master_weights": True, "state_dtype": "int8"}),
    "fp32 + int8": Format(torch.float32, {"state_dtype": "int8"}),
}
WINDOWS = 30  # points of a curve


@dataclass(frozen=True)
class Settings:
    """What all runs of one table share."""

    size: str
    steps: int
    lr: float
    beta2: float


@dataclass(frozen=True)
class Run:
    """One training. Losses in nats a byte."""

    format: str
    seed: int
    validation: float  # at the end
    curve: list[float]  # training losses, means of WINDOWS windows
    bytes_a_parameter: float  # weights, gradients and all that the optimizer keeps
    machine: dict[str, str]  # and versions, and the commit


class InFloat32(nn.Module):
    """A model computed from float32 copies of its weights, whatever they are stored in."""

    def __init__(self, stored: nn.Module) -> None:
        super().__init__()
        self.stored = stored

    def forward(self, tokens: Tensor) -> Tensor:
        copies = {name: p.float() for name, p in self.stored.named_parameters()}
        loss: Tensor = functional_call(self.stored, copies, (tokens,))
        return loss


def stored_bytes(model: nn.Module, optimizer: FusedAdamW) -> int:
    """Bytes of memory behind weights, gradients and states, each allocation once."""
    states = (x for s in optimizer.state.values() for x in s.values())
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *states]
    storages = (x.untyped_storage() for x in tensors if isinstance(x, Tensor))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def requested_bytes() -> int:
    """What a GPU's allocator is asked for by now: what it gives is rounded up to blocks."""
    return int(torch.cuda.memory_stats().get("requested_bytes.all.current", 0))


def measure_bytes(name: str, size: Size, device: torch.device) -> float:
    """Bytes a parameter after a step, with gradients: on a GPU as its allocator counts them."""
    stored = FORMATS[name]
    before = requested_bytes()  # 0 where no GPU is used
    model = GPT(size).to(device, stored.weights)
    optimizer = FusedAdamW(model.parameters(), **stored.options)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    # torch's CPU allocator keeps no count
    on_gpu = device.type == "cuda"
    held = requested_bytes() - before if on_gpu else stored_bytes(model, optimizer)
    return held / sum(p.numel() for p in model.parameters())


def train(
    name: str,
    seed: int,
    settings: Settings,
    threads: int | None = None,
    commit: str | None = None,
) -> Run:
    """Train from the seed with weights and moments in the format of that name."""
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, steps = replace(SIZES[settings.size], lr=settings.lr), settings.steps
    held = measure_bytes(name, size, device)

    torch.manual_seed(seed)
    text = Text(size, steps, device)
    stored = FORMATS[name]
    model = InFloat32(GPT(size).to(device, stored.weights))
    make = partial(FusedAdamW, max_grad_norm=CLIP, seed=seed, **stored.options)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=size.bf16 and device.type == "cuda")
    betas = BETAS[0], settings.beta2
    training = Training(model, make, size, steps, device, autocast, max_norm=None, betas=betas)
    for step in range(steps):
        training.step(text.batch(step))
    windows = torch.stack(training.losses).tensor_split(min(WINDOWS, steps))
    return Run(
        format=name,
        seed=seed,
        validation=float(training.validate(text.validation())),
        curve=[float(x.mean()) for x in windows],
        bytes_a_parameter=held,
        machine={**machine(device), "commit": commit or find_commit()},
    )


def facts_of(runs: Sequence[Run]) -> dict[str, str]:
    """On what they ran; several values of a fact, as of the commit, behind each other."""
    facts = runs[0].machine
    return {key: ", ".join(dict.fromkeys(run.machine[key] for run in runs)) for key in facts}


@dataclass(frozen=True)
class Row:
    """One format over the seeds that it shares with fp32."""

    format: str
    losses: list[float]
    gaps: list[float]  # to fp32's from the same seed
    noise: float  # standard deviation of fp32's over the seeds
    bytes_a_parameter: float

    @property
    def gap(self) -> float:
        return statistics.fmean(self.gaps)

    @property
    def gap_error(self) -> float:
        """Standard error of the gap."""
        return _deviation(self.gaps) / math.sqrt(len(self.gaps))


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def compare(runs: Sequence[Run]) -> list[Row]:
    """A row for each format, in the order of FORMATS."""
    losses = {(run.format, run.seed): run.validation for run in runs}
    rows = []
    for name in FORMATS:
        seeds = [s for n, s in losses if n == name and (FP32, s) in losses]
        if seeds:
            reference = [losses[FP32, s] for s in seeds]
            own = [losses[name, s] for s in seeds]
            gaps = [x - r for x, r in zip(own, reference, strict=True)]
            held = next(run.bytes_a_parameter for run in runs if run.format == name)
            rows.append(Row(name, own, gaps, _deviation(reference), held))
    return rows


def judge(rows: Sequence[Row]) -> list[str]:
    """Sentences on the two bars: 8 bits with masters, and stochastic rounding."""
    found = {row.format: row for row in rows}
    sentences = []
    if MASTER_INT8 in found:
        row = found[MASTER_INT8]
        within = "met" if row.gap <= row.noise else "missed"
        sentences.append(
            f"{MASTER_INT8}: {row.gap:+.4f} from fp32, at most {row.noise:.4f} (one standard "
            f"deviation over seeds) wanted: {within}"
        )
    if {BF16, STOCHASTIC} <= found.keys():
        plain, rounded = found[BF16], found[STOCHASTIC]
        if plain.gap >= 5 * plain.noise:
            recovered = 1 - rounded.gap / plain.gap
            verdict = "met" if recovered >= 0.9 else "missed"
            sentences.append(
                f"{STOCHASTIC}: recovers {recovered:.1%} of plain bf16's gap of "
                f"{plain.gap / plain.noise:.1f} standard deviations, 90 % wanted: {verdict}"
            )
        else:
            sentences.append(
                f"{STOCHASTIC}: plain bf16's gap is {plain.gap / plain.noise:.1f} standard "
                "deviations here; 5 are wanted to judge by"
            )
    return sentences


def tabulate(rows: Sequence[Row]) -> Table:
    """Formats beside each other, for a terminal."""
    heads = ("B a param", "final loss", "over seeds", "gap to fp32", "/ noise")
    table = Table("format", *heads, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*cells(row))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def cells(row: Row) -> list[str]:
    """A row as text."""
    mean, spread = statistics.fmean(row.losses), _deviation(row.losses)
    gap = ["", ""]
    if row.format != FP32:
        gap = [f"{row.gap:+.4f} ± {row.gap_error:.4f}", f"{row.gap / row.noise:+.2f}"]
    return [row.format, f"{row.bytes_a_parameter:.2f}", f"{mean:.4f}", f"± {spread:.4f}", *gap]


def block(rows: Sequence[Row], facts: dict[str, str], settings: Settings) -> str:
    """README's table, and under which conditions it holds."""
    columns = "format", "B a parameter", "loss", "over seeds", "gap to fp32", "/ seed noise"
    caption = (
        f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}: "
        f"`--size {settings.size} --steps {settings.steps} --lr {settings.lr:g} --beta2 "
        f"{settings.beta2:g} --seeds {len(rows[0].losses)}`; losses in nats a byte, of validation "
        "text, ± their standard deviation over the seeds; gaps in pairs, ± the standard error."
    )
    verdicts = "\n".join(f"* {sentence}" for sentence in judge(rows))
    return "\n\n".join([caption, markdown(columns, [cells(row) for row in rows]), verdicts])


def draw(runs: Sequence[Run], rows: Sequence[Row], title: str, path: Path) -> None:
    """Left the gap in the training loss over the steps, right the gap of each seed at the end."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    left, right = figure.subplots(1, 2)
    curves = {(run.format, run.seed): run.curve for run in runs}
    noise = rows[0].noise
    for number, row in enumerate(rows):
        pairs = [
            (curve, curves[FP32, seed])
            for (name, seed), curve in curves.items()
            if name == row.format and (FP32, seed) in curves
        ]
        gaps = torch.tensor([x for x, _ in pairs]) - torch.tensor([r for _, r in pairs])
        color = f"C{number}"
        label = f"{row.format}, {row.bytes_a_parameter:.1f} B"
        if row.format != FP32:
            done = [(i + 1) / gaps.shape[1] for i in range(gaps.shape[1])]
            left.plot(done, gaps.mean(0), color=color, label=label)
        right.plot(row.gaps, [number] * len(row.gaps), "o", color=color, alpha=0.5)
        right.plot([row.gap], [number], "|", color=color, markersize=24, markeredgewidth=2)
    for axes, limit in ((left, left.axhspan), (right, right.axvspan)):
        if math.isfinite(noise):
            limit(-noise, noise, color="black", alpha=0.08, label="± seed noise of fp32")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    scale = max(noise, 1e-4) if math.isfinite(noise) else 1e-3
    left.set(xlabel="part of the training", ylabel="training loss, gap to fp32 (nats a byte)")
    left.set_yscale("symlog", linthresh=scale)
    right.set_xscale("symlog", linthresh=scale)
    right.set(xlabel="validation loss at the end, gap to fp32 (nats a byte)")
    right.set_yticks(range(len(rows)), [row.format for row in rows])
    right.invert_yaxis()
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def load(path: Path, settings: Settings) -> list[Run]:
    """The runs that are there already.

    Raises:
        ValueError: they were made with other settings.
    """
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    if kept["settings"] != asdict(settings):
        raise ValueError(
            f"{path} holds runs with {kept['settings']}, not {asdict(settings)}: pass another --out"
        )
    return [Run(**run) for run in kept["runs"]]


def save(path: Path, settings: Settings, runs: Sequence[Run]) -> None:
    """Keep the runs for `load`."""
    kept = {"settings": asdict(settings), "runs": [asdict(x) for x in runs]}
    path.write_text(json.dumps(kept, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, then write table and plot of all there is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default_size = "gpt2" if device.type == "cuda" else "small"
    parser.add_argument("--size", choices=SIZES, default=default_size, help="here: %(default)s")
    parser.add_argument("--steps", type=int, help="default: by the size")
    parser.add_argument("--lr", type=float, default=3e-4, help="at the peak; default: %(default)s")
    parser.add_argument("--beta2", type=float, default=BETAS[1], help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="how many; default: %(default)s")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--out", type=Path, default=Path("out/quality"), help="%(default)s")
    parser.add_argument("--readme", type=Path, help="a file to write the table into")
    parser.add_argument("--commit", help="for a copy of the checkout, where git cannot tell")
    args = parser.parse_args(argv)
    steps = SIZES[args.size].steps if args.steps is None else args.steps
    settings = Settings(args.size, steps, args.lr, args.beta2)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "quality.json"
    try:
        runs = load(path, settings)
    except ValueError as error:
        parser.error(str(error))

    console = Console(highlight=False)
    done = {(run.format, run.seed) for run in runs}
    wanted = [(f, s) for s in range(args.seeds) for f in args.formats if (f, s) not in done]
    threads = max(1, torch.get_num_threads() // args.jobs)
    calls = [partial(train, f, s, settings, threads, args.commit) for f, s in wanted]
    finished = in_processes(args.jobs, calls)
    for run in track(finished, "trainings", len(calls), console=console, disable=not calls):
        runs.append(run)
        save(path, settings, runs)

    rows = compare(runs)
    lost = [f"{run.format} (seed {run.seed})" for run in runs if not math.isfinite(run.validation)]
    if not rows:
        parser.error(f"nothing to compare: {FP32} has no run")
    facts = {**facts_of(runs), **{key: str(x) for key, x in asdict(settings).items()}}
    title = " | ".join(f"{fact} {value}" for fact, value in facts.items())
    draw(runs, rows, title, args.out / "quality.png")
    console.print(
        title, tabulate(rows), *judge(rows), f"{path} and quality.png", sep="\n", soft_wrap=True
    )
    if args.readme:
        rewrite(args.readme, {"quality": block(rows, facts_of(runs), settings)})
    if lost:
        console.print("[bold red]FAIL[/] a loss is not finite:", ", ".join(lost))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
