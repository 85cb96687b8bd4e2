"""The main kernel's arithmetic in torch operations: an emulation, for where no GPU runs the kernel.

It shares no code with kernels/update.py, only what is computed in which order, and rounded where;
tests/test_accuracy.py holds it to the kernel's bits in Triton's interpreter. A fused multiply-add
is taken in float64, where the product of two float32 numbers is exact, then rounded to float32:
about once in 2^29 the sum meets a tie in float64 first, and is rounded twice.

Decoupled AdamW alone: no amsgrad, no L2, no unscaling, and no second moment that overflows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adamw import reference


class Scalars(NamedTuple):
    """A row of the schedule's, in float32; a weight is 1-beta, or -beta where beta <= 1/2."""

    w1: float
    w2: float
    rsqrt_bias2: float
    eps: float
    neg_step_size: float
    decay: float


def schedule(group: Mapping[str, Any], step: int) -> Scalars:
    """Scalars of the `step`-th update, as kernels/schedule.py leaves them in float32."""
    s = reference.schedule(group, step)
    w1, w2 = (w if w < 0.5 else w - 1 for w in (s.one_minus_beta1, s.one_minus_beta2))
    exact = (w1, w2, s.rsqrt_bias2, s.eps.item(), s.neg_step_size, s.decay)
    return Scalars(*torch.tensor(exact, dtype=torch.float32).tolist())


def fma(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """a * b + c of float32 numbers."""
    return (a.double() * b + c).float()


def average(old: Tensor, new: Tensor, weight: float, square_error: Tensor) -> Tensor:
    """Twin of `_average`."""
    return fma(square_error, weight, old if weight > 0 else new)


def square_root(x: Tensor, noise: torch.Generator | None) -> Tensor:
    """Twin of `_sqrt`: IEEE, or with noise anywhere within the hardware's 2^-23."""
    exact = x.double().sqrt()  # MKL's in float32, which torch takes on a CPU: 0.6 % not to nearest
    return exact.float() if noise is None else _off(exact, 2**-23, noise)


def quotient(a: Tensor, b: Tensor, noise: torch.Generator | None) -> Tensor:
    """Twin of `_quotient`: IEEE, or with noise anywhere within the hardware's 2 ULP (2^-22)."""
    return a / b if noise is None else _off(a.double() / b, 2**-22, noise)


def _off(exact: Tensor, by: float, noise: torch.Generator) -> Tensor:
    """float32 numbers that are off by at most that part of themselves, and by a rounding."""
    uniform = torch.rand(exact.shape, generator=noise, dtype=torch.float64)
    return (exact * (1 + by * (2 * uniform - 1))).float()


def adamw_update(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, s: Scalars, noise: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `_adamw_update`, float32; p, m and v are returned."""
    m = average(m, g, s.w1, g - m)
    v = average(v, g * g, s.w2, fma(g, g, -v))
    d = square_root(v, noise) * s.rsqrt_bias2 + s.eps
    p = fma(p, s.decay, p) if s.decay else p
    return fma(quotient(m, d, noise), s.neg_step_size, p), m, v


class EmulatedKernel:
    """An optimizer of CPU parameters in one group: `step`, and `state` under torch's names.

    Moments that lie in `state` before the first step keep their dtype; others get the parameter's.
    `approximate` lets quotients and square roots be wrong at random, evenly over what the hardware
    guarantees: worse than any GPU is.
    """

    def __init__(self, params: Sequence[Tensor], approximate: bool = False, **options: Any) -> None:
        self.params = params
        self.group = {**options, "maximize": False, "decoupled_weight_decay": True}
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._noise = torch.Generator().manual_seed(0) if approximate else None
        self._steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter; each has a gradient."""
        self._steps += 1
        scalars = schedule(self.group, self._steps)
        for p in self.params:
            assert p.grad is not None
            state = self.state.setdefault(p, {})
            moments = [
                state.setdefault(key, torch.zeros_like(p)) for key in ("exp_avg", "exp_avg_sq")
            ]
            p32, g, m, v = (x.float() for x in (p, p.grad, *moments))
            updated = adamw_update(p32, g, m, v, scalars, self._noise)
            for x, new in zip((p, *moments), updated, strict=True):
                x.copy_(new)
