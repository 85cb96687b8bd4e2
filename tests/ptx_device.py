"""Lets kernels run on CPU tensors as Triton compiles them for a GPU that is not there: ptx.py."""

from __future__ import annotations

import functools
import gc
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ptx
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel

from fused_adamw import launch, plan
from fused_adamw.kernels import adamw, norm, schedule

# "sm_90", say, as pytest's environment has it; "": not wanted. tests/conftest.py asks for it.
ARCHITECTURE = "" if torch.cuda.is_available() else os.environ.get("FUSED_ADAMW_PTX", "")

prefetched: list[tuple[int, int]] = []  # by all launches: first address, bytes


class Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, ptx.WARP)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile_and_run(compile_: Callable[..., Any]) -> Callable[..., Any]:
    """JITFunction.run, whose launches come here."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = compile_(kernel, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
            _run(compiled, grid, [named.get(name) for name in compiled.src.signature])
        return compiled

    return run


def _run(compiled: Any, grid: tuple[int, ...], arguments: Any) -> None:
    """Run what is compiled to its end, all programs of the grid."""
    program = _parsed(compiled.asm["ptx"])
    types = compiled.src.signature.values()
    given = [*_passed(arguments, types), 0, 0]  # and Triton's scratch, which none uses
    named = {name: value for (name, _), value in zip(program.params, given, strict=True)}
    machine, meta = ptx.Machine(_memory(), _more_memory), compiled.metadata
    machine.launch(program, named, grid[0], meta.num_warps * ptx.WARP, meta.shared)
    prefetched.extend(machine.prefetched)


@functools.cache
def _parsed(text: str) -> ptx.Program:
    return ptx.parse(text)


def _passed(arguments: Any, types: Any) -> Iterator[int]:
    """What the launch passes: addresses and numbers, but what is compiled in."""
    for x, kind in zip(arguments, types, strict=False):
        if isinstance(kind, tuple):
            yield from _passed(x, kind)
        elif kind != "constexpr":
            yield x.data_ptr() if isinstance(x, torch.Tensor) else x


# storages that were seen, by address; a scan for them takes a tenth of a second
_known: dict[int, weakref.ref[torch.UntypedStorage]] = {}


def _memory() -> Iterator[ptx.Region]:
    """Of the storages that are known, those that are alive."""
    for address, reference in list(_known.items()):
        storage = reference()
        if storage is None or storage.data_ptr() != address or not storage.nbytes():
            del _known[address]
        else:
            yield ptx.region(address, storage.nbytes())


def _more_memory() -> Iterator[Iterable[ptx.Region]]:
    """Of all tensors that are alive, and came after `install`; the youngest first."""
    for generation in range(3):
        for x in gc.get_objects(generation):
            if issubclass(type(x), torch.Tensor) and x.layout == torch.strided and x.is_cpu:
                storage = x.untyped_storage()
                _known[storage.data_ptr()] = weakref.ref(storage)
        yield _memory()


def install(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone CPU tensors are updated by code for `ARCHITECTURE`."""
    gc.collect()
    gc.freeze()  # what is there now need not be looked at for tensors
    # no machine code is wanted, and none must get into the cache that GPUs use
    patch.setenv("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir(), f"ptx-{os.getuid()}")))
    patch.setattr(CUDABackend, "make_cubin", lambda *arguments: b"")
    driver = Driver(int(ARCHITECTURE.removeprefix("sm_")))
    patch.setattr(triton.runtime.driver, "_active", driver)
    patch.setattr(triton.JITFunction, "run", _compile_and_run(triton.JITFunction.run))
    patch.setattr(
        CompiledKernel,
        "__getitem__",
        lambda compiled, grid: lambda *arguments: _run(compiled, grid, arguments),
    )
    patch.setattr(launch, "load_kernels", lambda device: launch.Kernels(norm, schedule, adamw))
    patch.setattr(plan, "architecture", lambda device: ARCHITECTURE)
    is_nvidia = adamw._is_nvidia
    patch.setattr(adamw, "_is_nvidia", lambda x: x.type == "cpu" or is_nvidia(x))
