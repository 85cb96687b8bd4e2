"""The timing itself: every provider on one case, in rounds."""

from __future__ import annotations

import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import Case, count_bytes, gradients, make
from machine import Device, count_launches, count_syncs
from providers import LARGEST_ON_CPU, Provider
from torch import Tensor

AGAIN = " again"
WARM_UP, LEAST_ROUNDS = 3, 3


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
    waited: bool = False  # the GPU did, for the host, within its times: they are left out
    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    launches: int | None = None
    copies: int | None = None
    syncs: int | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None

    def fail(self, error: Exception) -> None:
        """Note what went wrong, in one line."""
        words = str(error).strip().splitlines() or [""]
        self.problem = f"{type(error).__name__}: {words[0][:100]}"
        self.failed = not isinstance(error, (torch.OutOfMemoryError, MemoryError))

    @property
    def device_times(self) -> list[float]:
        """GPU times, on a CPU wall times; none where a GPU's are not known."""
        return [] if self.waited else self.gpu or self.wall

    @property
    def tbs(self) -> float | None:
        """TB/s of the median step, where its time is known."""
        times = self.device_times
        return self.bytes_moved / statistics.median(times) / 1e6 if times else None


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


def decay_lr(groups: Sequence[dict[str, Any]]) -> None:
    """A little, as a scheduler does in every step."""
    for group in groups:
        group["lr"] *= 0.999


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
        grads.refresh()  # the one that the last entrant has moved gives way
        before = device.allocated()
        optimizer = provider.build([dict(group) for group in groups])
        # a compiled step would be compiled again for each lr
        self.scheduled = [] if provider.compiled else optimizer.param_groups
        self.step: Callable[[], object] = optimizer.step
        if provider.step is not None:
            self.step = functools.partial(provider.step, optimizer)
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
        grads.refresh()
        line.syncs = count_syncs(self.step)
        if device.profiles:
            grads.refresh()
            grads.move_one()
            line.launches, line.copies = count_launches(self.step)

    def prepare(self, grads: Gradients) -> None:
        """New gradients, and another lr."""
        grads.refresh()
        decay_lr(self.scheduled)

    def time(self, device: Device, grads: Gradients, line: Line) -> None:
        """One round."""
        self.prepare(grads)
        device.flush()
        device.synchronize()
        start = time.perf_counter()
        self.step()
        returned = time.perf_counter()
        device.synchronize()
        line.wall.append((time.perf_counter() - start) * 1e6)
        if device.cuda:
            line.host.append((returned - start) * 1e6)
            ahead = returned - start
            for _ in range(3):
                ahead *= 1.5
                self.prepare(grads)
                device.flush(ahead)
                seconds, waited = device.time(self.step)
                if not waited:
                    break
            line.gpu.append(seconds * 1e6)
            line.waited |= waited


def enter(
    case: Case, providers: dict[str, Provider], device: Device, lines: list[Line]
) -> tuple[list[tuple[Entrant, Line]], Gradients | None]:
    """Make the case and its optimizers. Who cannot run has the reason in its line."""
    lines.extend(
        Line(
            case.name,
            name,
            case.tensors,
            case.numel,
            count_bytes(case, clips=p.clips, **p.stored),
        )
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
        moved = count_bytes(case, **provider.stored)
        of_state = (moved - of_params) // 2 - of_params  # all but the gradients is also written
        line.problem = lacking(of_state + provider.scratch * of_params)
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
            again.launches, again.copies, again.syncs = line.launches, line.copies, line.syncs
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
    for line in lines:
        if line.waited:
            line.gpu.clear()
    return lines
