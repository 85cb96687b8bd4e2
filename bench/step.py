"""Time one optimizer step: FusedAdamW beside torch's AdamW and others, on real parameter lists.

    python bench/step.py                                # on a CPU without the largest cases
    python bench/step.py --cases gpt2 moe-10000 --rounds 50
    python bench/step.py --providers fused_adamw torch-fused torch-compiled

Writes OUT/step.json and three plots. A round times every provider once, in a new random order,
and ratios are taken within rounds. One optimizer is timed twice: what its two lines differ by is
noise. Before each timed step fresh random gradients are written and the cache is flushed.

    GPU     between CUDA events around step(), enqueued behind enough other work that the GPU
            never waits for the host: what the step costs on the device (median, p10 and p90,
            on a CPU those of the wall time)
    wall    from an idle GPU until it is idle again
    host    from an idle GPU until step() returns
    state B, peak B   bytes a parameter that the optimizer keeps, and keeps and uses in a step
    TB/s    bytes that the step must move (`count_bytes`) over GPU time, on a CPU over wall time;
            % of a stream of 4 reads and 3 writes an element, measured in the same run
    launches, copies   of a step that finds one gradient moved, by torch's profiler
    x       times as fast as torch's fused AdamW
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cases import CASES, TINY_CASES, Case, count_bytes, gradients, make
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from fused_adamw import FusedAdamW
from fused_adamw.kernels.table import BLOCK

OURS, FUSED, AGAIN = "fused_adamw", "torch-fused", " again"
WARM_UP, LEAST_ROUNDS = 3, 3
LARGEST_ON_CPU = 150_000_000  # elements of the cases that a CPU runs unless they are named


class Provider(NamedTuple):
    """An optimizer to time."""

    build: Callable[..., torch.optim.Optimizer]
    moments: torch.dtype | None = None  # what each is stored in; None: as the parameter
    scratch: int = 0  # copies of all parameters that a step may need
    compiled: bool = False
    small: bool = False  # for cases of at most 500 tensors and 150M elements only


class External(NamedTuple):
    """An optimizer of another package."""

    module: str
    name: str
    options: dict[str, Any]
    moments: torch.dtype | None


ADAMW = torch.optim.AdamW
PROVIDERS = {
    OURS: Provider(FusedAdamW),
    FUSED: Provider(functools.partial(ADAMW, fused=True)),
    "torch-foreach": Provider(functools.partial(ADAMW, foreach=True), scratch=2),
    "torch-loop": Provider(functools.partial(ADAMW, foreach=False), scratch=1, small=True),
    "torch-compiled": Provider(
        functools.partial(ADAMW, foreach=True, capturable=True), compiled=True, small=True
    ),
}
OPT_IN = "torch-compiled"  # compiles for minutes
EXTERNALS = {
    "torchao-8bit": External("torchao.optim", "AdamW8bit", {}, torch.uint8),
    "bitsandbytes": External("bitsandbytes.optim", "AdamW", {}, torch.float32),
    "bitsandbytes-8bit": External("bitsandbytes.optim", "AdamW8bit", {}, torch.uint8),
    "apex": External("apex.optimizers", "FusedAdam", {"adam_w_mode": True}, torch.float32),
    "transformer-engine": External(
        "transformer_engine.pytorch.optimizers", "FusedAdam", {"adam_w_mode": True}, torch.float32
    ),
    "optimi": External("optimi", "AdamW", {}, None),
    "flashoptim": External("flashoptim", "FlashAdamW", {}, torch.uint8),
}


@dataclass
class Line:
    """What is known of one provider in one case. Times in µs, one a round."""

    case: str
    provider: str
    tensors: int
    numel: int
    bytes_moved: int
    problem: str = ""
    failed: bool = False  # for another reason than memory
    gpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    launches: int | None = None
    copies: int | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None

    def fail(self, error: Exception) -> None:
        """Note what went wrong, in one line."""
        words = str(error).strip().splitlines() or [""]
        self.problem = f"{type(error).__name__}: {words[0][:100]}"
        self.failed = not isinstance(error, (torch.OutOfMemoryError, MemoryError))

    @property
    def device_times(self) -> list[float]:
        """GPU times, on a CPU wall times."""
        return self.gpu or self.wall

    @property
    def tbs(self) -> float:
        """TB/s of the median step."""
        return self.bytes_moved / statistics.median(self.device_times) / 1e6


class Device:
    """Where the steps run, how to wait for it, and how to empty its cache."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        # read, not written: dirty lines would be written back during the step
        self._other = torch.randn((2**28 if self.cuda else 2**24), device=self.device)  # fp32
        self.flush()
        self.synchronize()
        start = time.perf_counter()
        self.flush()
        self.synchronize()
        self._flush_seconds = time.perf_counter() - start
        self.profiles = False
        if self.cuda:
            with contextlib.suppress(Exception):  # without CUPTI launches stay unknown
                self.profiles = count_launches(self.flush)[0] is not None

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.cuda:
            torch.cuda.synchronize()

    def flush(self, seconds: float = 0.0) -> None:
        """Replace what is in the cache; keep a GPU busy for at least that long."""
        # 400 leave room in the queue of 1024 launches; 0.1 s on an H200
        for _ in range(min(400, 1 + math.ceil(seconds / self._flush_seconds)) if seconds else 1):
            self._other.sum()

    def allocated(self) -> int:
        """Bytes in use on a GPU, else 0."""
        return torch.cuda.memory_allocated() if self.cuda else 0

    def free_bytes(self) -> int:
        """Bytes that can still be allocated."""
        if self.cuda:
            free, _ = torch.cuda.mem_get_info()
            return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of the call on the device.

        On a GPU from events, launch gaps included unless the GPU still has other work to do.
        """
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = _event(), _event()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@functools.cache
def stream_kernel() -> Any:
    """Triton's stream of 4 reads and 3 writes, with the block of the AdamW kernel."""
    import triton  # not there on every CPU machine, where torch's operations do it
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]  # triton ships no types
    def _stream(p_at, g_at, m_at, v_at, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        p, g = tl.load(p_at + at).to(tl.float32), tl.load(g_at + at).to(tl.float32)
        m, v = tl.load(m_at + at).to(tl.float32), tl.load(v_at + at).to(tl.float32)
        tl.store(p_at + at, ((p + g) * 0.5).to(p_at.dtype.element_ty))
        tl.store(m_at + at, ((m - g) * 0.5).to(p_at.dtype.element_ty))
        tl.store(v_at + at, ((v + g) * 0.5).to(p_at.dtype.element_ty))

    return _stream


def stream(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
    """Read four tensors and write three, each once: 28 bytes a float32 element."""
    if p.is_cuda:
        stream_kernel()[(p.numel() // BLOCK,)](p, g, m, v, BLOCK=BLOCK, num_warps=4)
        return
    # g stays in the cache between its three uses; smaller pieces cost more in calls than they save
    piece = 2**18
    for parts in zip(*(torch.split(x, piece) for x in (p, g, m, v)), strict=True):
        for x in parts[0], parts[2], parts[3]:
            x.add_(parts[1])


def measure_ceilings(device: Device, into: dict[str, list[float]], rounds: int) -> None:
    """Add TB/s, read and written, of a copy and of the stream, one a round."""
    numel = 2**28 if device.cuda else 2**24  # 1 GiB each, beyond any cache
    for dtype, name in (torch.float32, "fp32"), (torch.bfloat16, "bf16"):
        p, g, m, v = (torch.randn(numel, device=device.device).to(dtype) for _ in range(4))
        parts: dict[str, tuple[int, Callable[[], object]]] = {
            f"4R3W {name}": (7, functools.partial(stream, p, g, m, v)),
            f"copy {name}": (2, functools.partial(p.copy_, g)),
        }
        for part, (streams, call) in parts.items():
            call()
            for _ in range(rounds):
                device.flush(1e-3 * device.cuda)  # covers the launch: 20 us would be 1 %
                seconds = device.time(call)
                moved = streams * numel * dtype.itemsize
                into.setdefault(part, []).append(moved / seconds / 1e12)
        del p, g, m, v, parts, call
    if device.cuda:
        torch.cuda.empty_cache()


class Gradients:
    """The gradients of a case: new values in new tensors before each step, as backward leaves them.

    Their addresses stay, as those that torch's allocator hands out again after `zero_grad`.
    """

    def __init__(self, case: Case, params: Sequence[Tensor], device: torch.device) -> None:
        self.params = params
        self.views, self.buffers = gradients(case, device)

    def refresh(self) -> None:
        """Write new random values everywhere."""
        for buffer in self.buffers:
            buffer.normal_()
        for p, view in zip(self.params, self.views, strict=True):
            p.grad = view.detach()

    def move_one(self) -> None:
        """Put one gradient elsewhere, so that a step has to notice."""
        sizes = [view.numel() or math.inf for view in self.views]
        smallest = sizes.index(min(sizes))
        self.params[smallest].grad = self.views[smallest].clone()


class Entrant:
    """One optimizer in one case."""

    def __init__(
        self,
        provider: Provider,
        groups: list[dict[str, Any]],
        grads: Gradients,
        device: Device,
        line: Line,
    ) -> None:
        """Build it and take its first steps: compile, allocate, and see what that took."""
        before = device.allocated()
        optimizer = provider.build([dict(group) for group in groups])
        self.step: Callable[[], object] = optimizer.step
        if provider.compiled:
            self.step = torch.compile(lambda: optimizer.step())
        for _ in range(WARM_UP):
            grads.refresh()
            self.step()
        device.synchronize()
        if not device.cuda:
            states = [x for s in optimizer.state.values() for x in s.values()]
            line.state_bytes = sum(x.nbytes for x in states if isinstance(x, Tensor))
            return
        line.state_bytes = device.allocated() - before
        grads.refresh()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        torch.cuda.synchronize()
        line.peak_bytes = torch.cuda.max_memory_allocated() - before
        if device.profiles:
            grads.refresh()
            grads.move_one()
            line.launches, line.copies = count_launches(self.step)

    def time(self, device: Device, grads: Gradients, line: Line) -> None:
        """One round."""
        grads.refresh()
        device.flush()
        device.synchronize()
        start = time.perf_counter()
        self.step()
        returned = time.perf_counter()
        device.synchronize()
        line.wall.append((time.perf_counter() - start) * 1e6)
        if device.cuda:
            line.host.append((returned - start) * 1e6)
            grads.refresh()
            device.flush(1.2 * (returned - start))
            line.gpu.append(device.time(self.step) * 1e6)


def count_launches(step: Callable[[], object]) -> tuple[int | None, int | None]:
    """Kernels (and fills) and copies of one step on a GPU; None where the profiler saw nothing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        kinds = Counter(e.get("cat") for e in json.loads(path.read_text())["traceEvents"])
    if not kinds["kernel"]:
        return None, None
    return kinds["kernel"] + kinds["gpu_memset"], kinds["gpu_memcpy"]


def enter(
    case: Case, providers: dict[str, Provider], device: Device, lines: list[Line]
) -> tuple[list[tuple[Entrant, Line]], Gradients | None]:
    """Make the case and its optimizers. Who cannot run has the reason in its line."""
    lines.extend(
        Line(case.name, name, case.tensors, case.numel, count_bytes(case, moments=p.moments))
        for name, p in providers.items()
    )
    of_params = sum(leaf.numel * leaf.dtype.itemsize for leaf in case.leaves)

    def lacking(needed: int) -> str:
        free = device.free_bytes()
        if needed < 0.95 * free:
            return ""
        return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"

    problem = lacking(2 * of_params)
    if problem:
        for line in lines:
            line.problem = problem
        return [], None
    groups = make(case, device.device)
    grads = Gradients(case, [p for group in groups for p in group["params"]], device.device)
    entrants: list[tuple[Entrant, Line]] = []
    for line, (name, provider) in zip(list(lines), providers.items(), strict=True):
        if provider.small and (case.tensors > 500 or case.numel > LARGEST_ON_CPU):
            line.problem = "small cases only"
            continue
        of_moments = 2 * sum(x.numel * (provider.moments or x.dtype).itemsize for x in case.leaves)
        line.problem = lacking(of_moments + provider.scratch * of_params)
        if line.problem:
            continue
        try:
            entrant = Entrant(provider, groups, grads, device, line)
        except Exception as error:
            line.fail(error)
            continue
        entrants.append((entrant, line))
        if len(entrants) == 1:
            again = Line(case.name, name + AGAIN, case.tensors, case.numel, line.bytes_moved)
            again.launches, again.copies = line.launches, line.copies
            again.state_bytes, again.peak_bytes = line.state_bytes, line.peak_bytes
            entrants.append((entrant, again))
            lines.insert(lines.index(line) + 1, again)
    return entrants, grads


def run_case(
    case: Case,
    providers: dict[str, Provider],
    device: Device,
    rounds: int,
    seconds: float,
    advance: Callable[[float], None],
) -> list[Line]:
    """Time all providers on the case; `advance` is told of each round, as a part of all."""
    lines: list[Line] = []
    try:
        entrants, grads = enter(case, providers, device, lines)
    except Exception as error:  # the parameters themselves could not be made
        for line in lines:
            line.fail(error)
        return lines
    gc.collect()
    deadline = time.perf_counter() + seconds
    order = random.Random(0)
    for number in range(rounds):
        if grads is None or (number >= LEAST_ROUNDS and time.perf_counter() > deadline):
            break
        order.shuffle(entrants)
        for entrant, line in list(entrants):
            try:
                entrant.time(device, grads, line)
            except Exception as error:
                line.fail(error)
                entrants.remove((entrant, line))
        advance(1 / rounds)
    return lines


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """10th, 50th and 90th."""
    low, median, high = np.percentile(times, [10, 50, 90])
    return float(low), float(median), float(high)


def speedup(line: Line, base: Line | None, what: str) -> float | None:
    """How many times as fast as `base`: the median of the ratios within rounds."""
    if base is None or line.problem or base.problem:
        return None
    mine, others = getattr(line, what), getattr(base, what)
    return statistics.median(b / a for a, b in zip(mine, others, strict=True)) if mine else None


def commit() -> str:
    """Commit of this checkout, with a + where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout else "")


def machine(device: Device) -> dict[str, str]:
    """What the numbers depend on besides the code."""
    facts = {"device": f"CPU {platform.machine()}, {torch.get_num_threads()} threads"}
    if device.cuda:
        facts = {"device": torch.cuda.get_device_name(), "driver": "unknown"}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, check=True)
            facts["driver"] = answer.stdout.split("\n")[0].strip()
        except (OSError, subprocess.CalledProcessError):
            pass
        facts["CUDA"] = str(torch.version.cuda)
    try:
        triton = str(importlib.import_module("triton").__version__)
    except ImportError:
        triton = "none"
    python = platform.python_version()
    return {
        **facts,
        "torch": torch.__version__,
        "triton": triton,
        "python": python,
        "commit": commit(),
    }


def number(x: float | None, digits: int = 3) -> str:
    """Significant digits, thousands apart; a dash for what is not known."""
    if x is None:
        return "-"
    if 0 < abs(x) < 1:
        return f"{x:.{digits}f}" if abs(x) >= 0.01 else f"{x:.1g}"
    return f"{x:,.{max(0, digits - len(str(int(abs(x)))))}f}"


COLUMNS = {  # and the least width of each, so that cases line up
    "provider": 24,
    "GPU us": 9,
    "p10": 9,
    "p90": 9,
    "wall us": 9,
    "host us": 9,
    "launches": 8,
    "copies": 6,
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
    title = f"[bold]{case.name}[/]  {', '.join(facts)}{', not aligned' * case.unaligned}"
    table = Table(box=None, title=title, title_justify="left", title_style="", pad_edge=False)
    for column, width in COLUMNS.items():
        side = "left" if column == "provider" else "right"
        table.add_column(column, justify=side, min_width=width, no_wrap=True)  # type: ignore[arg-type]
    base = next((line for line in lines if line.provider == FUSED), None)
    for line in lines:
        style = "green" if line.provider.removesuffix(AGAIN) == OURS else ""
        if line.problem:
            continue
        low, middle, high = percentiles(line.device_times)
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
            number(state),
            number(peak),
            number(line.tbs),
            number(100 * line.tbs / ceiling),
            number(speedup(line, base, "gpu")),
            number(speedup(line, base, "wall")),
            style=style,
        )
    return table


def means(lines: Sequence[Line]) -> dict[str, dict[str, float]]:
    """Geometric mean over the cases of how many times as fast as torch's fused each provider is."""
    base = {line.case: line for line in lines if line.provider == FUSED}
    found: dict[str, dict[str, float]] = {}
    for provider in dict.fromkeys(line.provider for line in lines):
        for what in "gpu", "wall":
            ratios = [
                ratio
                for line in lines
                if line.provider == provider
                and (ratio := speedup(line, base.get(line.case), what)) is not None
            ]
            if ratios:
                known = found.setdefault(provider, {})
                known[what] = statistics.geometric_mean(ratios)
                known["cases"] = len(ratios)
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


COLORS = dict(
    zip(
        [FUSED, "torch-foreach", "torch-loop", OURS, OPT_IN, *EXTERNALS],
        [*(f"C{i}" for i in range(10)), "gold", "black"],
        strict=True,
    )
)


def draw(lines: Sequence[Line], ceilings: dict[str, float], title: str, folder: Path) -> None:
    """TB/s by case against the ceiling, host time by tensor count, memory a parameter."""
    shown = [x for x in lines if x.device_times and not x.problem and AGAIN not in x.provider]
    cases = list(dict.fromkeys(line.case for line in shown))
    providers = list(dict.fromkeys(line.provider for line in shown))
    if not shown:
        return
    thick = 0.8 / len(providers)
    height = 1.2 + len(cases) * (0.16 + 0.13 * len(providers))
    on_gpu = any(line.gpu for line in shown)

    for path, xlabel in (
        ("throughput.png", "TB/s: bytes that the step must move over its time"),
        ("memory.png", "bytes a parameter: kept by the optimizer, and pale what a step adds"),
    ):
        figure, axes = _figure(title, height)
        for line in shown:
            y = cases.index(line.case) + thick * (
                providers.index(line.provider) - (len(providers) - 1) / 2
            )
            color = COLORS[line.provider]
            if path == "throughput.png":
                axes.barh(y, line.tbs, thick * 0.9, color=color)
                continue
            state = (line.state_bytes or 0) / line.numel
            axes.barh(y, state, thick * 0.9, color=color)
            extra = max(0.0, (line.peak_bytes or 0) / line.numel - state)
            axes.barh(y, extra, thick * 0.9, left=state, color=color, alpha=0.35)
        for provider in providers:
            axes.barh(0, 0, color=COLORS[provider], label=provider)
        if path == "throughput.png":
            for (name, value), style in zip(ceilings.items(), ("-", ":"), strict=False):
                label = f"{name}: {value:.3g} TB/s"
                axes.axvline(value, color="black", linestyle=style, linewidth=1, label=label)
        axes.margins(x=0.03)
        axes.set_yticks(range(len(cases)), cases)
        axes.set(xlabel=xlabel, ylim=(len(cases) - 0.5, -0.5))
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
        axis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.set_minor_formatter("")
    _finish(figure, axes, folder / "host.png")


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


def write(
    path: Path,
    facts: dict[str, str],
    ceilings: dict[str, list[float]],
    lines: Sequence[Line],
    missing: dict[str, str],
) -> None:
    """All numbers, times one a round."""
    base = {line.case: line for line in lines if line.provider == FUSED}
    numbers = {
        "machine": facts,
        "ceilings": {name: statistics.median(values) for name, values in ceilings.items()},
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
                "tbs": line.tbs if line.device_times else None,
                "times_torch_fused": {
                    what: speedup(line, base.get(line.case), what) for what in ("gpu", "wall")
                },
            }
            for line in lines
        ],
    }
    path.write_text(json.dumps(numbers, indent=1))


