"""AdamW in float64, written from the papers alone, and the one tolerance that the tests use."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter


class TrueAdamW:
    """One parameter's exact course, in float64: a second implementation, sharing nothing with ours.

    Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, algorithm 2; amsgrad as in
    https://openreview.net/forum?id=ryQu7f-RZ; complex parameters as pairs of reals.
    """

    def __init__(
        self,
        param: Tensor,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
    ) -> None:
        self.p = real64(param)
        self.m, self.v = torch.zeros_like(self.p), torch.zeros_like(self.p)
        self.v_max, self.t = torch.zeros_like(self.p), 0
        self.lr, (self.b1, self.b2), self.eps, self.wd = lr, betas, eps, weight_decay
        self.amsgrad, self.sign = amsgrad, -1 if maximize else 1
        self.decoupled = decoupled_weight_decay

    def step(self, grad: Tensor) -> None:
        """One update."""
        self.t += 1
        g = real64(grad) * self.sign
        if self.decoupled:
            self.p = self.p - self.lr * self.wd * self.p
        else:
            g = g + self.wd * self.p
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        self.v_max = torch.maximum(self.v_max, self.v)
        v_hat = (self.v_max if self.amsgrad else self.v) / (1 - self.b2**self.t)
        m_hat = self.m / (1 - self.b1**self.t)
        self.p = self.p - self.lr * m_hat / (v_hat.sqrt() + self.eps)


def real64(x: Tensor) -> Tensor:
    """The values in float64 on the CPU; a complex tensor as its real view."""
    x = x.detach().resolve_conj()
    return (torch.view_as_real(x) if x.is_complex() else x).to("cpu", torch.float64, copy=True)


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring values of `dtype` (a real one) at |x|, float64."""
    info = torch.finfo(dtype)
    return x.abs().clamp(min=info.smallest_normal).log2().floor().exp2() * info.eps


def assert_as_true_as_torch(
    ours: Sequence[Tensor],
    torchs: Sequence[Tensor],
    truth: Sequence[Tensor],
    slack: float = 1.0,
    reach: Sequence[Tensor] | None = None,
) -> None:
    """Fail where our error against float64 is larger than twice torch's own in the same dtype.

    Compared tensor by tensor, as the largest error; `slack` ULPs of the largest value are allowed
    besides, since in a few elements torch may round luckily: half of one is the rounding at the
    store. `reach` is the largest value of each tensor so far, where it may have come down since: a
    rounding made up there does not shrink with it.
    """
    reach = truth if reach is None else reach
    for index, (mine, its, exact) in enumerate(zip(ours, torchs, truth, strict=True)):
        if exact.numel() == 0:
            continue
        assert mine.dtype == its.dtype
        a, b = real64(mine), real64(its)
        dtype = torch.view_as_real(mine).dtype if mine.is_complex() else mine.dtype
        error, theirs = (a - exact).abs().max().item(), (b - exact).abs().max().item()
        allowed = 2 * theirs + slack * ulp(reach[index], dtype).max().item()
        if math.isnan(error) or not error <= allowed:  # torch's own NaN excuses nothing
            worst = int((a - exact).abs().argmax())
            raise AssertionError(
                f"tensor {index} {tuple(mine.shape)} {mine.dtype}: error {error:.3e}, torch's "
                f"{theirs:.3e}; first at flat index {worst}: ours {a.flatten()[worst]:.9g}, torch "
                f"{b.flatten()[worst]:.9g}, exact {exact.flatten()[worst]:.17g}"
            )


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)

# Shapes of 35 elements: more than 4 vectors of 8, and a tail of 3.
LAYOUTS: dict[str, Callable[[torch.dtype, torch.device], Tensor]] = {
    "contiguous": lambda t, d: torch.randn(5, 7, dtype=t, device=d),
    "transposed": lambda t, d: torch.randn(7, 5, dtype=t, device=d).t(),
    "channels_last": lambda t, d: torch.randn(1, 5, 7, 3, dtype=t, device=d).permute(0, 3, 1, 2),
    # one element into a buffer: a 16-bit tensor is then aligned to 2 bytes only
    "unaligned": lambda t, d: torch.randn(36, dtype=t, device=d)[1:].view(5, 7),
    "slice": lambda t, d: torch.randn(5, 9, dtype=t, device=d)[:, 1:8],  # gaps in its memory
    "0-dim": lambda t, d: torch.randn((), dtype=t, device=d),
    "empty": lambda t, d: torch.randn(0, 7, dtype=t, device=d),
}

