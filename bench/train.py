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
from collections.abc import Callable, Sequence
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
from rich.progress import Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

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
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


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
    optimizer_ms: float  # optimizer.step() alone
    iteration_ms: float


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


def train(
    name: str, size: Size, steps: int, seed: int, device: torch.device, progress: Progress
) -> Run:
    """Train a fresh model with the optimizer of that name."""
    text = torch.tensor(list("".join(topics.values()).encode()), device=device)
    split = len(text) * 9 // 10
    window = torch.arange(size.context + 1, device=device)
    torch.manual_seed(seed)
    starts = torch.randint(split - size.context, (steps, size.batch, 1)).to(device)
    model = GPT(size).to(device)
    optimizer = OPTIMIZERS[name](param_groups(model), lr=size.lr, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_scale(step, steps))
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=size.bf16 and device.type == "cuda")

    task = progress.add_task(name, total=steps)
    losses: list[Tensor] = []  # on the device until the end: to read one is to wait for the GPU
    moments: list[tuple[Moment, Moment, Moment]] = []
    for step in range(steps):
        begin = Moment(device)
        with autocast:
            loss = model(text[starts[step] + window])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        before = Moment(device)
        optimizer.step()
        moments.append((begin, before, Moment(device)))
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % max(1, steps // 40) == 0 or step + 1 == steps:
            shown = f"{name:<{len(TORCH_FUSED)}}  loss {float(losses[-1]):.3f}"
            progress.update(task, completed=step + 1, description=shown)

    places = torch.arange(split, len(text) - size.context, size.context, device=device)
    places = places[: len(places) // size.batch * size.batch].view(-1, size.batch, 1)
    with torch.no_grad(), autocast:
        validation = torch.stack([model(text[place + window]) for place in places]).mean()
    return Run(
        losses=torch.stack(losses).tolist(),
        validation=float(validation),
        optimizer_ms=statistics.median(before.ms_until(end) for _, before, end in moments),
        iteration_ms=statistics.median(a[0].ms_until(b[0]) for a, b in pairwise(moments)),
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


def draw(runs: dict[str, Run], verdict: Verdict | None, title: str, path: Path) -> None:
    """Left the curves; right, where two are compared, their distance on a log axis."""
    styles = {TORCH: ("C0", 5.0, 0.4), TORCH_FUSED: ("C2", 2.0, 0.8), OURS: ("C3", 0.8, 1.0)}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, 1 if verdict is None else 2, squeeze=False)[0]
    left, right = panels[0], panels[-1]
    for name, run in runs.items():
        color, width, alpha = styles[name]
        steps = range(1, len(run.losses) + 1)
        left.plot(steps, run.losses, color=color, linewidth=width, alpha=alpha, label=name)
    left.set(xlabel="step", ylabel="training loss (nats a byte)")
    if verdict is not None:
        # dots, since a log axis has no place for the many differences that are exactly 0
        for name, distances in (TORCH_FUSED, verdict.noise), (OURS, verdict.differences):
            label = f"{name} ({distances.count(0.0)} zeros)"
            right.plot(steps, distances, ".", color=styles[name][0], markersize=4, label=label)
        right.plot(steps, verdict.limits, color="black", linewidth=1, label="limit")
        right.set(xlabel="step", ylabel=f"|loss - loss of {TORCH}|", yscale="log")
    for axes in panels:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def tabulate(runs: dict[str, Run], verdict: Verdict | None) -> tuple[Table, Table]:
    """The losses side by side, and the times."""
    losses = Table("step", *runs, *(["|diff|", "limit"] if verdict else []), box=box.SIMPLE_HEAD)
    steps = len(next(iter(runs.values())).losses)
    for i in sorted({round(k * (steps - 1) / 9) for k in range(10)}):
        row = [str(i + 1), *(f"{run.losses[i]:.6f}" for run in runs.values())]
        if verdict:
            row += [f"{verdict.differences[i]:.1e}", f"{verdict.limits[i]:.1e}"]
        losses.add_row(*row, end_section=i == steps - 1)
    losses.add_row("validation", *(f"{run.validation:.6f}" for run in runs.values()))
    times = Table("median ms", "optimizer.step()", "whole iteration", box=box.SIMPLE_HEAD)
    for name, run in runs.items():
        times.add_row(name, f"{run.optimizer_ms:.3f}", f"{run.iteration_ms:.2f}")
    for column in (*losses.columns, *times.columns[1:]):
        column.justify = "right"
    return losses, times


def judge(runs: dict[str, Run], verdict: Verdict | None) -> tuple[bool, str]:
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
