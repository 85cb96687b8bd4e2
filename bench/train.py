"""Train one byte-level GPT with torch.optim.AdamW and with FusedAdamW, and tell if they agree.

    python bench/train.py                 # --size gpt2 on a GPU (bf16), --size small on a CPU
    python bench/train.py --size tiny     # seconds

Every run starts from the same weights and reads the same batches of the same text, the standard
library's `pydoc_data.topics`: only the optimizer differs. Writes OUT/loss.png and OUT/loss.json.
Exits with 1 if the curves part further than rounding explains (`compare`) or a loss is not finite.
"""

import argparse
import functools
import importlib
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own spelling
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fused_adamw import FusedAdamW


@dataclass(frozen=True)
class Size:
    """A model and its training; `steps` is the default of --steps."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    steps: int
    lr: float
    bf16: bool = False  # under autocast, on a GPU only


SIZES = {
    "tiny": Size(layers=2, heads=2, width=32, context=32, batch=8, steps=30, lr=3e-3),
    "small": Size(layers=4, heads=4, width=128, context=128, batch=12, steps=300, lr=2e-3),
    "gpt2": Size(
        layers=12, heads=12, width=768, context=1024, batch=8, steps=300, lr=6e-4, bf16=True
    ),
}
VOCABULARY = 256  # bytes
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0  # GPT-3's (arXiv:2005.14165, appendix B)


class Block(nn.Module):
    """Attention and MLP, each behind its norm: x + attend(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attend_norm = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.attend_out = nn.Linear(size.width, size.width)
        self.mlp_norm = nn.LayerNorm(size.width)
        self.mlp_in = nn.Linear(size.width, 4 * size.width)
        self.mlp_out = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, width] -> the same
        qkv = self.qkv(self.attend_norm(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [batch, head, time, width / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attend_out(mixed.transpose(1, 2).flatten(2))
        mlp: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + mlp


class GPT(nn.Module):
    """A pre-norm GPT whose head is its byte embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.byte = nn.Embedding(VOCABULARY, size.width)
        self.position = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # GPT-2's: the 2 * layers sums into the residual stream keep its std
                residual = name.endswith("_out.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * size.layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:  # int64 [batch, time + 1] -> nats a byte, []
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.byte(inputs) + self.position.weight[: inputs.shape[1]]
        logits = F.linear(self.norm(self.blocks(x)), self.byte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def param_groups(model: nn.Module) -> list[dict[str, object]]:
    """Matrices decay; norms and biases do not."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def lr_scale(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


TORCH, TORCH_FUSED, OURS = "torch AdamW", "torch fused=True", "FusedAdamW"
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    TORCH: torch.optim.AdamW,
    TORCH_FUSED: functools.partial(torch.optim.AdamW, fused=True),  # the yardstick of `compare`
    OURS: FusedAdamW,
}
CHOICES = {"both": [TORCH, TORCH_FUSED, OURS], "fused": [OURS], "torch": [TORCH]}
# How many times torch's own noise is allowed. Largest distance over noise, on a CPU in fp32:
#   every weight moved by an ULP at random in every step: 6 (small, 400 steps), 7 (tiny, 40 seeds)
#   every update too short by 2^-21:                      2 (small, 400 steps), 18 (tiny, 40 seeds)
#   the weakest of 23 defects, second moments in bf16:    190 (small, first 60 steps)
# bf16 autocast raises the noise 1000-fold: 60 steps of small then show a beta2 off by 0.01 or a
# missing bias correction, but no missing weight decay. On a GPU, too, small is the sharper judge.
MARGIN = 30.0


@dataclass(frozen=True)
class Run:
    """One training: losses in nats a byte, times as medians in ms."""

    losses: list[float]  # one a step, before its update
    validation: float
    optimizer_ms: float  # optimizer.step() alone, or with clipping
    iteration_ms: float
    first: int = 1  # the step of the first loss

    def loss(self, step: int) -> str:
        """For a table; empty before the first."""
        return f"{self.losses[step - self.first]:.6f}" if step >= self.first else ""


class Moment:
    """Now, by the device's own clock: on a GPU an event in its stream, which waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = time.perf_counter()
        self.event: Any = None  # torch.cuda.Event, which torch leaves untyped
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self.event.record()

    def ms_until(self, end: "Moment") -> float:
        if self.event is None:
            return (end.seconds - self.seconds) * 1e3
        return float(self.event.elapsed_time(end.event))


class Text:
    """English, in windows of context + 1 bytes: 9 tenths to train on, the rest for validation."""

    def __init__(self, size: Size, steps: int, device: torch.device) -> None:
        self.bytes = torch.tensor(list("".join(topics.values()).encode()), device=device)
        self.size, self.split = size, len(self.bytes) * 9 // 10
        self.window = torch.arange(size.context + 1, device=device)
        starts = torch.randint(self.split - size.context, (steps, size.batch, 1))
        self.starts = starts.to(device)

    def batch(self, step: int) -> Tensor:  # int64 [batch, context + 1]
        return self.bytes[self.starts[step] + self.window]

    def validation(self) -> Iterator[Tensor]:  # batches as those
        end = len(self.bytes) - self.size.context
        places = torch.arange(self.split, end, self.size.context, device=self.bytes.device)
        places = places[: len(places) // self.size.batch * self.size.batch]
        for place in places.view(-1, self.size.batch, 1):
            yield self.bytes[place + self.window]


class Training:
    """A model with its optimizer and schedule, the losses so far and the times of their steps."""

    def __init__(
        self,
        model: nn.Module,
        make: Callable[..., torch.optim.Optimizer],
        size: Size,
        steps: int,
        device: torch.device,
        autocast: AbstractContextManager[Any] | None = None,
        max_norm: float | None = CLIP,
        betas: tuple[float, float] = BETAS,
    ) -> None:
        self.model, self.device, self.max_norm = model, device, max_norm
        self.autocast = nullcontext() if autocast is None else autocast
        self.optimizer = make(param_groups(model), lr=size.lr, betas=betas)
        self.schedule = LambdaLR(self.optimizer, lambda step: lr_scale(step, steps))
        self.losses: list[Tensor] = []  # on the device until the end: to read one is to wait for it
        self.moments: list[tuple[Moment, Moment, Moment, Moment]] = []

    def step(self, tokens: Tensor) -> None:
        begin = Moment(self.device)
        with self.autocast:
            loss = self.model(tokens)
        loss.backward()
        ready = Moment(self.device)
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        clipped = Moment(self.device)
        self.optimizer.step()
        self.moments.append((begin, ready, clipped, Moment(self.device)))
        self.schedule.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def show(self, progress: Progress, task: TaskID, name: str, step: int, steps: int) -> None:
        """Move the bar after a step, counted from 0; 40 times in all, since it reads a loss."""
        if (step + 1) % max(1, steps // 40) == 0 or step + 1 == steps:
            shown = f"{name:<{len(TORCH_FUSED)}}  loss {float(self.losses[-1]):.3f}"
            progress.update(task, completed=step + 1, description=shown)

    def validate(self, batches: Iterable[Tensor]) -> Tensor:
        """Mean loss, []."""
        with torch.no_grad(), self.autocast:
            return torch.stack([self.model(tokens) for tokens in batches]).mean()

    def optimizer_ms(self, with_clipping: bool = False) -> float:
        return statistics.median(
            (ready if with_clipping else clipped).ms_until(end)
            for _, ready, clipped, end in self.moments
        )

    def iteration_ms(self) -> float:
        return statistics.median(a[0].ms_until(b[0]) for a, b in pairwise(self.moments))


def train(
    name: str, size: Size, steps: int, seed: int, device: torch.device, progress: Progress
) -> Run:
    """Train a fresh model with the optimizer of that name."""
    torch.manual_seed(seed)
    text = Text(size, steps, device)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=size.bf16 and device.type == "cuda")
    training = Training(GPT(size).to(device), OPTIMIZERS[name], size, steps, device, autocast)
    task = progress.add_task(name, total=steps)
    for step in range(steps):
        training.step(text.batch(step))
        training.show(progress, task, name, step, steps)
    validation = training.validate(text.validation())
    return Run(
        losses=torch.stack(training.losses).tolist(),
        validation=float(validation),
        optimizer_ms=training.optimizer_ms(),
        iteration_ms=training.iteration_ms(),
    )


@dataclass(frozen=True)
class Verdict:
    """Distances from the reference in nats a byte, one a step."""

    differences: list[float]  # the candidate's
    noise: list[float]  # the yardstick's
    limits: list[float]
    largest_step: int  # counted from 1, as all steps here
    parts_at: int | None  # the first step beyond its limit


def compare(
    reference: Sequence[float], candidate: Sequence[float], yardstick: Sequence[float]
) -> Verdict:
    """Tell where `candidate` leaves `reference` further than rounding takes `yardstick` from it.

    The yardstick is torch's own second implementation: the same update, rounded elsewhere.
    """
    differences = [abs(c - r) for c, r in zip(candidate, reference, strict=True)]
    noise = [abs(y - r) for y, r in zip(yardstick, reference, strict=True)]
    settled = max(noise[: max(10, len(noise) // 10)])  # over the warm-up: early noise is often 0
    ulp = torch.finfo(torch.float32).eps * reference[0]
    limits = [MARGIN * max(n, settled, ulp) for n in accumulate(noise, max)]
    within = [d <= limit for d, limit in zip(differences, limits, strict=True)]  # a NaN is not
    return Verdict(
        differences,
        noise,
        limits,
        largest_step=1 + max(range(len(differences)), key=differences.__getitem__),
        parts_at=None if all(within) else 1 + within.index(False),
    )


# color, width, opacity
STYLES = {TORCH: ("C0", 5.0, 0.4), TORCH_FUSED: ("C2", 2.0, 0.8), OURS: ("C3", 0.8, 1.0)}


def draw(
    runs: Mapping[str, Run],
    verdict: Verdict | None,
    title: str,
    path: Path,
    styles: Mapping[str, tuple[str, float, float]] = STYLES,
    more: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Left the curves; right, where two are compared, their distance on a log axis.

    more: distances of further runs from ours, in the last steps.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, 1 if verdict is None else 2, squeeze=False)[0]
    left, right = panels[0], panels[-1]
    for name, run in runs.items():
        color, width, alpha = styles[name]
        steps = range(run.first, run.first + len(run.losses))
        left.plot(steps, run.losses, color=color, linewidth=width, alpha=alpha, label=name)
    left.set(xlabel="step", ylabel="training loss (nats a byte)")
    if verdict is not None:
        last = len(verdict.limits)
        distances = {TORCH_FUSED: verdict.noise, OURS: verdict.differences, **(more or {})}
        # dots, since a log axis has no place for the many differences that are exactly 0
        for name, own in distances.items():
            steps = range(last + 1 - len(own), last + 1)
            label = f"{name}, from {OURS}" if more and name in more else name
            label += f" ({list(own).count(0.0)} zeros)"
            right.plot(steps, own, ".", color=styles[name][0], markersize=4, label=label)
        right.plot(range(1, last + 1), verdict.limits, color="black", linewidth=1, label="limit")
        right.set(xlabel="step", ylabel=f"|loss - loss of {TORCH}|", yscale="log")
    for axes in panels:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def tabulate(
    runs: Mapping[str, Run], verdict: Verdict | None, timed: str = "optimizer.step()"
) -> tuple[Table, Table]:
    """The losses side by side, and the times."""
    losses = Table("step", *runs, *(["|diff|", "limit"] if verdict else []), box=box.SIMPLE_HEAD)
    first, last = next((run.first, run.first + len(run.losses) - 1) for run in runs.values())
    for step in sorted({first + round(k * (last - first) / 9) for k in range(10)}):
        row = [str(step), *(run.loss(step) for run in runs.values())]
        if verdict:
            row += [f"{x[step - 1]:.1e}" for x in (verdict.differences, verdict.limits)]
        losses.add_row(*row, end_section=step == last)
    losses.add_row("validation", *(f"{run.validation:.6f}" for run in runs.values()))
    times = Table("median ms", timed, "whole iteration", box=box.SIMPLE_HEAD)
    for name, run in runs.items():
        times.add_row(name, f"{run.optimizer_ms:.3f}", f"{run.iteration_ms:.2f}")
    for column in (*losses.columns, *times.columns[1:]):
        column.justify = "right"
    return losses, times


def judge(runs: Mapping[str, Run], verdict: Verdict | None) -> tuple[bool, str]:
    """Whether all is well, and a sentence that says so."""
    lost = [n for n, run in runs.items() if not math.isfinite(sum(run.losses) + run.validation)]
    if lost:
        return False, f"a loss is not finite: {', '.join(lost)}"
    if verdict is None:
        return True, "every loss is finite; nothing to compare with"
    i = verdict.largest_step - 1
    largest = f"largest difference {verdict.differences[i]:.2e} at step {i + 1}"
    if verdict.parts_at is None:
        return True, f"{OURS} follows {TORCH}: {largest}, where {verdict.limits[i]:.1e} is allowed"
    at = verdict.parts_at - 1
    beyond = f"{verdict.differences[at]:.2e}, where {verdict.limits[at]:.1e} is allowed"
    return False, f"{OURS} parts from {TORCH} at step {at + 1}: {beyond}; {largest}"


def machine(device: torch.device) -> dict[str, str]:
    """What the numbers depend on besides the code."""
    try:
        triton = str(importlib.import_module("triton").__version__)
    except ImportError:
        triton = "none"
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default_size = "gpt2" if device.type == "cuda" else "small"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default=default_size, help="here: %(default)s")
    parser.add_argument("--steps", type=int, help="at least 2; default: by the size")
    parser.add_argument("--optimizer", choices=CHOICES, default="both", help="both: compared")
    parser.add_argument("--out", type=Path, default=Path("out/train"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    steps = size.steps if args.steps is None else args.steps
    if steps < 2:
        parser.error(f"--steps is {steps}: an iteration is timed from one step to the next")

    facts = machine(device)
    with torch.device("meta"):
        counts = [p.numel() for p in GPT(size).parameters()]
    title = " | ".join(f"{fact} {value}" for fact, value in facts.items())
    title += f" | {args.size}: {sum(counts):,} parameters in {len(counts)} tensors"
    console = Console(highlight=False)
    console.print(title, soft_wrap=True)

    runs: dict[str, Run] = {}
    columns = *Progress.get_default_columns()[:3], TimeRemainingColumn(elapsed_when_finished=True)
    with Progress(*columns, console=console) as progress:
        for name in CHOICES[args.optimizer]:
            runs[name] = train(name, size, steps, args.seed, device, progress)
    verdict = None
    if args.optimizer == "both":
        verdict = compare(*(runs[name].losses for name in (TORCH, OURS, TORCH_FUSED)))
    fine, sentence = judge(runs, verdict)

    args.out.mkdir(parents=True, exist_ok=True)
    draw(runs, verdict, title, args.out / "loss.png")
    numbers = {
        "machine": facts,
        "size": {"name": args.size, **asdict(size), "steps": steps, "parameters": sum(counts)},
        "seed": args.seed,
        "runs": {name: asdict(run) for name, run in runs.items()},
        "verdict": None if verdict is None else asdict(verdict),
        "fine": fine,
    }
    (args.out / "loss.json").write_text(json.dumps(numbers, indent=1))
    console.print(*tabulate(runs, verdict), f"{args.out / 'loss.png'} and loss.json", sep="\n")
    console.print("[bold green]OK[/]" if fine else "[bold red]FAIL[/]", sentence, soft_wrap=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
