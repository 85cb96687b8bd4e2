"""The CPU path against torch.optim.AdamW, torch.optim.Adam and float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from truth import COMPLEX, FLOATS, GRADS, LAYOUTS, OPTIONS, Race, real64, same_bits, set_grad, ulp

from fused_adamw import FusedAdamW, reference

CPU = torch.device("cpu")
make = partial(FusedAdamW, backend="reference")
DTYPES = pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX], ids=str)
each = pytest.mark.parametrize


def options_for(dtype: torch.dtype, name: str) -> dict[str, Any]:
    """float16 holds no second moment of a gradient below 2e-3: eps keeps the quotient sane."""
    floor = {"eps": 1e-3} if dtype == torch.float16 else {}
    return {**floor, **OPTIONS[name]}


@DTYPES
@each("name", OPTIONS)
def test_options(dtype: torch.dtype, name: str) -> None:
    race = Race(make, [LAYOUTS["contiguous"](dtype, CPU)], **options_for(dtype, name))
    for _ in range(4):
        race.step([GRADS["as_param"](race.params[0])])
        race.check()


@DTYPES
@each("layout", LAYOUTS)
@each("name", ["default", "l2_amsgrad_maximize"])
def test_layouts(dtype: torch.dtype, layout: str, name: str) -> None:
    race = Race(make, [LAYOUTS[layout](dtype, CPU)], **options_for(dtype, name))
    for _ in range(3):
        race.step([GRADS["as_param"](race.params[0])])
        race.check()


@each(
    ("dtype", "grad"),
    [
        pytest.param(dtype, grad, id=f"{dtype}-{grad}")
        for dtype in (*FLOATS, *COMPLEX)
        for grad in GRADS
        if dtype.is_complex or grad != "conjugated"
    ],
)
@each("layout", ["contiguous", "transposed", "channels_last", "slice", "0-dim", "empty"])
def test_gradients_in_another_layout(dtype: torch.dtype, grad: str, layout: str) -> None:
    race = Race(make, [LAYOUTS[layout](dtype, CPU)], **options_for(dtype, "amsgrad"))
    for _ in range(2):
        race.step([GRADS[grad](race.params[0])])
        race.check()


@each("param", FLOATS, ids=str)
@each("grad", FLOATS, ids=str)
def test_gradients_of_another_dtype(param: torch.dtype, grad: torch.dtype) -> None:
    race = Race(make, [LAYOUTS["contiguous"](param, CPU)], **options_for(torch.float16, "l2"))
    for _ in range(2):
        race.step([torch.randn(5, 7, dtype=grad)])
        race.check()


def test_groups_with_everything_of_their_own_and_gradients_that_come_and_go() -> None:
    """Each option is a group, each dtype a param in it; each lacks a gradient in every third step.

    So the params of one group count different steps, which shows in their bias corrections.
    """
    dtypes = [torch.float32, torch.bfloat16, torch.complex64]
    params = [LAYOUTS["contiguous"](t, CPU) for t in dtypes for _ in OPTIONS]
    race = Race(make, params, groups=[*OPTIONS.values()])
    for step in range(6):
        race.step(
            [None if (i + step) % 3 == 0 else GRADS["as_param"](p) for i, p in enumerate(params)]
        )
        race.check()
    assert {exact.t for exact in race.truths} == {4}
    race.step([GRADS["as_param"](p) if i % 2 else None for i, p in enumerate(params)])
    race.check()
    assert {exact.t for exact in race.truths} == {4, 5}


@DTYPES
def test_no_decay_is_the_same_bits_decoupled_or_not(dtype: torch.dtype) -> None:
    start = LAYOUTS["contiguous"](dtype, CPU)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    both = [
        make([p], weight_decay=0, eps=1e-3, decoupled_weight_decay=d)
        for p, d in zip(params, (True, False), strict=True)
    ]
    for _ in range(3):
        params[0].grad = params[1].grad = torch.randn_like(start)
        for optimizer in both:
            optimizer.step()
        assert same_bits(*params)
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(*(o.state[p][key] for o, p in zip(both, params, strict=True)))
    assert not same_bits(params[0], start)


@pytest.fixture
def small_piece(monkeypatch: pytest.MonkeyPatch) -> int:
    """Elements of a piece, made small enough to be walked in a test."""
    monkeypatch.setattr(reference, "PIECE_PER_THREAD", 16)
    return 16 * torch.get_num_threads()


@each("dtype", [*FLOATS, torch.complex64], ids=str)
@each("past", [-1, 0, 1, 5], ids=lambda n: f"end{n:+}")
def test_pieces(small_piece: int, dtype: torch.dtype, past: int) -> None:
    """Three pieces and `past` elements: the last piece is full, one short, or ragged.

    A complex element is two reals, so that a piece may end between them.
    """
    numel = 3 * small_piece // (2 if dtype.is_complex else 1) + past
    start = torch.randn(numel, dtype=dtype)
    race = Race(make, [start.clone()], amsgrad=True, maximize=True, eps=1e-3, lr=0.1)
    for _ in range(3):
        race.step([torch.rand(numel, dtype=dtype) + 0.5])
        race.check()
    assert (race.params[0] != start).all()  # 3 steps of about 0.1 one way show in any dtype


class _LargestNewStorage(TorchDispatchMode):
    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


@each("param", [torch.float32, torch.bfloat16], ids=str)
@each("grad", [torch.float32, torch.bfloat16], ids=str)
def test_no_temporary_is_larger_than_the_scratch(
    small_piece: int, param: torch.dtype, grad: torch.dtype
) -> None:
    p = torch.nn.Parameter(torch.randn(100 * small_piece).to(param))
    set_grad(p, torch.randn(100 * small_piece).to(grad))
    optimizer = make([p], amsgrad=True, maximize=True, weight_decay=0.1)
    optimizer.step()
    with _LargestNewStorage([p, p.grad, *optimizer.state[p].values()]) as mode:
        optimizer.step()
    assert 0 < mode.nbytes <= 6 * small_piece * 4  # six float32 lines of one piece


def test_beta_zero_keeps_the_gradient_exactly() -> None:
    """The one-sided average: old + 1 * (new - old) would lose all of a small new value."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = make([p], betas=(0.0, 0.0))
    for grad in ([1e8, -1e8], [1.2345, 1e-9]):
        p.grad = torch.tensor(grad)
        optimizer.step()
        assert same_bits(optimizer.state[p]["exp_avg"], p.grad)
        assert same_bits(optimizer.state[p]["exp_avg_sq"], p.grad * p.grad)


