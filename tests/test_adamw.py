"""The Triton path against the reference, torch.optim.AdamW and float64.

Without a GPU it runs under Triton's interpreter, where a program costs 15 ms: so one optimizer has
many small tensors, and sizes stand at the edges of a vector (8) and of a block (1024).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter
from truth import (
    COMPLEX,
    FLOATS,
    GRADS,
    LAYOUTS,
    OPTIONS,
    Race,
    assert_as_true_as_torch,
    real64,
    same_bits,
    set_grad,
    ulp,
)

from fused_adamw import FusedAdamW, reference
from fused_adamw import plan as planning
from fused_adamw.hypers import group_rows
from fused_adamw.kernels import table as t
from fused_adamw.kernels.front import Front
from fused_adamw.kernels.launch_parameters import LaunchParameters
from fused_adamw.launch import load_kernels

make = partial(FusedAdamW, backend="triton")
each = pytest.mark.parametrize
# float16 holds no second moment of a gradient below 2e-3: eps keeps the quotient sane
EPS = {"eps": 1e-3}


def run_beside_reference(race: Race, steps: list[list[Tensor | None]]) -> None:
    """Steps of the race, judged against torch, and against our reference as torch is."""
    reference_params = [Parameter(p.detach().clone()) for p in race.params]
    n = len(race.ours.param_groups)
    groups = [
        {**group, "params": reference_params[i::n]}
        for i, group in enumerate(race.ours.param_groups)
    ]
    optimizer = FusedAdamW(groups, backend="reference")
    for grads in steps:
        for p, grad in zip(reference_params, grads, strict=True):
            set_grad(p, None if grad is None else grad.clone())
        optimizer.step()
        race.step(grads)
        race.check()
    for i, (p, own) in enumerate(zip(race.params, reference_params, strict=True)):
        mine, its = race.ours.state.get(p, {}), optimizer.state.get(own, {})
        assert mine.keys() == its.keys()
        keys = [key for key in race.MOMENTS if key in mine]
        race.judge(i, [p, *(mine[key] for key in keys)], [own, *(its[key] for key in keys)])


@each("name", OPTIONS)
def test_options_in_all_dtypes_at_once(device: torch.device, name: str) -> None:
    params = [LAYOUTS["contiguous"](dtype, device) for dtype in (*FLOATS, *COMPLEX)]
    race = Race(make, params, **{**EPS, **OPTIONS[name]})
    run_beside_reference(race, [[GRADS["as_param"](p) for p in params] for _ in range(3)])


@each("dtype", [*FLOATS, torch.complex64], ids=str)
def test_layouts_and_layouts_of_gradients(device: torch.device, dtype: torch.dtype) -> None:
    """Every layout of a param with every layout of a gradient, in one optimizer and one launch."""
    kinds = [kind for kind in GRADS if dtype.is_complex or kind != "conjugated"]
    params = [LAYOUTS[layout](dtype, device) for layout in LAYOUTS for _ in kinds]
    race = Race(make, params, amsgrad=True, **EPS)
    kinds *= len(LAYOUTS)
    steps = [[GRADS[k](p) for k, p in zip(kinds, params, strict=True)] for _ in range(2)]
    run_beside_reference(race, steps)


def test_groups_and_gradients_that_come_and_go(device: torch.device) -> None:
    """A float32 and a bfloat16 param a group, an option a group; a third has no gradient."""
    params = [LAYOUTS["contiguous"](t, device) for t in FLOATS[:3:2] for _ in OPTIONS]
    race = Race(make, params, groups=[*OPTIONS.values()])
    steps: list[list[Tensor | None]] = [
        [None if (i + step) % 3 == 0 else GRADS["as_param"](p) for i, p in enumerate(params)]
        for step in range(4)
    ]
    run_beside_reference(race, steps)
    assert {exact.t for exact in race.truths} == {2, 3}


@each("numel", [1, 7, 8, 9, 1023, 1024, 1025, 2049])
def test_sizes_at_the_edges(device: torch.device, numel: int) -> None:
    """Vector and block, each with one element less and more; all dtypes, aligned or not."""
    params = [
        torch.randn(offset + numel, dtype=dtype, device=device)[offset:]
        for dtype in FLOATS
        for offset in (0, 1)
    ]
    race = Race(make, params, **EPS)
    run_beside_reference(race, [[torch.randn_like(p) for p in params] for _ in range(2)])


def test_gradients_and_moments_of_another_dtype(device: torch.device) -> None:
    """Every param dtype with every gradient dtype, then with every dtype of its moments."""
    pairs = [(a, b) for a in FLOATS for b in FLOATS]
    params = [LAYOUTS["contiguous"](a, device) for a, _ in pairs]
    race = Race(make, params, amsgrad=True, **EPS)
    for _ in range(2):
        race.step([torch.randn(5, 7, dtype=b, device=device) for _, b in pairs])
        race.check()
    for (_, b), p in zip(pairs, race.params, strict=True):
        for key in race.MOMENTS:
            race.ours.state[p][key] = race.ours.state[p][key].to(b)
    race.step([torch.randn_like(p) for p in params])
    for (a, b), p, twin, exact in zip(pairs, race.params, race.twins, race.truths, strict=True):
        state = race.ours.state[p]
        assert {state[key].dtype for key in race.MOMENTS} == {b}
        assert state["step"].item() == 3
        # Moments were rounded to b once more than torch's: the coarser of both dtypes in ULPs of
        # 1, which is more than a step of 1e-2 can move of it.
        eps = max(torch.finfo(a).eps, torch.finfo(b).eps)
        assert_as_true_as_torch([p], [twin], [exact.p], slack=4.0 + eps / torch.finfo(a).eps * 1e-2)
        for key, name in race.MOMENTS.items():
            error = (real64(state[key]) - getattr(exact, name)).abs().max().item()
            assert error <= 4 * eps * getattr(exact, name).abs().max().item()


def test_float32_moments_are_kept_in_full(device: torch.device) -> None:
    """bfloat16 moments stop moving at beta2 = 0.999; float32 ones of a bfloat16 param go on."""
    p = Parameter(torch.ones(9, dtype=torch.bfloat16, device=device))
    optimizer = make([p], betas=(0.9, 0.999))
    optimizer.state[p] = {
        "step": torch.zeros((), device=device),
        "exp_avg": torch.zeros(9, device=device),
        "exp_avg_sq": torch.zeros(9, device=device),
    }
    for _ in range(8):
        p.grad = torch.ones_like(p, requires_grad=False)
        optimizer.step()
    for key, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
        exact = torch.full((9,), 1 - beta**8, dtype=torch.float64)
        value = optimizer.state[p][key]
        assert value.dtype == torch.float32
        # one rounding in each of 8 steps, of two operations each
        assert ((real64(value) - exact).abs() <= 16 * ulp(exact, torch.float32)).all()


def test_no_decay_is_the_same_bits_decoupled_or_not(device: torch.device) -> None:
    start = [LAYOUTS["contiguous"](dtype, device) for dtype in (*FLOATS, *COMPLEX)]
    ours = []
    for decoupled in (True, False):
        params = [Parameter(p.clone()) for p in start]
        ours.append(make(params, weight_decay=0, decoupled_weight_decay=decoupled, **EPS))
    both = [o.param_groups[0]["params"] for o in ours]
    for _ in range(2):
        for a, b in zip(*both, strict=True):
            a.grad = b.grad = torch.randn_like(a, requires_grad=False)
        for optimizer in ours:
            optimizer.step()
    for a, b, old in zip(*both, start, strict=True):
        assert same_bits(a, b)
        assert not same_bits(a, old)
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(ours[0].state[a][key], ours[1].state[b][key])


def test_beta_zero_keeps_the_gradient_exactly(device: torch.device) -> None:
    """The one-sided average: old + 1 * (new - old) would lose all of a small new value."""
    p = Parameter(torch.zeros(2, device=device))
    optimizer = make([p], betas=(0.0, 0.0))
    for grad in ([1e8, -1e8], [1.2345, 1e-9]):
        p.grad = torch.tensor(grad, device=device)
        optimizer.step()
        assert same_bits(optimizer.state[p]["exp_avg"], p.grad)
        assert same_bits(optimizer.state[p]["exp_avg_sq"], p.grad * p.grad)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in the interpreter
@each("amsgrad", [False, True])
@each("lr", [1e-2, 0.0])
def test_nan_inf_and_zero_over_zero_as_torch(
    device: torch.device, amsgrad: bool, lr: float
) -> None:
    """Nothing hides a NaN; eps = 0 with a gradient of 0 is 0/0, in torch too."""
    p, twin = (Parameter(torch.ones(5, device=device)) for _ in range(2))
    ours = make([p], lr=lr, eps=0.0, amsgrad=amsgrad)
    theirs = torch.optim.AdamW([twin], lr=lr, eps=0.0, amsgrad=amsgrad)
    for values in ([1.0, 0.0, float("nan"), float("inf"), -float("inf")], [1.0] * 5):
        p.grad = torch.tensor(values, device=device)
        twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
        # one step of lr 1e-2 and its rounding, in units near 1
        torch.testing.assert_close(p, twin, rtol=0, atol=4 * 2**-24, equal_nan=True)
        assert p[2:].isnan().all()
        assert ours.state[p]["exp_avg_sq"][2].isnan()
    if amsgrad:
        assert ours.state[p]["max_exp_avg_sq"][2].isnan()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in the interpreter
@each("dtype", [torch.float32, torch.float16], ids=str)
def test_second_moment_that_overflows_leaves_the_weight(
    device: torch.device, dtype: torch.dtype
) -> None:
    """A finite gradient whose square overflows: v is huge from then on, and the weight stays.

    torch keeps inf; ours goes on from the largest number, which float16 rounds to inf again.

    lr is small, since float32 computes the step before v is rounded to float16's inf.
    """
    p, twin = (Parameter(torch.ones(2, dtype=dtype, device=device)) for _ in range(2))
    ours = make([p], lr=1e-4, weight_decay=0.0)
    theirs = torch.optim.AdamW([twin], lr=1e-4, weight_decay=0.0)
    for value in (torch.finfo(dtype).max / 4, 1.0, 1.0):
        p.grad = torch.full_like(p, value, requires_grad=False)
        twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert twin.isfinite().all()
        assert p.isfinite().all()
        assert (ours.state[p]["exp_avg_sq"] > 0.99 * torch.finfo(dtype).max).all()


@each("dtype", FLOATS, ids=str)
@each("which", ["lr", "betas"])
def test_hyper_parameters_on_the_device(
    device: torch.device, dtype: torch.dtype, which: str
) -> None:
    """Tensors changed in place between steps: the same bits as their values passed as floats.

    0.30078125, 0.94921875, 0.90625 and so on have 8 significant bits: exact in every dtype.
    """
    values = [(0.30078125, 0.94921875), (0.0, 0.5), (0.90625, 0.98828125)]
    as_tensors = [torch.zeros((), dtype=dtype, device=device) for _ in range(2)]
    pair = [Parameter(torch.ones(9, device=device)) for _ in range(2)]
    with_tensors = make([pair[0]], lr=as_tensors[0]) if which == "lr" else None
    with_tensors = with_tensors or make([pair[0]], betas=tuple(as_tensors))
    with_floats = make([pair[1]])
    previous = pair[0].detach().clone()
    for value in values:
        for x, number in zip(as_tensors, value, strict=True):
            x.fill_(number)
        with_floats.param_groups[0][which] = value[0] if which == "lr" else value
        pair[0].grad = pair[1].grad = torch.randn(9, device=device)
        with_tensors.step()
        with_floats.step()
        assert same_bits(*pair)
        for key in ("exp_avg", "exp_avg_sq"):
            assert same_bits(with_tensors.state[pair[0]][key], with_floats.state[pair[1]][key])
        assert which == "lr" or not same_bits(pair[0], previous)
        previous = pair[0].detach().clone()
    assert (pair[0] != 1).all()


@each("amsgrad", [False, True])
@each("scale", [4.0, 0.125])
def test_unscaled_gradients_are_left_behind(
    device: torch.device, amsgrad: bool, scale: float
) -> None:
    """GradScaler's protocol: powers of two unscale exactly, so the bits are those of no scaling.

    64 times as much fits into every dtype; maximize must not turn the gradient that is left behind.
    """
    start = [LAYOUTS["contiguous"](dtype, device) for dtype in (*FLOATS, *COMPLEX)]
    ours = []
    for _ in range(2):
        params = [Parameter(p.clone()) for p in start]
        ours.append(make(params, maximize=True, amsgrad=amsgrad, **EPS))
    plain, scaled = (o.param_groups[0]["params"] for o in ours)
    for _ in range(2):
        for a, b in zip(plain, scaled, strict=True):
            a.grad = torch.randn_like(a, requires_grad=False)
            b.grad = a.grad * scale
        ours[0].step()
        ours[1].grad_scale = torch.tensor(scale, device=device)  # type: ignore[attr-defined]
        ours[1].found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
        ours[1].step()
        for a, b, old in zip(plain, scaled, start, strict=True):
            assert same_bits(a, b)
            assert not same_bits(a, old)
            assert same_bits(a.grad, b.grad)


class Scheduled(NamedTuple):
    """What the schedule wrote for one tensor, and what it was given."""

    group: dict[str, Any]
    step: int
    row: Tensor
    row64: Tensor


def run_schedule(
    device: torch.device,
    groups: list[dict[str, Any]],
    counters: list[tuple[int, Tensor]],  # each a group and steps so far
    present: list[bool] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> list[Scheduled]:
    """Launch the schedule alone, on a table of float64 tensors without elements."""
    signature = t.Signature(*[torch.float64] * 4, amsgrad=False)
    rows = [
        t.Row(0, 0, 0, 0, x.data_ptr(), 0, group, signature, x.dtype == torch.float64)
        for group, x in counters
    ]
    grads = np.array(present or [True] * len(rows), dtype=np.int64) * t.EMPTY_GRAD
    words, alive, _, _, rates = group_rows(groups, device)
    if rates:  # then those of the table do not count
        words = words.copy()
        words.view(np.float64)[t.LR :: t.GROUP_WORDS] = float("nan")
    table = t.build(rows, grads, words, len(groups))
    memory = t.allocate(table, device)
    memory.scalars.fill_(float("nan"))  # poison
    memory.scalars64.fill_(float("nan"))
    host = torch.empty(table.n_words, dtype=torch.int64)
    t.write_words(table, host)
    memory.words.copy_(host)
    load_kernels(device).schedule.schedule(
        Front(), table, memory, grad_scale, found_inf, rates=rates
    )
    del alive
    return [
        Scheduled(groups[group], round(x.item()), row.cpu(), row64.cpu())
        for (group, x), row, row64 in zip(counters, memory.scalars, memory.scalars64, strict=True)
    ]


SCHEDULE_GROUPS = [
    {
        "lr": 3e-4,
        "betas": betas,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "maximize": maximize,
        "decoupled_weight_decay": decoupled,
    }
    for betas in ((0.9, 0.999), (0.0, 0.0), (0.95, 0.99999))
    for maximize, decoupled in ((False, True), (True, False))
]


@each("counter", [torch.float32, torch.float64], ids=str)
@each("scale", [None, 65536.0], ids=["unscaled", "scaled"])
def test_schedule_is_that_of_the_reference(
    device: torch.device, counter: torch.dtype, scale: float | None
) -> None:
    """Bias corrections by square-and-multiply, to 1e-12, at both ends of a long training.

    10^6 steps of beta2 = 0.99999 leave exp(-10); float32 counts them exactly, as all below 2^24.
    """
    steps = (1, 2, 10, 1000, 10**6)
    counters = [
        (group, torch.tensor(step - 1, dtype=counter, device=device))
        for group in range(len(SCHEDULE_GROUPS))
        for step in steps
    ]
    grad_scale = None if scale is None else torch.tensor(scale, device=device)
    out = run_schedule(device, SCHEDULE_GROUPS, counters, grad_scale=grad_scale)
    assert [x.step for x in out] == [*steps] * len(SCHEDULE_GROUPS)
    for x in out:
        want = reference.schedule(x.group, x.step, scale or 1.0)
        expected = {
            t.ACTIVE: 1.0,
            t.GRAD_FACTOR: want.grad_factor,
            t.UNSCALE: want.unscale,
            t.W1: _one_sided(want.one_minus_beta1),
            t.W2: _one_sided(want.one_minus_beta2),
            t.RSQRT_BIAS2: want.rsqrt_bias2,
            t.EPSILON: want.eps.item(),
            t.NEG_STEP_SIZE: want.neg_step_size,
            t.DECAY: want.decay,
            t.L2: want.l2,
        }
        for column, value in expected.items():
            assert x.row64[column].item() == pytest.approx(value, rel=1e-12, abs=0.0), (x, column)
            assert same_bits(x.row[column], x.row64[column].float())


def _one_sided(weight: float) -> float:
    return weight if weight < 0.5 else weight - 1


def test_schedule_counts_only_tensors_with_a_gradient(device: torch.device) -> None:
    """129 tensors: the second program of the schedule has one tensor and 127 masked lanes."""
    steps = torch.arange(129, dtype=torch.float32, device=device)
    present = [i % 2 == 0 for i in range(129)]
    out = run_schedule(device, SCHEDULE_GROUPS, [(0, x) for x in steps.unbind()], present)
    assert [x.step for x in out] == [i + here for i, here in enumerate(present)]
    assert [bool(x.row[t.ACTIVE]) for x in out] == present


@each("found_inf", [1.0, 2.0, 0.0, float("nan")])
def test_schedule_skips_on_any_found_inf(device: torch.device, found_inf: float) -> None:
    """found_inf is a sum over devices; anything but 0 skips the step."""
    steps = torch.tensor([5.0], device=device)
    skip = torch.tensor(found_inf, device=device)
    (out,) = run_schedule(device, SCHEDULE_GROUPS, [(0, steps[0])], found_inf=skip)
    assert (out.step, bool(out.row[t.ACTIVE])) == ((6, True) if found_inf == 0 else (5, False))


GUARD, POISON = 8, 2.0**-3  # 8 elements keep 16-byte alignment; POISON is exact in every dtype


class Guarded:
    """A tensor inside a poisoned buffer, `offset` elements behind a 16-byte boundary."""

    def __init__(self, value: Tensor, offset: int) -> None:
        start = GUARD + offset
        self.buffer = torch.full((start + value.numel() + GUARD,), POISON, device=value.device)
        self.buffer = self.buffer.to(value.dtype)
        self.inside = slice(start, start + value.numel())
        self.view = self.buffer[self.inside]
        self.view.copy_(value)

    def assert_intact(self) -> None:
        """Nothing around the tensor was written to."""
        outside = self.buffer.clone()
        outside[self.inside] = POISON
        assert (outside == POISON).all()


class Shape(NamedTuple):
    """One tensor of a generated case."""

    numel: int
    dtype: torch.dtype
    offset: int
    group: int
    present: tuple[bool, bool, bool]


SHAPES = st.builds(
    Shape,
    numel=st.sampled_from([0, 1, 7, 8, 9, 1023, 1024, 1025, 2049]),
    dtype=st.sampled_from(FLOATS),
    offset=st.sampled_from([0, 1]),
    group=st.sampled_from([0, 1]),
    present=st.tuples(*[st.booleans()] * 3),
)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes in the interpreter
    # the fixtures hold for every example: a device, and a patch of the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4), amsgrad=st.booleans(), decoupled=st.booleans()
)
def test_any_mix_of_tensors(
    device: torch.device, shapes: list[Shape], amsgrad: bool, decoupled: bool
) -> None:
    """Params, gradients and moments in poisoned buffers; nothing around them may change."""
    torch.manual_seed(0)
    options = dict(amsgrad=amsgrad, decoupled_weight_decay=decoupled, **EPS)
    params = [Guarded(torch.randn(s.numel, dtype=s.dtype, device=device), s.offset) for s in shapes]
    # Race takes groups in turn: empty tensors fill the places of the other group
    filler = torch.zeros(0, device=device)
    slots = [x for p, s in zip(params, shapes, strict=True) for x in _turn(p.view, filler, s.group)]
    race = Race(make, slots, groups=[{}, {"lr": 0.1, "betas": (0.5, 0.9)}], **options)
    own = race.params
    guarded = [*params]
    for i, s in enumerate(shapes):
        p = own[2 * i + s.group]
        assert p.data_ptr() == params[i].view.data_ptr()
        states = [Guarded(torch.zeros_like(p.data), s.offset) for _ in range(2 + amsgrad)]
        guarded += states
        if any(s.present):
            race.ours.state[p] = {
                "step": torch.zeros((), device=device),
                **{key: x.view for key, x in zip(race.MOMENTS, states, strict=False)},
            }
    for step in range(3):
        grads: list[Tensor | None] = [None] * len(slots)
        for i, s in enumerate(shapes):
            if s.present[step]:
                value = torch.randn(s.numel, dtype=s.dtype, device=device)
                guarded.append(Guarded(value, s.offset))
                grads[2 * i + s.group] = guarded[-1].view
        race.step(grads)
    for x in guarded:
        x.assert_intact()
    for i, s in enumerate(shapes):  # as torch, which has no state before the first gradient
        assert any(s.present) or own[2 * i + s.group] not in race.ours.state
    race.check()


def _turn(p: Tensor, filler: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return (p, filler.clone()) if group == 0 else (filler.clone(), p)


def _has_hopper_instructions(device: torch.device) -> bool:
    """Prefetches in bulk, and dependent launch: from sm_90 on."""
    hip = torch.version.hip is not None  # there they are left out
    return hip or torch.cuda.get_device_capability(device) >= (9, 0)


@each(
    "variant",
    [
        {"exact": True},
        {"blocks_per_program": 2},
        {"block": 2048, "num_warps": 8, "store_cache": ".cs"},
        {"prefetch": 16},  # this and the next on Hopper and later: tests/test_prefetch.py
        {"overlap": True},
    ],
    ids=str,
)
def test_launch_parameters_change_no_bit(
    device: torch.device,
    variant: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    as_compiled: Any,
) -> None:
    """On a GPU all but exact division; the interpreter divides exactly in any case."""
    wanted = variant.keys() & {"prefetch", "overlap"}
    if wanted and device.type == "cuda" and not _has_hopper_instructions(device):
        pytest.skip("no such instruction")
    sizes = (1, 1023, 1024, 1025, 2047, 2048, 2049, 4097)
    values = [torch.randn(n + 1, device=device)[n % 2 :][:n] for n in sizes]
    grads = [torch.randn(n, device=device) for n in sizes]
    results = []
    for parameters in (LaunchParameters(), LaunchParameters(**variant)):
        monkeypatch.setattr(planning, "launch_parameters", lambda _, own=parameters: own)
        params = [Parameter(x.clone()) for x in values]
        optimizer = make(params)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        for _ in range(2):
            optimizer.step()
        (table,) = optimizer._plan.tables.values() if optimizer._plan else ()
        assert table.parameters == parameters
        results.append([x for p in params for x in (p.data, *optimizer.state[p].values())])
    for plain, other in zip(*results, strict=True):
        if variant.get("exact") and (device.type != "cpu" or as_compiled is not None):
            torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-7)  # 2 ULP of an update
        else:
            assert same_bits(plain, other)


@pytest.mark.parametrize(
    ("device", "hip", "exact", "arithmetic"),
    [
        ("cuda", None, False, "_RECIPROCAL"),
        ("cuda", None, True, "_IEEE"),
        ("cuda", "7.0", False, "_HARDWARE"),
        ("xpu", None, False, "_HARDWARE"),
        ("cpu", None, False, "_HARDWARE"),  # the interpreter knows no PTX
    ],
)
def test_the_reciprocal_is_nvidias(
    device: str,
    hip: str | None,
    exact: bool,
    arithmetic: str,
    monkeypatch: pytest.MonkeyPatch,
    as_compiled: Any,
) -> None:
    if device == "cpu" and as_compiled is not None:
        pytest.skip("here it stands for NVIDIA's")
    kernels = load_kernels(torch.device("cuda" if torch.cuda.is_available() else "cpu")).adamw
    monkeypatch.setattr(torch.version, "hip", hip)
    parameters = LaunchParameters(exact=exact)
    assert kernels._arithmetic(parameters, torch.device(device)) is getattr(kernels, arithmetic)


@pytest.mark.parametrize(
    ("device", "hip", "driver", "there", "overlaps"),
    [
        ("cuda", None, 12020, True, False),  # could not capture it
        ("cuda", None, 12030, True, True),
        ("cuda", None, 0, True, False),  # does not say
        ("cuda", None, 0, False, True),  # compiled for elsewhere
        ("cuda", "7.0", 13000, True, False),
        ("xpu", None, 13000, True, False),
    ],
)
def test_the_update_begins_beside_the_schedule_if_a_graph_can_hold_that(
    device: str, hip: str | None, driver: int, there: bool, overlaps: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kernels = load_kernels(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    nvidia = kernels.adamw.nvidia
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(nvidia, "driver_version", lambda: driver)
    for wanted in (True, False):
        parameters = LaunchParameters(overlap=wanted)
        assert nvidia.overlaps(parameters, torch.device(device)) == (overlaps and wanted)


@pytest.mark.parametrize(("eps", "exact"), [(1e-37, False), (1e-40, True), (1e38, True)])
def test_an_eps_without_a_reciprocal_is_divided_by_exactly(
    device: torch.device, eps: float, exact: bool
) -> None:
    """It would be infinite, and 0 times that NaN, or 0; a later eps is followed."""
    p = Parameter(torch.tensor([1.0, -2.0, 3.0], device=device))
    optimizer = FusedAdamW([p], backend="triton", weight_decay=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    (launcher,) = optimizer._launchers.values()
    assert not launcher._whole.parameters.exact
    optimizer.param_groups[0]["eps"] = eps
    optimizer.state[p]["exp_avg"].zero_()
    optimizer.state[p]["exp_avg_sq"].zero_()
    before = p.detach().clone()
    p.grad.zero_()
    optimizer.step()
    assert launcher._whole.parameters.exact == exact
    assert torch.equal(p, before)


@each("dtype", [torch.float32, torch.bfloat16], ids=str)
@each("skip", [1, 2, 4, 8])
def test_a_gradient_alone_is_not_aligned(
    device: torch.device, dtype: torch.dtype, skip: int
) -> None:
    """By 2 to 32 bytes, 8 among them: 128-bit accesses want 16."""
    results = []
    for moved in (skip, 0):
        torch.manual_seed(0)
        p = Parameter(torch.randn(64, device=device).to(dtype))
        optimizer = make([p], lr=0.1)
        for _ in range(2):
            memory = torch.empty(64 + skip, device=device, dtype=dtype)
            p.grad = memory[moved : moved + 64].copy_(torch.randn(64))
            optimizer.step()
        results.append(p.detach())
    assert same_bits(*results)


def whole_parameters(optimizer: FusedAdamW) -> LaunchParameters:
    """What the last step was launched with."""
    (launcher,) = optimizer._launchers.values()
    assert launcher._whole is not None
    return launcher._whole.parameters


@each(
    ("options", "plain"),
    [
        pytest.param(lambda d: {}, True, id="default"),
        pytest.param(lambda d: {"lr": torch.tensor(1e-3, device=d)}, True, id="lr on the device"),
        pytest.param(
            lambda d: {"weight_decay": 0.0, "maximize": True, "amsgrad": True}, True, id="others"
        ),
        pytest.param(lambda d: {"betas": (0.50001, 0.50001)}, True, id="above 1/2"),
        pytest.param(lambda d: {"betas": (0.5, 0.999)}, False, id="beta1=1/2"),
        pytest.param(lambda d: {"betas": (0.9, 0.5)}, False, id="beta2=1/2"),
        pytest.param(
            lambda d: {"betas": (torch.tensor(0.9, device=d), torch.tensor(0.999, device=d))},
            False,
            id="betas on the device",
        ),
        pytest.param(lambda d: {"decoupled_weight_decay": False}, False, id="L2"),
        pytest.param(
            lambda d: {"decoupled_weight_decay": False, "weight_decay": 0.0}, True, id="no L2"
        ),
    ],
)
def test_who_takes_the_shorter_way(
    device: torch.device, options: Callable[[torch.device], dict[str, Any]], plain: bool
) -> None:
    """All groups together, as they are in each step."""
    params = [Parameter(torch.ones(3, device=device)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = make([{"params": params[:1]}, {"params": params[1:], **options(device)}])
    optimizer.step()
    assert whole_parameters(optimizer).plain == plain
    optimizer.param_groups[0]["betas"] = (0.1, 0.999)
    optimizer.step()
    assert not whole_parameters(optimizer).plain
    optimizer.param_groups[0]["betas"] = (0.6, 0.99)
    optimizer.step()
    assert whole_parameters(optimizer).plain == plain


@each("dtype", FLOATS, ids=str)
@each("options", [{}, {"amsgrad": True}, {"state_dtype": "int8"}], ids=str)
@each("master", [False, True], ids=["", "master"])
def test_the_shorter_way_has_the_same_bits(
    device: torch.device,
    dtype: torch.dtype,
    options: dict[str, Any],
    master: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == torch.float64 and options.get("state_dtype") is not None:
        pytest.skip("8-bit moments are computed in float32")
    torch.manual_seed(0)
    if dtype == torch.bfloat16:
        options = {**options, "stochastic_rounding": not master}
    start = [torch.randn(n, 64, device=device).to(dtype) for n in (3, 16, 17)]
    start.append(torch.randn(13, device=device).to(dtype))
    optimizers = []
    for _ in range(2):
        own = [Parameter(x.clone()) for x in start]
        optimizers.append((own, make(own, lr=0.1, master_weights=master, **options)))
    (short, shorter), (long, longer) = optimizers
    rows = longer._hypers.rows
    monkeypatch.setattr(longer._hypers, "rows", lambda *given: rows(*given)._replace(plain=False))
    for _ in range(3):
        for p, q in zip(short, long, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        shorter.step()
        longer.step()
    assert [whole_parameters(x).plain for x in (shorter, longer)] == [True, False]
    for p, q in zip(short, long, strict=True):
        assert same_bits(p, q)
        for key, x in shorter.state[p].items():
            assert same_bits(x, longer.state[q][key]), key