def find_providers(
    names: Sequence[str] | None, cuda: bool
) -> tuple[dict[str, Provider], dict[str, str]]:
    """Providers that can be imported, in the order of the names, and why the others cannot."""
    wanted = names or [name for name in (*PROVIDERS, *EXTERNALS) if name != OPT_IN]
    found: dict[str, Provider] = {}
    missing: dict[str, str] = {}
    for name in wanted:
        if name in PROVIDERS:
            if PROVIDERS[name].compiled and not cuda:
                missing[name] = "on CUDA only"
            else:
                found[name] = PROVIDERS[name]
            continue
        external = EXTERNALS[name]
        try:
            build = getattr(importlib.import_module(external.module), external.name)
        except Exception as error:  # a broken native library raises whatever it likes
            no_such = isinstance(error, ModuleNotFoundError)
            missing[name] = "not installed" if no_such else f"{type(error).__name__}: {error}"
            continue
        found[name] = Provider(
            functools.partial(build, **external.options), moments=external.moments, scratch=1
        )
    return found, missing


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
    parser.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out/step"), help="default: %(default)s")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=8.0,
        help=f"of rounds in a case, beyond the first {LEAST_ROUNDS} (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}: nothing would be timed")

    device = Device()
    cases = [every[name] for name in args.cases or CASES]
    skipped: list[Case] = []
    if not args.cases and not device.cuda:
        skipped = [case for case in cases if case.numel > LARGEST_ON_CPU]
        cases = [case for case in cases if case not in skipped]
    providers, missing = find_providers(args.providers, device.cuda)

    console = Console(highlight=False)
    widest = sum(COLUMNS.values()) + 2 * len(COLUMNS)
    console.width = max(console.width, widest)
    facts = machine(device)
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
    ceilings: dict[str, list[float]] = {}
    by_case: dict[str, list[Line]] = {}
    lines: list[Line] = []
    columns = *Progress.get_default_columns()[:3], TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("ceilings", total=len(cases))
        measure_ceilings(device, ceilings, 10)
        for index, case in enumerate(cases):
            progress.update(task, description=case.name, completed=index)
            by_case[case.name] = run_case(
                case,
                providers,
                device,
                args.rounds,
                args.max_seconds,
                functools.partial(progress.advance, task),
            )
            lines.extend(by_case[case.name])
            write(path, facts, ceilings, lines, missing)  # what is known survives a crash
            gc.collect()
            # after an illegal access every CUDA call raises: the table still wants to be printed
            with contextlib.suppress(RuntimeError):
                if device.cuda:
                    torch.cuda.empty_cache()
        with contextlib.suppress(RuntimeError):
            measure_ceilings(device, ceilings, 10)
    write(path, facts, ceilings, lines, missing)

    medians = {name: statistics.median(values) for name, values in ceilings.items()}
    measured = (
        f"{name} {medians[name]:.3g} ({min(values):.3g} to {max(values):.3g})"
        for name, values in ceilings.items()
    )
    console.print("ceilings in TB/s, before and after:", ", ".join(measured), soft_wrap=True)
    if not device.cuda:
        console.print("(no ceiling on a CPU: a stream of torch operations, slower than one loop)")
    for case in cases:
        console.print()
        console.print(tabulate(case, by_case[case.name], medians["4R3W fp32"]))
        for line in by_case[case.name]:
            if line.problem:
                console.print(f"{line.provider:<{COLUMNS['provider']}}  [yellow]{line.problem}[/]")
    console.print()
    summary = Table("geometric mean, times as fast", "cases", "GPU", "wall", box=None)
    for column in summary.columns[1:]:
        column.justify = "right"
    for provider, mean in means(lines).items():
        summary.add_row(provider, str(mean["cases"]), number(mean.get("gpu")), number(mean["wall"]))
    if summary.row_count:
        console.print(summary)
    doubled = noise(lines)
    if doubled:
        console.print(
            f"noise: the same optimizer timed twice differs by {statistics.median(doubled):.1%} "
            f"(median), {max(doubled):.1%} (largest)"
        )
    shown = {name: medians[name] for name in ("4R3W fp32", "copy fp32")}
    draw(lines, shown, title, args.out)
    console.print(f"{path}, throughput.png, host.png, memory.png")
    return 1 if any(line.failed for line in lines if line.provider == OURS) else 0


if __name__ == "__main__":
    sys.exit(main())