def test_second_moment_of_the_first_step_is_within_two_ulps() -> None:
    """A float32 `1 - beta2` would put it 153 ULP off at beta2 = 0.999."""
    p = torch.nn.Parameter(torch.randn(1000))
    p.grad = torch.randn(1000)
    optimizer = make([p])
    optimizer.step()
    exact = (1 - 0.999) * real64(p.grad) ** 2
    error = (real64(optimizer.state[p]["exp_avg_sq"]) - exact).abs() / ulp(exact, torch.float32)
    assert error.max() <= 2


@each("amsgrad", [False, True])
@each("lr", [1e-2, 0.0])
def test_nan_inf_and_zero_over_zero_as_torch(amsgrad: bool, lr: float) -> None:
    """Nothing hides a NaN; eps = 0 with a gradient of 0 is 0/0, in torch too."""
    ours, theirs, p, twin = _with_twin(torch.ones(5), lr=lr, eps=0.0, amsgrad=amsgrad)
    for values in ([1.0, 0.0, float("nan"), float("inf"), -float("inf")], [1.0] * 5):
        p.grad, twin.grad = torch.tensor(values), torch.tensor(values)
        ours.step()
        theirs.step()
        # one step of lr 1e-2 and its rounding, in units near 1
        torch.testing.assert_close(p, twin, rtol=0, atol=4 * 2**-24, equal_nan=True)
        assert p[2:].isnan().all()
        assert ours.state[p]["exp_avg_sq"][2].isnan()


@each("dtype", [torch.float32, torch.float16], ids=str)
def test_second_moment_that_overflows_leaves_the_weight(dtype: torch.dtype) -> None:
    """A finite gradient whose square overflows: v is huge from then on, and the weight stays.

    torch keeps inf; ours goes on from the largest number, which float16 rounds to inf again.

    lr is small, since float32 computes the step before v is rounded to float16's inf.
    """
    ours, theirs, p, twin = _with_twin(torch.ones(2, dtype=dtype), lr=1e-4, weight_decay=0.0)
    for value in (torch.finfo(dtype).max / 4, 1.0, 1.0):
        p.grad = torch.full_like(p, value, requires_grad=False)
        twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert twin.isfinite().all()
        assert p.isfinite().all()
        assert (ours.state[p]["exp_avg_sq"] > 0.99 * torch.finfo(dtype).max).all()


def _with_twin(
    start: Tensor, **options: Any
) -> tuple[FusedAdamW, torch.optim.AdamW, torch.nn.Parameter, torch.nn.Parameter]:
    p, twin = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    return make([p], **options), torch.optim.AdamW([twin], **options), p, twin


def test_unscaled_gradients_left_behind_do_not_reach_the_update() -> None:
    """Unscaling by 2 and clipping by 1/2 is no multiplication, and may be read in place."""
    (group,) = make([torch.zeros(4)]).param_groups
    scalars = reference.schedule(group, 1, grad_scale=0.5, clip_factor=0.5)
    assert scalars.grad_factor == 1
    moments = []
    for store_grad in (False, True):
        p, grad, m, v = torch.ones(4), torch.full((4,), 3.0), torch.zeros(4), torch.zeros(4)
        reference.adamw(p, grad, m, v, None, scalars, store_grad=store_grad)
        moments.append(m)
        assert torch.equal(grad, torch.full((4,), 6.0 if store_grad else 3.0))
    assert torch.equal(*moments)
