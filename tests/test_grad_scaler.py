"""torch's protocol between GradScaler and an optimizer that unscales and skips by itself."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from truth import same_bits
from twins import (
    F64,
    FLOAT32,
    OPTIONS,
    assert_same,
    assert_unchanged,
    beside_torch,
    clones,
    give_grads,
    make_params,
    params_of,
    snapshot,
    step_all,
)

from fused_adamw import FusedAdamW

each = pytest.mark.parametrize


def scaled_pair(
    device: torch.device, backend: str, **options: Any
) -> tuple[FusedAdamW, torch.optim.AdamW, list[torch.amp.GradScaler]]:
    params = make_params(device, torch.float32)
    scalers = [
        torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=2) for _ in range(2)
    ]
    theirs = torch.optim.AdamW(clones(params), **OPTIONS, fused=True)
    return FusedAdamW(params, **OPTIONS, backend=backend, **options), theirs, scalers


@each("unscale_first", [False, True], ids=["", "unscale_"])
@each("fused", [None, False], ids=["in_kernel", "by_scaler"])
def test_grad_scaler(
    device: torch.device, backend: str, unscale_first: bool, fused: bool | None
) -> None:
    """Step by step beside torch's fused AdamW: the third gradient has an inf, the fourth a NaN."""
    ours, theirs, scalers = scaled_pair(device, backend, fused=fused)
    both = (ours, theirs)
    for step in range(6):
        xs = [torch.randn_like(p, requires_grad=False) for p in params_of(ours)]
        bad = {2: float("inf"), 3: float("nan")}.get(step)
        if bad is not None:
            xs[1][4] = bad
        befores = [snapshot(o) for o in both]
        for optimizer, scaler in zip(both, scalers, strict=True):
            optimizer.zero_grad()
            loss = sum((p * x).sum() for p, x in zip(params_of(optimizer), xs, strict=True))
            assert isinstance(loss, Tensor)
            scaler.scale(loss).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert_same(ours, theirs, tolerance=FLOAT32)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for p, twin, x in zip(params_of(ours), params_of(theirs), xs, strict=True):
            assert p.grad is not None
            if fused is None:  # where the scaler does it, it unscales a skipped step's too
                torch.testing.assert_close(p.grad, twin.grad, **FLOAT32)
            if bad is None:
                torch.testing.assert_close(p.grad, x, **FLOAT32)  # unscaled, and only once
        if bad is not None:
            assert_unchanged(ours, befores[0])
        assert not hasattr(ours, "found_inf")
    assert {float(s["step"]) for s in ours.state.values()} == {4}


@each(
    "options, supports",
    [
        ({}, True),
        ({"fused": True}, True),
        ({"fused": False}, False),
        ({"foreach": True}, True),
        ({"foreach": True, "fused": False}, False),
        ({"differentiable": True}, False),
    ],
    ids=str,
)
def test_step_supports_amp_scaling(options: dict[str, bool], supports: bool) -> None:
    optimizer = FusedAdamW([Parameter(torch.ones(1))], **options)
    assert optimizer._step_supports_amp_scaling is supports
    assert copy.deepcopy(optimizer)._step_supports_amp_scaling is supports
    saved = torch.optim.AdamW([Parameter(torch.ones(1))], fused=not supports).state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer._step_supports_amp_scaling is supports


@each("found_inf", [1.0, 2.0, float("inf"), float("nan")])
@each("grad_scale", [None, 4.0], ids=["no_scale", "scale"])
def test_any_found_inf_skips(
    device: torch.device, backend: str, found_inf: float, grad_scale: float | None
) -> None:
    """It is a sum over devices, so 2 as well as 1; and it counts without a scale, too."""
    ours, theirs = beside_torch(device, backend)
    step_all(ours, theirs)
    before = snapshot(ours)
    give_grads(ours, theirs)
    grads = [p.grad.clone() for p in params_of(ours) if p.grad is not None]
    ours.grad_scale = grad_scale and torch.tensor(grad_scale, device=device)  # type: ignore[attr-defined]
    ours.found_inf = torch.tensor(found_inf, device=device)  # type: ignore[attr-defined]
    ours.step()
    assert_unchanged(ours, before)
    for p, kept in zip(params_of(ours), grads, strict=True):
        assert p.grad is not None
        assert same_bits(p.grad, kept)
    del ours.grad_scale, ours.found_inf  # type: ignore[attr-defined]
    ours.step()
    theirs.step()
    assert_same(ours, theirs)


def test_no_found_inf_without_a_scale_is_a_plain_step(device: torch.device, backend: str) -> None:
    """As after scaler.unscale_(): gradients are not unscaled again."""
    ours, theirs = beside_torch(device, backend)
    ours.grad_scale = None  # type: ignore[attr-defined]
    ours.found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
    step_all(ours, theirs)
    assert_same(ours, theirs)


