"""kernels/front.py: what was launched once is launched by its handle, with the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fused_adamw import FusedAdamW
from fused_adamw import plan as planning
from fused_adamw.kernels.front import Call, Front, Launched
from fused_adamw.kernels.launch_parameters import LaunchParameters

ALIGNED = {"words", "scalars", "scalars64", "rows", "counted"}  # as they are compiled for


class Kernel:
    """Stands for a kernel of Triton, or for what it compiled: notes how it is launched."""

    def __init__(self, compiled: Kernel | None = None) -> None:
        self.compiled = compiled
        self.seen: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Kernel | None]:
        def launch(*arguments: Any, **rest: Any) -> Kernel | None:
            self.seen.append((grid, arguments, rest))
            return self.compiled

        return launch


def call() -> Call:
    return Call({"A": 1, "B": "x"}, {"num_warps": 4})


def test_the_second_launch_goes_by_the_handle() -> None:
    handle = Kernel()
    kernel, front = Kernel(handle), Front()
    assert front.launch(kernel, "key", 5, (1, None), call) is None
    assert front.launch(kernel, "key", 5, (2, None), call) is not None
    assert kernel.seen == [((5,), (1, None), {"A": 1, "B": "x", "num_warps": 4})]
    assert handle.seen == [((5, 1, 1), (2, None, 1, "x"), {})]


def test_a_launch_goes_again_with_other_last_arguments() -> None:
    seen: list[Any] = []

    def handle(*arguments: Any, stream: int | None) -> None:
        seen.append((arguments, stream))

    x = torch.ones(3)
    launched = Launched(handle, (x, None, 5, 6), ("A",)).with_addresses()
    launched.again(stream=None)
    launched.again(7, 8, stream=9)
    at = x.data_ptr()
    assert seen == [((at, None, 5, 6, "A"), None), ((at, None, 7, 8, "A"), 9)]


def test_another_key_or_number_of_programs_has_another_handle() -> None:
    kernel, front = Kernel(Kernel()), Front()
    for _ in range(2):
        for key, programs in ("key", 5), ("key", 6), ("other", 5):
            front.launch(kernel, key, programs, (), call)
    assert [seen[0] for seen in kernel.seen] == [(5,), (6,), (5,)]


def test_another_device_has_another_handle() -> None:
    kernel = Kernel(Kernel())
    for front in (Front(), Front()):
        front.launch(kernel, "key", 5, (), call)
    assert len(kernel.seen) == 2


def test_what_is_not_compiled_has_no_handle() -> None:
    """Triton's interpreter."""
    kernel, front = Kernel(), Front()
    for _ in range(2):
        front.launch(kernel, "key", 5, (), call)
    assert len(kernel.seen) == 2


def arguments_of(kernel: Any) -> list[str]:
    code = kernel.fn.__code__
    return list(code.co_varnames[: code.co_argcount])


def instead_of_launching(note: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not launched: `note` is told of each, what it is compiled for ready-made."""

    def launch(
        self: Front, kernel: Any, key: object, programs: int, arguments: Any, call: Any
    ) -> None:
        note(kernel, key, arguments, call())

    monkeypatch.setattr(Front, "launch", launch)


def test_a_key_stands_for_all_that_is_compiled(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches that differ in constants, options or absent arguments have different keys."""
    compiled: dict[object, set[str]] = {}

    def note(kernel: Any, key: object, arguments: tuple[Any, ...], call: Call) -> None:
        for name, x in zip(arguments_of(kernel), arguments, strict=False):
            if isinstance(x, torch.Tensor) and name in ALIGNED:
                assert x.data_ptr() % 16 == 0, name
        what = call, [None if x is None else getattr(x, "dtype", int) for x in arguments]
        compiled.setdefault(key, set()).add(f"{kernel.fn.__name__} {what}")

    instead_of_launching(note, monkeypatch)
    kinds: list[tuple[list[torch.dtype], dict[str, Any]]] = [
        ([torch.float32], {}),
        ([torch.bfloat16], {"amsgrad": True}),
        ([torch.bfloat16, torch.float32], {}),
        ([torch.float64], {}),
        ([torch.bfloat16], {"stochastic_rounding": True}),
        ([torch.bfloat16], {"master_weights": True, "state_dtype": "int8"}),
        ([torch.float32], {"eps": 1e-40}),
    ]
    for parameters in LaunchParameters(), LaunchParameters(block=512, num_warps=2):
        monkeypatch.setattr(planning, "launch_parameters", lambda _, own=parameters: own)
        for dtypes, options in kinds:
            params = [torch.nn.Parameter(torch.ones(2, 64, device=device).to(d)) for d in dtypes]
            for p in params:
                p.grad = torch.ones_like(p)
            adamw: Any = FusedAdamW(params, backend="triton", **options)
            one = torch.ones((), device=device)
            for scale, inf in ((None, None), (one, None), (one, one), (None, one)):
                for norm, skip in ((None, False), (1.0, False), (None, True)):
                    for measured in (False, True):
                        adamw.grad_scale, adamw.found_inf = scale, inf
                        adamw.max_grad_norm, adamw.skip_nonfinite = norm, skip
                        adamw.group_metrics = measured
                        adamw.step()
    assert len(compiled) > 100
    assert {key: what for key, what in compiled.items() if len(what) > 1} == {}


@pytest.mark.parametrize("clipped", [False, True], ids=["plain", "clipped"])
def test_constants_are_in_the_order_of_the_kernel(
    clipped: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the handle they go by position."""
    kernels = []

    def note(kernel: Any, key: object, arguments: tuple[Any, ...], call: Call) -> None:
        kernels.append(kernel.fn.__name__)
        assert arguments_of(kernel)[len(arguments) :] == list(call.constants)
        hash(key)

    instead_of_launching(note, monkeypatch)
    p = torch.nn.Parameter(torch.ones(3, device=device))
    p.grad = torch.ones_like(p)
    FusedAdamW([p], backend="triton", max_grad_norm=1.0 if clipped else None).step()
    assert kernels == ["_sum_squares"] * clipped + ["_schedule", "_adamw"]
