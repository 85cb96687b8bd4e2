"""One device's part of a step: bring its table up to date, then launch the kernels that read it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .hypers import GroupRows
from .kernels import table as t
from .kernels.front import Front, Launched
from .kernels.launch_parameters import LaunchParameters
from .norm import Clipping

MIN_TRITON = (3, 6)


class Kernels(NamedTuple):
    """The modules that need Triton."""

    norm: ModuleType
    schedule: ModuleType
    adamw: ModuleType
    driver: Any  # triton.runtime's


def load_kernels(device: torch.device) -> Kernels:
    """Import the kernels; RuntimeError with the cure where Triton cannot run on the device."""
    install = f'pip install "triton>={".".join(map(str, MIN_TRITON))}"'
    try:
        import triton
    except ImportError as error:
        raise RuntimeError(
            f"FusedAdamW updates {device.type} tensors with Triton, which is not installed. "
            f"Install it ({install}; torch's GPU wheels bring it), or pass backend='reference'."
        ) from error
    if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
        raise RuntimeError(
            f"FusedAdamW needs Triton >= {'.'.join(map(str, MIN_TRITON))} on {device.type} tensors "
            f"but {triton.__version__} is installed, which cannot compile its kernels. Upgrade "
            f"torch (2.11 brings Triton 3.6) or Triton ({install}), or pass backend='reference'."
        )
    from .kernels import adamw, norm, schedule

    interpreted = not isinstance(adamw._adamw, triton.runtime.JITFunction)
    if device.type != "cpu" and interpreted:
        raise RuntimeError(
            f"TRITON_INTERPRET is set, and Triton's interpreter cannot read {device.type} tensors: "
            "unset it before triton is imported, or pass backend='reference'."
        )
    if device.type == "cpu" and not interpreted:
        raise RuntimeError(
            "backend='triton' runs CPU tensors only under Triton's interpreter: set "
            "TRITON_INTERPRET=1 before triton is imported, or use backend='auto'."
        )
    return Kernels(norm, schedule, adamw, triton.runtime.driver)


_HERE = contextlib.nullcontext()


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it the device is the current one, as Triton has it; _HERE if it is already."""
    if device.type == "cpu":
        return _HERE
    module = torch.get_device_module(device)
    if module.current_device() == device.index:  # as it nearly always is
        return _HERE
    context: contextlib.AbstractContextManager[Any] = module.device(device)
    return context


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream records a CUDA graph."""
    if device.type != "cuda":
        return False
    if torch.cuda.current_device() == device.index:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def stream_of(device: torch.device) -> torch.Stream | None:
    """The device's current stream; None on the CPU."""
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


def used_here(tensors: Iterable[Tensor]) -> None:
    """Keep memory, when it is freed, from being given out while its current stream may use it.

    torch gives freed memory to the next who asks on the stream that it was made on, at once.
    """
    for x in tensors:
        stream = stream_of(x.device)
        if stream is not None and x.layout == torch.strided:  # torch records no sparse ones
            x.record_stream(stream)


class Asked(NamedTuple):
    """What a step has to do besides the update."""

    grad_scale: Tensor | None  # as GradScaler sets them, on any device
    found_inf: Tensor | None
    clipping: Clipping
    measured: bool  # for group_metrics

    @property
    def variant(self) -> tuple[object, ...]:
        """What of it the kernels are compiled for."""
        skip = self.clipping.skip_nonfinite if self.clipping.wanted else None
        return self.grad_scale is not None, self.found_inf is not None, skip, self.measured


_ONLY_UPDATE = (False, False, None, False, False)  # the variant of a step that does nothing else


class Again(NamedTuple):
    """The launches of a step that did nothing but update; the next one's are the same but for lrs.

    With cold caches they take the host half as long as making their arguments anew.
    """

    rest: t.Words  # of the table; another number of groups comes with another, too
    parameters: LaunchParameters
    schedule: Launched
    adamw: Launched


