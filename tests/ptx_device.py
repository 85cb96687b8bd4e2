"""Lets kernels run on CPU tensors as Triton compiles them for a GPU that is not there: ptx.py."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import codegen
import ptx
import pytest
import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel

from fused_adamw import launch, plan
from fused_adamw.kernels import adamw, norm, nvidia, schedule


class Device:
    """From its making on CPU tensors are updated by code for an architecture, such as "sm_90"."""

    def __init__(self, patch: pytest.MonkeyPatch, architecture: str) -> None:
        self.architecture = architecture
        self.launches = 0
        self.prefetched: list[tuple[int, int]] = []  # by the last launch: first address, bytes
        # storages that were seen, by address: to look for all takes a tenth of a second
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        gc.collect()
        gc.freeze()  # what is there now need not be looked at for tensors
        assert isinstance(adamw._adamw, triton.JITFunction), "Triton has been imported to interpret"
        # no machine code is wanted, and none must get into the cache that GPUs use
        cache = Path(tempfile.gettempdir(), f"fused-adamw-ptx-{os.getuid()}")
        patch.setattr(triton.knobs.cache, "dir", str(cache))
        patch.setattr(CUDABackend, "make_cubin", lambda *arguments: b"")
        driver = codegen.Driver(codegen.TARGETS[architecture])
        patch.setattr(triton.runtime.driver, "_active", driver)
        patch.setattr(triton.JITFunction, "run", self._compile_and_run(triton.JITFunction.run))
        patch.setattr(
            CompiledKernel,
            "__getitem__",
            lambda compiled, grid: lambda *arguments, **_: self._run(compiled, grid, arguments),
        )
        patch.setattr(
            launch, "load_kernels", lambda device: launch.Kernels(norm, schedule, adamw, driver)
        )
        patch.setattr(plan, "architecture", lambda device: architecture)
        is_nvidia = nvidia.is_nvidia
        patch.setattr(nvidia, "is_nvidia", lambda x: x.type == "cpu" or is_nvidia(x))
        self._before: ptx.Machine | None = None  # of the last launch
        self._began_early = False

    def _compile_and_run(self, compile_: Callable[..., Any]) -> Callable[..., Any]:
        """JITFunction.run, whose launches come here."""

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            compiled = compile_(kernel, *args, grid=grid, warmup=True, **kwargs)
            if not warmup:
                named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
                self._run(compiled, grid, [named.get(name) for name in compiled.src.signature])
            return compiled

        return run

    def _run(self, compiled: Any, grid: tuple[int, ...], arguments: Any) -> None:
        """Run what is compiled to its end, all programs of the grid."""
        assert all(n == 1 for n in grid[1:]), grid
        program = _parsed(compiled.asm["ptx"])
        types = compiled.src.signature.values()
        given = [*_passed(arguments, types), 0, 0]  # and Triton's scratch, which none uses
        named = dict(zip(program.params, given, strict=True))
        meta = compiled.metadata
        before = self._before if meta.launch_pdl else None
        machine = ptx.Machine(self._memory(), self._more_memory, before)
        machine.launch(program, named, grid[0], meta.num_warps * ptx.WARP, meta.shared)
        assert not (meta.launch_pdl and self._began_early), (
            "two in a row: the wait of the second does not cover the first"
        )
        self._before, self._began_early = machine, meta.launch_pdl
        self.prefetched = machine.prefetched
        self.launches += 1

    def _memory(self) -> Iterator[ptx.Region]:
        """Of the storages that are known, those that are alive."""
        for address, reference in list(self._known.items()):
            storage = reference()
            if storage is None or storage.data_ptr() != address or not storage.nbytes():
                del self._known[address]
            else:
                yield ptx.region(address, storage.nbytes())

    def _more_memory(self) -> Iterator[Iterable[ptx.Region]]:
        """Of all tensors that are alive and no older than this; the youngest first."""
        for generation in range(3):
            for x in gc.get_objects(generation):
                if issubclass(type(x), torch.Tensor) and x.layout == torch.strided and x.is_cpu:
                    with contextlib.suppress(RuntimeError):  # torch.compile's have no memory
                        storage = x.untyped_storage()
                        self._known[storage.data_ptr()] = weakref.ref(storage)
            yield self._memory()


@functools.cache
def _parsed(text: str) -> ptx.Program:
    return ptx.parse(text)


def _passed(arguments: Any, types: Any) -> Iterator[int]:
    """What the launch passes: addresses and numbers, but what is compiled in."""
    for x, kind in zip(arguments, types, strict=True):
        if isinstance(kind, tuple):
            yield from _passed(x, kind)
        elif kind != "constexpr":
            value = x.data_ptr() if isinstance(x, torch.Tensor) else x
            assert isinstance(value, int), value
            yield value
