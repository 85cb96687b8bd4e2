"""Where the steps run, and how fast memory moves there."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_adamw.kernels.table import BLOCK


def positive(text: str) -> int:
    """A number on the command line of which there has to be one at least."""
    if text.isdecimal() and int(text):
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of 1, 2, 3, ...")


class Device:
    """Where the steps run, how to wait for it, and how to empty its cache."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        # read, not written: dirty lines would be written back during the step
        self._other = torch.randn((2**28 if self.cuda else 2**24), device=self.device)  # fp32
        self.flush()
        self.synchronize()
        times = 20 if self.cuda else 1  # in a row: waiting for one takes half as long again
        start = time.perf_counter()
        for _ in range(times):
            self.flush()
        self.synchronize()
        self._flush_seconds = (time.perf_counter() - start) / times
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
        times = 1
        if seconds:
            # 20, of two entries each, leave room in the queue of 1024, of which torch's step of 465
            # groups takes 930; 6 ms on an H200
            times = min(20, 1 + math.ceil(seconds / self._flush_seconds))
            rest = seconds - times * self._flush_seconds
            if rest > 0:  # cycles, of a clock below 3 GHz
                torch.cuda._sleep(int(rest * 3e9))  # type: ignore[no-untyped-call]
        for _ in range(times):
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

    def time(self, call: Callable[[], object]) -> tuple[float, bool]:
        """Seconds of the call on the device, and whether that may have waited for the host.

        On a GPU from events. What it has been given before, by `flush`, has to last until the host
        has given it all of the call.
        """
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start, False
        begin, end = _event(), _event()
        begin.record()
        call()
        end.record()
        waited = bool(begin.query())
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3, waited


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
                seconds, _ = device.time(call)
                moved = streams * numel * dtype.itemsize
                into.setdefault(part, []).append(moved / seconds / 1e12)
        del p, g, m, v, parts, call
    if device.cuda:
        torch.cuda.empty_cache()


def ceiling(rounds: Sequence[float]) -> float:
    """What the device sustains: the median of the faster half of the rounds.

    An H200's memory was seen to be a tenth slower for a fraction of a second, then as before.
    """
    return statistics.median(sorted(rounds)[len(rounds) // 2 :])


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


def count_syncs(step: Callable[[], object]) -> int:
    """How often torch sees the host wait for the GPU in one step; calls of others it misses."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(str(x.message).startswith("called a synchronizing") for x in caught)


def find_commit() -> str:
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


def describe(device: Device, commit: str | None = None) -> dict[str, str]:
    """What the numbers depend on besides the case. commit: where git cannot tell."""
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
        "commit": commit or find_commit(),
    }