class Launcher:
    """The device's copy of the table, and the launches that read it.

    A captured step gets memory and a pinned source of its own, reserved by the eager steps before:
    a graph replays the upload too, so neither may change while the graph lives.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kernels = load_kernels(device)
        self._front = Front()
        self.captured: list[object] = []
        self._sums: tuple[Tensor, ...] = ()  # float64 [meshes, n_sums], and each of its rows
        self._memory: t.Memory | None = None
        self._uploaded: t.Table | None = None
        self._reserve: tuple[t.Memory, Tensor] | None = None
        self._reserved_for: t.Words | None = None  # of the table: others of its words may change
        self._groups: t.Words = t.frozen(np.zeros(0, dtype=np.int64))
        self._whole: t.Table | None = None  # the plan's, with groups and what these ask for
        self._group_rows: GroupRows | None = None  # of the prepared step
        self._capturing = False  # whether that step is captured
        self._place: contextlib.AbstractContextManager[Any] = _HERE  # its `current`
        self._stream: int | None = None
        self._again: Again | None = None
        self._prepared: tuple[object, ...] = ()  # what the next launch is compiled for
        self._launched: set[tuple[object, ...]] = set()  # what earlier ones were

    @property
    def nbytes(self) -> int:
        """Device memory that this launcher keeps, for captured steps, too."""
        memories = [self._memory, None if self._reserve is None else self._reserve[0]]
        kept = [x for memory in memories if memory is not None for x in memory]
        return sum(x.nbytes for x in (*kept, *self._sums[:1]))

    def prepare(
        self,
        table: t.Table,
        groups: GroupRows,
        asked: Asked,
        one_mesh: bool = True,
        rows: Tensor | None = None,
    ) -> t.Table:
        """The table with its groups, when all that can fail before the first launch has not.

        one_mesh: whether the norm, if there is one, has one set of sums.
        rows: of measures, as kernels/adamw.py takes them, or None.

        Raises:
            RuntimeError: a stream is captured, and no step has reserved memory for this table, or
                launched the kernels that are asked for: compiling and loading them would break
                the capture.
        """
        self._group_rows = groups
        before = self._groups
        if groups.words is not before and groups.words.tobytes() != before.tobytes():
            self._groups = groups.words
        whole = self._whole
        if whole is None or table.rest is not whole.rest or whole.groups is not self._groups:
            tuned = table.parameters._replace(plain=groups.plain)
            if groups.exact:
                tuned = tuned.uncapped()._replace(exact=True)
            whole = dataclasses.replace(table, groups=self._groups, parameters=tuned)
        elif table.grads is not whole.grads:
            whole = whole.with_grads(table.grads)
        table = self._whole = whole
        self._place = current(self.device)
        capturing = self._capturing = is_capturing(self.device)
        if capturing and (self._reserve is None or not self._reserve[0].fits(table)):
            raise RuntimeError(
                "FusedAdamW.step() cannot be captured in a CUDA graph yet: its table is not "
                "reserved for the tensors of this step. Run one step() outside the capture before "
                "each capture, with gradients for the same parameters."
            )
        variant = asked.variant
        of_norm = variant[2] is not None and one_mesh
        self._prepared = table.signatures, table.parameters, (*variant, of_norm), bool(groups.rates)
        known = self._prepared in self._launched
        if capturing and not known:
            raise RuntimeError(
                "FusedAdamW.step() cannot be captured in a CUDA graph yet: no step has had these "
                "options (GradScaler, max_grad_norm, skip_nonfinite, group_metrics, L2 decay, a "
                "beta on the device or of at most 1/2, an eps that is subnormal or above 2^125), "
                "and its kernels would be compiled inside the capture. Run one step() with the "
                "same options outside the capture."
            )
        if not capturing and (table.rest is not self._reserved_for or self._reserve is None):
            with self._place:
                self._reserve_memory(table)
        if not known:
            assert self._memory is not None
            with self._place:
                store_grad = asked.grad_scale is not None
                self.kernels.adamw.compile_for(table, self._memory, store_grad, rows)
        return table

    def upload(self, table: t.Table, alive: object, kept: Iterable[Tensor] = ()) -> t.Memory:
        """Bring the device's copy of a prepared table up to date.

        `alive`: what the launches read and write besides; kept, as the table and the prepared
        rows are, where they are captured.
        `kept`: what of that lives from step to step, until others take its place.
        """
        if self._capturing:
            return self._record(table, alive)
        return self._upload(table, kept)

    def sum_squares(self, table: t.Table, memory: t.Memory, meshes: int) -> Sequence[Tensor]:
        """Sums of the squares of the gradients with each number of a mesh, to be added."""
        with self._place:
            sums, shape = self._sums, (meshes, table.n_sums)
            if self._capturing or not sums or sums[0].shape != shape:
                whole = torch.empty(shape, dtype=torch.float64, device=self.device)
                sums = whole, *whole
            if not self._capturing:  # else it is the graph's own memory
                self._sums = sums
            self.kernels.norm.sum_squares(self._front, table, memory.words, sums[0], meshes)
        return sums[1:]

    def launch(
        self,
        table: t.Table,
        memory: t.Memory,
        asked: Asked,
        norm: tuple[Tensor, Tensor] | None,
        measures: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Update the tensors of an uploaded table.

        norm: sums of squares of all gradients, to be added up, and where to note the metrics.
        measures: telemetry.py's Measures.
        """
        assert self._group_rows is not None
        rates = self._group_rows.rates
        only_update = self._prepared[2] == _ONLY_UPDATE
        if only_update and self._again is not None and self._launch_again(table, memory, rates):
            return
        with self._place:
            grad_scale, found_inf = self._scalar(asked.grad_scale), self._scalar(asked.found_inf)
            if self._capturing:
                self.captured.append((grad_scale, found_inf, norm, measures))
            rows, counted = measures or (None, None)
            given = None
            if norm is not None:
                given = self.kernels.schedule.Norm(*norm, asked.clipping.skip_nonfinite)
            first = self.kernels.schedule.schedule(
                self._front, table, memory, grad_scale, found_inf, given, counted, rates
            )
            second = self.kernels.adamw.adamw(
                self._front, table, memory, grad_scale is not None, rows
            )
            self._launched.add(self._prepared)
        if only_update and first is not None and second is not None and not self._capturing:
            both = first.with_addresses(), second.with_addresses()
            self._again = Again(table.rest, table.parameters, *both)

    def _launch_again(self, table: t.Table, memory: t.Memory, rates: tuple[int, ...]) -> bool:
        """Launch what the last step did, with other lrs; False, and nothing done, if that differs.

        For steps that only update.
        """
        again = self._again
        assert again is not None
        if (
            memory is not self._memory
            or self._place is not _HERE
            or table.rest is not again.rest
            or table.parameters != again.parameters
        ):
            return False
        again.schedule.again(*rates, stream=self._stream)
        again.adamw.again(stream=self._stream)
        return True

    def _scalar(self, x: Tensor | None) -> Tensor | None:
        if x is None or (x.device == self.device and x.dtype == torch.float32):
            return x
        return x.to(self.device, torch.float32, non_blocking=True)

    def _reserve_memory(self, table: t.Table) -> None:
        """Memory for this table, and for a captured step of it."""
        if self._memory is None or not self._memory.fits(table):
            self._memory, self._uploaded, self._again = t.allocate(table, self.device), None, None
        if self._reserve is None or not self._reserve[0].fits(table):
            self._reserve = t.allocate(table, self.device), self._host(table.n_words)
        self._reserved_for = table.rest

    def _upload(self, table: t.Table, kept: Iterable[Tensor]) -> t.Memory:
        """Eager: at most one asynchronous copy, of what has moved."""
        assert self._memory is not None
        stream, size = self._current_stream(), t.stale_words(table, self._uploaded)
        if stream != self._stream or (size and size == table.n_words):
            used_here((*self._memory, *self._sums[:1], *kept))
            self._stream = stream
        if size:
            # Fresh from torch's caching host allocator, which gives it out again only when the
            # copy is done. One buffer used again would be a race: the host runs ahead.
            host = self._host(size)
            t.write_words(table, host)
            self._memory.words[:size].copy_(host, non_blocking=True)
            self._uploaded = table
        return self._memory

    def _current_stream(self) -> int | None:
        """The current stream as Triton has it, quicker than torch's object; None on the CPU."""
        if self.device.type == "cpu":
            return None
        stream: int = self.kernels.driver.active.get_current_stream(self.device.index)
        return stream

    def _record(self, table: t.Table, alive: object) -> t.Memory:
        """Captured: the whole table, from a source that stays as it is."""
        assert self._reserve is not None
        memory, host = self._reserve
        self._reserve = None
        self.captured.append((memory, host, self._group_rows, alive))
        t.write_words(table, host)
        memory.words.copy_(host, non_blocking=True)
        return memory

    def _host(self, size: int) -> Tensor:
        pinned = self.device.type != "cpu"
        return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=pinned)