# Gradients by how their memory relates to the param's.
GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "as_param": lambda p: torch.randn_like(p, requires_grad=False),
    "contiguous": lambda p: torch.randn(p.shape, dtype=p.dtype, device=p.device),
    "reversed": lambda p: torch.randn(p.shape[::-1], dtype=p.dtype, device=p.device).permute(
        list(reversed(range(p.dim())))
    ),
    "strided": lambda p: torch.randn(*p.shape, 2, dtype=p.dtype, device=p.device)[..., 1],
    "expanded": lambda p: torch.randn((), dtype=p.dtype, device=p.device).expand(p.shape),
    "conjugated": lambda p: torch.randn(p.shape, dtype=p.dtype, device=p.device).conj(),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "no_decay": {"weight_decay": 0.0},
    "l2": {"decoupled_weight_decay": False, "weight_decay": 0.1},
    "l2_no_decay": {"decoupled_weight_decay": False, "weight_decay": 0.0},
    "large_eps": {"eps": 0.1},
    "beta1_below_half": {"betas": (0.3, 0.95)},  # the other side of the one-sided average
    "beta2_below_half": {"betas": (0.9, 0.4)},
    "betas_one_half": {"betas": (0.5, 0.5)},  # where the two sides meet
    "betas_zero": {"betas": (0.0, 0.0)},
    "lr_zero": {"lr": 0.0},
    "l2_amsgrad_maximize": {
        "decoupled_weight_decay": False,
        "weight_decay": 0.1,
        "amsgrad": True,
        "maximize": True,
        "betas": (0.4, 0.9),
    },
}


def set_grad(param: Tensor, grad: Tensor | None) -> None:
    """`param.grad = grad` for a gradient of any dtype: torch lets in the param's own only."""
    own = param.data
    if grad is not None and grad.dtype != own.dtype:
        param.grad = None
        param.data = own.to(grad.dtype)
    param.grad = grad
    param.data = own


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits, NaN and the sign of 0 among them."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    lines = [x.detach().resolve_conj().resolve_neg().contiguous().flatten() for x in (a, b)]
    return torch.equal(*(x.view(torch.uint8) for x in lines))


class Race:
    """The same params and gradients for our optimizer, torch's for-loop and float64."""

    MOMENTS: ClassVar = {"exp_avg": "m", "exp_avg_sq": "v", "max_exp_avg_sq": "v_max"}

    def __init__(
        self,
        make: Callable[..., torch.optim.Optimizer],
        params: Sequence[Tensor],
        groups: Sequence[dict[str, Any]] = ({},),
        **options: Any,
    ) -> None:
        """Param i belongs to group i % len(groups); groups override `options`."""
        options = {"lr": 1e-2, "weight_decay": 0.1, **options}
        self.params = [Parameter(p) for p in params]
        self.twins = [Parameter(p.detach().clone()) for p in params]
        n = len(groups)
        self.ours = make(
            [{"params": self.params[i::n], **group} for i, group in enumerate(groups)], **options
        )
        self.theirs: list[torch.optim.Optimizer | None] = []
        for i, group in enumerate(groups):
            own = {**options, **group}
            decoupled = own.pop("decoupled_weight_decay", True)
            cls = torch.optim.AdamW if decoupled else torch.optim.Adam
            twins = self.twins[i::n]
            self.theirs.append(cls(twins, foreach=False, **own) if twins else None)
        self.truths = [TrueAdamW(p, **{**options, **groups[i % n]}) for i, p in enumerate(params)]
        self._reach = [
            {
                "p": real64(p).abs(),
                **{key: torch.zeros_like(real64(p)) for key in self.MOMENTS.values()},
            }
            for p in params
        ]

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """One step of all three; torch's gets the gradients in its param's dtype."""
        for i, grad in enumerate(grads):
            twin, exact = self.twins[i], self.truths[i]
            set_grad(self.params[i], grad)
            twin.grad = None if grad is None else grad.to(twin.dtype, copy=True)
            if grad is not None:
                exact.step(grad)
                for key, largest in self._reach[i].items():
                    torch.maximum(largest, getattr(exact, key).abs(), out=largest)
        before = [None if g is None else g.clone() for g in grads]
        self.ours.step()
        for theirs in self.theirs:
            if theirs is not None:
                theirs.step()
        for p, grad, kept in zip(self.params, grads, before, strict=True):
            assert p.grad is grad
            assert grad is None or kept is None or same_bits(grad, kept), "a gradient has changed"

    def check(self) -> None:
        """Params, moments and step counts after the steps so far."""
        for i, (p, twin, exact) in enumerate(
            zip(self.params, self.twins, self.truths, strict=True)
        ):
            theirs = self.theirs[i % len(self.theirs)]
            assert theirs is not None
            state, its = self.ours.state.get(p, {}), theirs.state.get(twin, {})
            assert state.keys() == its.keys()
            assert float(state.get("step", 0)) == exact.t
            keys = [key for key in self.MOMENTS if key in its]
            self.judge(i, [p, *(state[key] for key in keys)], [twin, *(its[key] for key in keys)])

    def judge(self, index: int, ours: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Param and moments of ours against another's: no further from float64 than twice its."""
        exact, keys = self.truths[index], ["p", *self.MOMENTS.values()][: len(ours)]
        slack = 1.0
        if self.params[index].numel() < 8:  # so few that torch may be lucky in all of them
            slack = 3.0  # each moment stays under 2 ULP, and the store adds half of one
        if self.params[index].dtype in (torch.float64, torch.complex128):
            slack = 4.0  # the truth is float64 too: a rounding in each of 4 operations
        assert_as_true_as_torch(
            ours,
            others,
            [getattr(exact, key) for key in keys],
            slack,
            [self._reach[index][key] for key in keys],
        )
