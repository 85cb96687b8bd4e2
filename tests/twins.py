"""Ours and torch's optimizer side by side: equal params, equal gradients, compared bit by bit.

What is compared with torch is float64 (float32 where GradScaler wants it): there the roundings are
1e-15, so that anything above CONTRACT is a difference in what is done, not in how it is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from truth import same_bits, set_grad

from fused_adamw import FusedAdamW

TORCH_VERSION = tuple(int(n) for n in torch.__version__.split(".")[:2])
CONTRACT = {"rtol": 1e-12, "atol": 1e-14}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}  # some ULPs of float32, over 6 steps
F64 = torch.float64
OPTIONS = {"lr": 0.05, "weight_decay": 0.1}


def make_params(device: torch.device, dtype: torch.dtype = F64) -> list[Parameter]:
    """Three small tensors: a matrix in another layout, a vector, a scalar."""
    shapes = [torch.randn(4, 3).t(), torch.randn(9), torch.randn(())]
    return [Parameter(x.to(device, dtype)) for x in shapes]


def clones(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def beside_torch(
    device: torch.device, backend: str, **options: Any
) -> tuple[FusedAdamW, torch.optim.AdamW]:
    """Ours and torch's for-loop with equal params."""
    params = make_params(device)
    options = {**OPTIONS, **options}
    theirs = torch.optim.AdamW(clones(params), foreach=False, **options)
    return FusedAdamW(params, backend=backend, **options), theirs


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_grads(*optimizers: torch.optim.Optimizer, absent: int | None = None) -> None:
    """The same new gradients to the params of each, in order; `absent` gets none."""
    for i, same in enumerate(zip(*map(params_of, optimizers), strict=True)):
        grad = None if i == absent else torch.randn_like(same[0], requires_grad=False)
        for p in same:
            set_grad(p, None if grad is None else grad.to(p.dtype, copy=True))


def step_all(*optimizers: torch.optim.Optimizer, absent: int | None = None) -> None:
    give_grads(*optimizers, absent=absent)
    for optimizer in optimizers:
        optimizer.step()


def assert_same(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, tolerance: Any = None
) -> None:
    """Params and all state are equal to 1e-12; with tolerance 0 bit by bit."""
    for p, twin in zip(params_of(ours), params_of(theirs), strict=True):
        mine, its = ours.state.get(p, {}), theirs.state.get(twin, {})
        assert mine.keys() == its.keys()
        pairs = [(p, twin), *((mine[key], its[key]) for key in mine)]
        for a, b in pairs:
            if tolerance == 0:
                assert same_bits(a, b)
            else:
                torch.testing.assert_close(
                    a.cpu(), b.cpu(), check_dtype=False, **(tolerance or CONTRACT)
                )


def go_on_alike(
    ours: torch.optim.Optimizer,
    theirs: torch.optim.Optimizer,
    steps: int = 2,
    absent: int | None = None,
    tolerance: Any = None,
) -> None:
    """Steps of both with the same gradients, after each of which they are the same."""
    for _ in range(steps):
        step_all(ours, theirs, absent=absent)
        assert_same(ours, theirs, tolerance)


class Wrapper(Tensor):
    """Like DTensor: a subclass whose memory is elsewhere, with a dispatch of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        wrapper: Wrapper = Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, requires_grad=True
        )
        return wrapper

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


def snapshot(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Bits of all params, gradients and state, and the groups' other values."""
    params = [p for p in params_of(optimizer) if not isinstance(p, Wrapper)]  # has no memory
    states = [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
        if p in optimizer.state
        else None
        for p in params
    ]
    groups = [
        {k: v for k, v in group.items() if k not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    return [[p.detach().clone() for p in params], states, groups]


def assert_unchanged(optimizer: torch.optim.Optimizer, before: list[Any]) -> None:
    now = snapshot(optimizer)
    for old, new in zip(before[0], now[0], strict=True):
        assert same_bits(old, new)
    for old, new in zip(before[1], now[1], strict=True):
        assert (old is None) == (new is None)
        if old is not None:
            assert old.keys() == new.keys()
            for key, value in old.items():
                if isinstance(value, Tensor) and value.device.type != "meta":
                    assert same_bits(value, new[key]), key
    assert before[2] == now[2]