@each("kind", ["transposed", "strided", "expanded"])
def test_unscaled_gradients_of_another_layout(
    device: torch.device, backend: str, kind: str
) -> None:
    """What is left behind is unscaled there, too; an expanded one cannot be written in place."""
    value = torch.randn(4, 4, dtype=F64, device=device)
    layouts: dict[str, Callable[[], Tensor]] = {
        "transposed": lambda: value.t().contiguous().t(),
        "strided": lambda: torch.stack([value, value], -1)[..., 0],
        "expanded": lambda: value[0].clone().expand(4, 4),
    }
    p, twin = (Parameter(torch.ones(4, 4, dtype=F64, device=device)) for _ in range(2))
    ours, theirs = FusedAdamW([p], backend=backend), torch.optim.AdamW([twin], foreach=False)
    for _ in range(2):
        p.grad = layouts[kind]()
        want = p.grad.clone() / 8
        twin.grad = want.clone()
        ours.grad_scale = torch.tensor(8.0, device=device)  # type: ignore[attr-defined]
        ours.found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
        ours.step()
        theirs.step()
        assert same_bits(p.grad, want)
        assert_same(ours, theirs)


@contextlib.contextmanager
def hooked(optimizer: torch.optim.Optimizer, hook: Callable[..., None]) -> Iterator[None]:
    """With a hook before its steps."""
    handle = optimizer.register_step_pre_hook(hook)
    yield
    handle.remove()


@each("by_hook", [True, False], ids=["hook", "step"])
@each("fused", [None, False], ids=["in_kernel", "by_scaler"])
def test_a_step_that_raises_leaves_no_scale_behind(
    device: torch.device, backend: str, fused: bool | None, by_hook: bool
) -> None:
    """Or GradScaler multiplies the next one into it. Beside torch's default, where it unscales."""
    p, q = (Parameter(torch.linspace(-1, 1, 8, device=device)) for _ in range(2))
    ours = FusedAdamW([p], lr=0.1, backend=backend, fused=fused)  # type: ignore[arg-type]
    theirs = torch.optim.AdamW([q], lr=0.1)
    scalers = [torch.amp.GradScaler(device.type, init_scale=1024.0) for _ in range(2)]

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    for step in range(4):
        for x, optimizer, scaler in zip((p, q), (ours, theirs), scalers, strict=True):
            x.grad = torch.linspace(1, step + 2, 8, device=device)
            x.grad *= scaler.scale(torch.ones_like(x))
            if step != 1:
                scaler.step(optimizer)
            elif by_hook:
                with hooked(optimizer, full), pytest.raises(OSError, match="disk"):
                    scaler.step(optimizer)
            elif optimizer is ours:
                ours.param_groups[0]["weight_decay"] = -1.0
                with pytest.raises(ValueError, match="weight_decay"):
                    scaler.step(ours)
                ours.param_groups[0]["weight_decay"] = 0.01
            if step != 1 or by_hook or optimizer is ours:
                scaler.update()
        assert not hasattr(ours, "grad_scale")
        assert not hasattr(ours, "found_inf")
        torch.testing.assert_close(p, q, **FLOAT32)


def test_a_subclass_may_try_again(device: torch.device, backend: str) -> None:
    class Patient(FusedAdamW):
        def step(self, closure: Any = None) -> Any:
            try:
                return super().step(closure)
            except ValueError:
                self.param_groups[0]["weight_decay"] = 0.01
                return super().step(closure)

    FusedAdamW([Parameter(torch.ones(1, device=device))])  # its step has hooks of its own by now
    p = Parameter(torch.ones(4, device=device))
    optimizer: Any = Patient([p], max_grad_norm=1e9, backend=backend)  # type: ignore[arg-type]
    optimizer.param_groups[0]["weight_decay"] = -1.0
    p.grad = torch.full_like(p, 8)
    optimizer.grad_scale = torch.tensor(8.0, device=device)
    optimizer.found_inf = torch.tensor(0.0, device=device)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == 2
    assert optimizer.grad_scale == 8  # GradScaler takes it back


def test_group_that_is_differentiable_leaves_unscaling_to_the_scaler(device: torch.device) -> None:
    p, q = (Parameter(torch.ones(3, device=device)) for _ in range(2))
    ours = FusedAdamW([{"params": [p]}, {"params": [q], "differentiable": True}])
    assert not ours._step_supports_amp_scaling
    ours.found_inf = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="fused=False"):
        ours.step()


@each("dtype", [torch.float64, torch.float16], ids=str)
def test_a_scale_of_any_dtype(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """GradScaler's is float32; who sets the attributes by hand may have another."""
    ours, theirs = beside_torch(device, backend)
    give_grads(ours, theirs)
    for p in params_of(ours):
        assert p.grad is not None
        p.grad *= 8
    ours.grad_scale = torch.tensor(8.0, dtype=dtype, device=device)  # type: ignore[attr-defined]
    ours.found_inf = torch.tensor(0.0, dtype=dtype, device=device)  # type: ignore[attr-defined]
    for optimizer in (ours, theirs):
        optimizer.step()
    assert_same(ours, theirs)
    before = snapshot(ours)
    ours.found_inf.fill_(1.0)  # type: ignore[attr-defined]
    ours.step()
    assert_unchanged(ours, before)
