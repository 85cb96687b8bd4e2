"""Where the kernels run: on the GPU if there is one, else on the CPU under Triton's interpreter.

pytest --ptx sm_90 ...: on the CPU, as Triton compiles them for that architecture (ptx.py).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

ON_CUDA = torch.cuda.is_available()
PTX_DEVICE = pytest.StashKey[Any]()
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, and so do their processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx", metavar="ARCHITECTURE", help="execute compiled code, as for sm_90")


def pytest_configure(config: pytest.Config) -> None:
    """Before a test imports triton, which looks at the environment, or what is replaced."""
    architecture = config.getoption("ptx", None)  # unknown where conftest.py is found late
    if ON_CUDA and architecture:
        raise pytest.UsageError("--ptx is for machines without a GPU: here the GPU runs the tests")
    os.environ.pop("FUSED_ADAMW_PTX", None)
    if architecture:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["FUSED_ADAMW_PTX"] = architecture  # for the ranks that tests start
        import ptx_device

        config.stash[PTX_DEVICE] = ptx_device.Device(pytest.MonkeyPatch(), architecture)
    elif not ON_CUDA:
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    compiled = config.stash.get(PTX_DEVICE, None)
    if compiled is not None and compiled.launches:  # xdist's processes have theirs
        terminalreporter.write_line(f"launches of {compiled.architecture}: {compiled.launches}")


@pytest.fixture
def as_compiled(request: pytest.FixtureRequest) -> Any:
    """What executes compiled code, a ptx_device.Device; None where nothing does."""
    return request.config.stash.get(PTX_DEVICE, None)


@pytest.fixture
def device() -> torch.device:
    """The device that the kernels are tested on."""
    return torch.device("cuda", 0) if ON_CUDA else torch.device("cpu")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both paths, which have to agree with torch and with each other."""
    return str(request.param)


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            _round_bf16_to_nearest(patch)
            _make_it_faster(patch)
        yield


def _round_bf16_to_nearest(patch: pytest.MonkeyPatch) -> None:
    # The interpreter truncates float32 -> bfloat16 where every GPU rounds to nearest even, and
    # takes float64 -> bfloat16 for a conversion to integers (torch goes by float32, as here). What
    # else it cannot represent: it rounds tl.fma twice, and its division and square root are IEEE
    # where the GPU's are approximate.
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def to_nearest(
        x: npt.NDArray[np.generic], source: tl.dtype, target: tl.dtype, mode: object
    ) -> npt.NDArray[np.generic]:
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(x).view(np.float32))
            return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        out: npt.NDArray[np.generic] = convert(x, source, target, mode)
        return out

    cast = interpreter.InterpreterBuilder.cast_impl

    def by_float32(self: Any, source: Any, target: tl.dtype) -> Any:
        if source.dtype.scalar == tl.float64 and target.scalar == tl.bfloat16:
            source = cast(self, source, tl.float32)
        return cast(self, source, target)

    patch.setattr(interpreter, "_convert_float", to_nearest)
    patch.setattr(interpreter.InterpreterBuilder, "cast_impl", by_float32)


def _make_it_faster(patch: pytest.MonkeyPatch) -> None:
    # The interpreter puts its own triton.language in place when a kernel starts, and again in each
    # function that the kernel calls, and takes it back at the end: a third of a step's time. Here
    # it stays, as nothing else is done with triton.language where TRITON_INTERPRET is set.
    import triton.language as tl
    from triton.runtime import interpreter

    put_in_place = interpreter._patch_lang
    patched: list[dict[str, Any]] = []  # the globals of functions: one dict a module

    def once(fn: Any) -> Any:
        if not any(fn.__globals__ is known for known in patched):
            put_in_place(fn)
            patched.append(fn.__globals__)
        return interpreter._LangPatchScope()  # of no patches: nothing to take back

    patch.setattr(interpreter, "_patch_lang", once)

    # makes a table of all dtypes in each call
    of_dtype = interpreter._get_np_dtype
    of_scalar = functools.cache(of_dtype)

    def np_dtype(x: tl.dtype) -> Any:
        return of_scalar(x) if type(x) is tl.dtype else of_dtype(x)  # others have no hash

    patch.setattr(interpreter, "_get_np_dtype", np_dtype)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
