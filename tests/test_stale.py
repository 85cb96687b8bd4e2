"""Whatever may change between two steps is noticed: nothing of the last step is used wrongly.

Each is done to ours and to torch.optim.AdamW, then both go on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import changes
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from truth import same_bits, set_grad
from twins import (
    CONTRACT,
    F64,
    FLOAT32,
    OPTIONS,
    assert_same,
    assert_unchanged,
    beside_torch,
    give_grads,
    go_on_alike,
    params_of,
    snapshot,
    step_all,
)

from fused_adamw import FusedAdamW, look

each = pytest.mark.parametrize


@each("change", changes.CHANGES.values(), ids=changes.CHANGES)
@each(
    "which, absent, then",
    [(0, None, None), (0, 2, 2), (1, None, None), (0, 2, None)],
    ids=["", "one_idle", "second_part", "with_a_first_gradient"],
)
def test_stale(
    device: torch.device,
    backend: str,
    change: Callable[..., None],
    which: int,
    absent: int | None,
    then: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(look, "IN_CACHE", 1)  # so that each param is another part of a look
    ours, theirs = beside_torch(device, backend)
    for _ in range(2):  # the second with the first one's plan
        step_all(ours, theirs, absent=absent)
    for optimizer in (ours, theirs):
        change(optimizer, params_of(optimizer)[which])
    go_on_alike(ours, theirs, absent=then)


def test_stale_dtype_of_param_and_state(device: torch.device, backend: str) -> None:
    """Other memory of another dtype; compared in float32, whose rounding it then has."""
    ours, theirs = beside_torch(device, backend)
    step_all(ours, theirs)
    for optimizer in (ours, theirs):
        changes.other_dtype(optimizer, params_of(optimizer)[0])
    go_on_alike(ours, theirs, tolerance=FLOAT32)


@each("through_data", [False, True], ids=["", "through_data"])
@each("key", ["exp_avg", "exp_avg_sq", "param"])
def test_stale_dtype_at_the_same_address(
    device: torch.device, backend: str, key: str, through_data: bool
) -> None:
    """As if memory were freed and given out again at once: 9 float64 where 9 float32 were.

    The allocators round sizes up (CUDA's to 512 bytes), so that this is nothing rare. Params are
    always swapped through `.data`; a state may be, and keeps its object then.
    """
    p = Parameter(torch.randn(9, device=device))
    ours = FusedAdamW([p], **OPTIONS, backend=backend)
    memory = torch.zeros(9, dtype=F64, device=device)
    as32 = torch.from_dlpack(memory.view(torch.float32)[:9])  # a storage of its own
    if key == "param":
        as32.copy_(p.data)
        p.data = as32
    step_all(ours)
    if key != "param":
        as32.copy_(ours.state[p][key])
        ours.state[p][key] = as32
    step_all(ours)
    # what is now there as float64, and the truth beside it at an address of its own
    value = as32.to(F64)
    del as32
    memory.copy_(value)
    twin = Parameter(value.clone() if key == "param" else p.detach().clone())
    fresh = FusedAdamW([twin], **OPTIONS, backend=backend)
    fresh.state[twin] = {k: x.clone() for k, x in ours.state[p].items()}
    if key == "param":
        p.grad = None
        p.data = memory
    else:
        if through_data:
            ours.state[p][key].data = memory
        else:
            ours.state[p][key] = memory
        fresh.state[twin][key] = value.clone()
    go_on_alike(ours, fresh, tolerance=0)


def test_a_late_state_in_a_pool(device: torch.device, backend: str) -> None:
    """A checkpoint's of a param without a gradient so far: its dtype is asked for from then on."""
    p, late = (Parameter(torch.randn(9, device=device)) for _ in range(2))
    ours = FusedAdamW([p, late], **OPTIONS, backend=backend)
    step_all(ours, absent=1)
    pool = torch.zeros(72, dtype=torch.uint8, device=device)
    moment = pool[:36].view(torch.float32)
    step = torch.zeros((), device=device)
    ours.state[late] = {"step": step, "exp_avg": moment, "exp_avg_sq": torch.zeros_like(moment)}
    assert ours._plan is not None
    first = ours._plan.entries.all[0]
    step_all(ours)
    assert ours._plan.entries.all[0] is first
    watched = ours._plan.states
    step_all(ours)
    assert ours._plan.states is watched, "or it is planned anew in each step"
    narrow, behind = moment.to(torch.bfloat16), pool[18:]
    moment.data = pool[:18].view(torch.bfloat16).copy_(narrow)
    behind.fill_(1)
    step_all(ours)
    assert bool((behind == 1).all())
    # a number beside it, which has no dtype
    ours.state[p]["step"] = 5.0
    step_all(ours)
    assert float(ours.state[p]["step"]) == 6


@each("late", [False, True], ids=["", "before_a_first_gradient"])
def test_state_of_another_dtype_in_a_pool(device: torch.device, backend: str, late: bool) -> None:
    """The same address of memory that lives, half as much of it: what follows is another's."""
    p, other = (Parameter(torch.randn(9, device=device)) for _ in range(2))
    ours = FusedAdamW([p, other], **OPTIONS, backend=backend)
    step_all(ours, absent=1)
    pool = torch.zeros(72, dtype=torch.uint8, device=device)
    moment = ours.state[p]["exp_avg"]
    moment.data = pool[:36].view(torch.float32).copy_(moment)
    step_all(ours, absent=1)
    if late:
        step_all(ours)
    narrow, behind = moment.to(torch.bfloat16), pool[18:]
    moment.data = pool[:18].view(torch.bfloat16).copy_(narrow)
    behind.fill_(1)
    step_all(ours, absent=None if late else 1)
    assert bool((behind == 1).all())
    assert not same_bits(moment, narrow)


def squares(
    device: torch.device, backend: str
) -> tuple[FusedAdamW, torch.optim.AdamW, Parameter, Parameter]:
    """Ours and torch's optimizer after a step, each of one square param: its transpose fits."""
    p, twin = (Parameter(torch.ones(3, 3, dtype=F64, device=device)) for _ in range(2))
    ours = FusedAdamW([p], backend=backend)
    theirs = torch.optim.AdamW([twin], foreach=False)
    step_all(ours, theirs)
    return ours, theirs, p, twin


@each("key", ["exp_avg", "exp_avg_sq"])
def test_stale_layout_of_state_at_the_same_address(
    device: torch.device, backend: str, key: str
) -> None:
    """A square state transposed in place: the same address, and every element elsewhere."""
    ours, theirs, p, twin = squares(device, backend)
    for optimizer, x in ((ours, p), (theirs, twin)):
        optimizer.state[x][key] = optimizer.state[x][key].t()
    go_on_alike(ours, theirs)


@each("late", [False, True], ids=["", "before_a_first_gradient"])
def test_stale_state_whose_object_has_the_id_of_the_last(
    device: torch.device, backend: str, late: bool
) -> None:
    """A state that died, and its place in memory given to a view of the same elements."""
    ours, theirs, p, twin = squares(device, backend)
    memory = torch.zeros(9, dtype=F64, device=device)
    ours.state[p]["exp_avg"] = memory.view(3, 3).copy_(ours.state[p]["exp_avg"])
    if late:
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["params"].append(Parameter(torch.ones_like(p)))
        step_all(ours, theirs, absent=1)
    step_all(ours, theirs)
    last, others = id(ours.state[p].pop("exp_avg")), []
    while id(transposed := memory.as_strided((3, 3), (1, 3))) != last:
        others.append(transposed)  # kept, so that the next one is elsewhere
        assert len(others) < 10_000
    ours.state[p]["exp_avg"] = transposed
    theirs.state[twin]["exp_avg"] = theirs.state[twin]["exp_avg"].t()
    go_on_alike(ours, theirs)


def test_a_plan_is_kept_while_only_gradients_move(device: torch.device, backend: str) -> None:
    """torch keeps the Python objects of storages that nobody holds: else all would seem to die."""
    ours, theirs = beside_torch(device, backend)
    step_all(ours, theirs)
    before = ours._plan
    for _ in range(3):
        step_all(ours, theirs)
    assert before is not None
    assert ours._plan is not None
    assert ours._plan.states is before.states, "or made anew, as all plans are"
    assert not before.gone


@each(
    "also",
    [None, lambda grad: grad.contiguous(), lambda grad: grad[:1].expand_as(grad)],
    ids=["", "other_strides", "expanded"],
)
def test_a_first_gradient_leaves_the_other_entries_as_they_are(
    device: torch.device, backend: str, also: Callable[[Tensor], Tensor] | None
) -> None:
    """Only what has changed is checked anew, and an idle param has not."""
    ours, theirs = beside_torch(device, backend)
    step_all(ours, theirs, absent=1)
    before = ours._plan
    assert before is not None
    first, last = before.entries.all
    give_grads(ours, theirs, absent=2)
    if also is not None:
        for optimizer in (ours, theirs):
            p = params_of(optimizer)[0]
            assert p.grad is not None
            p.grad = also(p.grad)
    for optimizer in (ours, theirs):
        optimizer.step()
    assert_same(ours, theirs)
    now = ours._plan
    assert now is not None
    assert [e.place for e in now.entries.all] == [0, 1, 2]
    assert (now.entries.all[0] is first) == (also is None)
    assert now.entries.all[2] is last
    if before.rows:  # the reference has none
        assert (now.rows[0] is before.rows[0]) == (also is None)
        assert now.rows[2] is before.rows[2]
    # each state and its storage are watched once, by the same references where none can be new
    assert len(now.states) == 2 * 3 * 3
    carried = [a is b for a, b in zip(now.states, before.states, strict=False)]
    assert all(carried) if also is None else not any(carried)
    go_on_alike(ours, theirs)


def test_a_first_gradient_finds_other_views_of_states_as_they_were_planned(
    device: torch.device,
) -> None:
    """What a held state shows by now is not asked: it would be read past its end, as float32."""
    p, twin, late = (Parameter(torch.ones(4, 6, device=device).bfloat16()) for _ in range(3))
    ours = FusedAdamW([p, late], backend="triton")
    other = FusedAdamW([twin], backend="triton")
    step_all(ours, absent=1)
    for x in (p, twin):
        x.grad = torch.ones_like(x)
    other.state = {twin: {key: x.clone() for key, x in ours.state[p].items()}}
    moment = ours.state[p]["exp_avg"]
    moment.data = moment.data.view(torch.float32)
    late.grad = torch.ones_like(late)
    for optimizer in (ours, other):
        optimizer.step()
    assert same_bits(moment.view(torch.bfloat16), other.state[twin]["exp_avg"])


def test_a_state_made_anew_beside_a_first_gradient_is_watched(
    device: torch.device, backend: str
) -> None:
    """Though its param was in the last plan; the old object lives on, and tells of nothing."""
    ours, theirs, p, twin = squares(device, backend)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["params"].append(Parameter(torch.ones_like(p)))
    step_all(ours, theirs, absent=1)
    kept = ours.state[p]["exp_avg"]
    kept.data = kept.data.t()  # not noticed as long as the plan holds
    theirs.state[twin]["exp_avg"] = theirs.state[twin]["exp_avg"].t().contiguous()
    give_grads(ours, theirs)
    for x in (p, twin):
        assert x.grad is not None
        x.grad = x.grad.t().contiguous().t()
    for optimizer in (ours, theirs):
        optimizer.step()
    assert_same(ours, theirs)
    assert ours.state[p]["exp_avg"] is not kept
    assert ours._plan is not None
    watched = [ref() for ref in ours._plan.states]
    assert any(x is ours.state[p]["exp_avg"] for x in watched)


def test_between_steps_gradients_and_states_are_the_users_alone(
    device: torch.device, backend: str
) -> None:
    """Whoever lets go of one gets its memory back."""
    ours = FusedAdamW([Parameter(torch.ones(3, device=device))], backend=backend)
    step_all(ours)
    (p,) = params_of(ours)
    held = [weakref.ref(x) for x in (p.grad, *ours.state[p].values())]
    p.grad = None
    ours.state[p].clear()
    assert [ref() for ref in held] == [None] * 4


def test_stale_shape_of_state_at_the_same_address(device: torch.device, backend: str) -> None:
    """A state cut short in place is refused, not read past its end."""
    ours, theirs = beside_torch(device, backend)
    step_all(ours, theirs)
    p = params_of(ours)[1]
    ours.state[p]["exp_avg"] = ours.state[p]["exp_avg"][:-1]
    give_grads(ours)
    before = snapshot(ours)
    with pytest.raises(RuntimeError, match=r"exp_avg of .* shape"):
        ours.step()
    assert_unchanged(ours, before)


def test_amsgrad_switched_on_in_mid_training(device: torch.device, backend: str) -> None:
    """The maximum starts at zero, as of a fresh optimizer with the same other state."""
    ours, theirs = beside_torch(device, backend)
    step_all(ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["amsgrad"] = True
    for p in params_of(theirs):
        theirs.state[p]["max_exp_avg_sq"] = torch.zeros_like(p.data)
    go_on_alike(ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["amsgrad"] = False
    step_all(ours, theirs)
    assert_same(ours, theirs)


def test_gradients_that_come_and_go(
    device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a param that had none in the first steps, and for all at once."""
    monkeypatch.setattr(look, "IN_CACHE", 2)  # so that there are parts of a look: 2 params and 1
    ours, theirs = beside_torch(device, backend)
    pattern = [(1, 0, 0), (1, 1, 0), (0, 0, 0), (0, 1, 1), (1, 1, 1), (0, 1, 0), (1, 0, 1)]
    for present in pattern:
        give_grads(ours, theirs)
        for optimizer in (ours, theirs):
            for p, here in zip(params_of(optimizer), present, strict=True):
                if not here:
                    p.grad = None
            optimizer.step()
        assert_same(ours, theirs)


def test_one_gradient_given_to_two_params_in_turn(device: torch.device, backend: str) -> None:
    """The same address, dtype and layout: only whose it is tells the steps apart."""
    ours, theirs = (
        make([Parameter(torch.ones(3, dtype=F64, device=device)) for _ in range(2)])
        for make in (
            lambda params: FusedAdamW(params, backend=backend),
            lambda params: torch.optim.AdamW(params, foreach=False),
        )
    )
    grad = torch.randn(3, dtype=F64, device=device)
    for turn in (0, 1, 0, 0, 1, 1):
        for optimizer in (ours, theirs):
            for place, p in enumerate(params_of(optimizer)):
                p.grad = grad if place == turn else None
            optimizer.step()
        assert_same(ours, theirs)


GRAD_CHANGES: dict[str, tuple[tuple[int, ...], list[Callable[[Tensor], Tensor]]]] = {
    "stride": ((3, 3), [lambda m: m[:9].view(3, 3), lambda m: m[:9].view(3, 3).t()]),
    "dtype": (
        (9,),
        [
            lambda m: m[:9],
            lambda m: m.view(torch.float32)[:9],
            lambda m: m.view(torch.bfloat16)[:9],
        ],
    ),
    # an imaginary part of a conjugate; of more elements it is not contiguous
    "negated_when_read": (
        (1,),
        [lambda m: m[1:2], lambda m: torch.view_as_complex(m[:2].view(1, 2)).conj().imag],
    ),
    "negated_and_strided": (
        (4,),
        [lambda m: m[1:9:2], lambda m: torch.view_as_complex(m[:8].view(4, 2)).conj().imag],
    ),
    "expanded": ((3, 3), [lambda m: m[:9].view(3, 3), lambda m: m[:3].expand(3, 3)]),
}


@each("name", GRAD_CHANGES)
@each("how", ["assigned", "away_between", "through_data"])
def test_another_gradient_at_the_same_address(
    device: torch.device, backend: str, name: str, how: str
) -> None:
    """Views of one buffer in turn, so that only dtype, stride or a lazy sign tells them apart."""
    shape, views = GRAD_CHANGES[name]
    memory = torch.randn(9, dtype=F64, device=device)
    memory.view(torch.bfloat16)[:] = torch.randn(36, device=device)  # sane in every dtype
    other = Parameter(torch.ones(2, dtype=F64, device=device))
    p, twin, other_twin = (
        Parameter(torch.ones(shape, dtype=F64, device=device)),
        Parameter(torch.ones(shape, dtype=F64, device=device)),
        Parameter(torch.ones(2, dtype=F64, device=device)),
    )
    ours = FusedAdamW([p, other], eps=1e-3, backend=backend)
    theirs = torch.optim.AdamW([twin, other_twin], eps=1e-3, foreach=False)
    for _ in range(2):
        for view in (view for view in views for _ in range(3)):
            grad = view(memory)
            if name == "dtype" and grad.dtype == F64:
                grad.nan_to_num_(0.0, 0.0, 0.0).clamp_(-4, 4)
            if how == "through_data" and p.grad is not None:
                p.grad.data = grad
            else:
                set_grad(p, grad)
            twin.grad = grad.to(F64, copy=True).resolve_neg()
            other.grad = torch.ones_like(other, requires_grad=False)
            other_twin.grad = other.grad.clone()
            ours.step()
            theirs.step()
            assert_same(ours, theirs)
            if how == "away_between":
                p.grad = twin.grad = None
                ours.step()
                theirs.step()
                assert_same(ours, theirs)


@each("what", ["grad", "param"])
def test_other_strides_at_the_same_address_where_none_are_contiguous(
    device: torch.device, backend: str, what: str
) -> None:
    """A dense cube in one order of dimensions, then in another, neither of which is contiguous."""
    orders = ((0, 2, 1), (1, 0, 2))
    p, twin = (
        Parameter(torch.ones(2, 2, 2, dtype=F64, device=device).permute(orders[0]))
        for _ in range(2)
    )
    ours, theirs = FusedAdamW([p], backend=backend), torch.optim.AdamW([twin], foreach=False)
    memory = torch.empty(2, 2, 2, dtype=F64, device=device)
    for step in range(6):
        grad = memory.copy_(torch.randn_like(memory)).permute(orders[what == "grad" and step > 2])
        if what == "param" and step == 3:
            for x in (p, twin):
                x.data = x.data.as_strided((2, 2, 2), (2, 4, 1))
        p.grad, twin.grad = grad, grad.clone()
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


def test_conjugated_gradient_at_the_same_address(device: torch.device, backend: str) -> None:
    z, twin = (Parameter(torch.ones(3, dtype=torch.complex128, device=device)) for _ in range(2))
    ours, theirs = FusedAdamW([z], backend=backend), torch.optim.AdamW([twin], foreach=False)
    memory = torch.randn(3, dtype=torch.complex128, device=device)
    for grad in (memory, memory.conj(), memory):
        z.grad, twin.grad = grad, grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(z, twin, **CONTRACT)


def test_gradient_of_another_layout_after_many_of_one(device: torch.device, backend: str) -> None:
    p, twin = (Parameter(torch.ones(4, 6, dtype=F64, device=device)) for _ in range(2))
    ours, theirs = FusedAdamW([p], backend=backend), torch.optim.AdamW([twin], foreach=False)
    for step in range(8):
        grad = torch.randn(4, 6, dtype=F64, device=device)
        if step >= 4:
            grad = torch.randn(6, 4, dtype=F64, device=device).t()
        p.grad, twin.grad = grad, grad.clone()
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


def test_param_of_another_layout_at_the_same_address(device: torch.device, backend: str) -> None:
    """Transposed in place: same object, address, dtype and numel, other elements."""
    p, twin = (Parameter(torch.ones(4, 6, dtype=F64, device=device)) for _ in range(2))
    ours, theirs = FusedAdamW([p], backend=backend), torch.optim.AdamW([twin], foreach=False)
    for step in range(8):
        if step == 4:
            for x in (p, twin):
                x.data = x.data.view(-1).view(6, 4).t()
        p.grad = torch.randn(4, 6, dtype=F64, device=device)
        twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert_same(ours, theirs)


def test_shorter_param_at_the_same_address_is_refused(device: torch.device, backend: str) -> None:
    buffer = torch.ones(8, device=device)
    p = Parameter(buffer)
    ours = FusedAdamW([p], backend=backend)
    for _ in range(4):
        step_all(ours)
    before = buffer.clone()
    p.grad = None
    p.data = buffer[:4]
    p.grad = torch.ones(4, device=device)
    with pytest.raises(RuntimeError, match=r"exp_avg of .* shape"):
        ours.step()
    assert torch.equal(buffer, before)
    assert float(ours.state[p]["step"]) == 4


def test_step_of_another_dtype_at_the_same_address(device: torch.device, backend: str) -> None:
    """The count is read in its new dtype."""
    p = Parameter(torch.ones(3, device=device))
    ours = FusedAdamW([p], backend=backend)
    memory = torch.zeros(1, dtype=F64, device=device)
    step_all(ours)
    for dtype in (torch.float32, F64, torch.float32):
        count = memory.view(dtype)[0]
        ours.state[p]["step"] = count.copy_(4.0)
        for expected in (5.0, 6.0, 7.0):
            step_all(ours)
            assert float(ours.state[p]["step"]) == expected


def test_amsgrad_switched_on_over_moments_of_another_dtype(
    device: torch.device, backend: str
) -> None:
    """The maximum is kept in the dtype of what it is the maximum of."""
    p = Parameter(torch.ones(16, dtype=torch.bfloat16, device=device))
    ours = FusedAdamW([p], backend=backend)
    step_all(ours)
    for key in ("exp_avg", "exp_avg_sq"):
        ours.state[p][key] = ours.state[p][key].float()
    ours.param_groups[0]["amsgrad"] = True
    for _ in range(3):
        step_all(ours)
    state = ours.state[p]
    assert state["max_exp_avg_sq"].dtype == state["exp_avg_sq"].dtype == torch.float32
    assert (state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all()


def step_with(layout: Callable[[Tensor], Tensor], *optimizers: torch.optim.Optimizer) -> None:
    """A step with new gradients, that of the first param laid out otherwise."""
    give_grads(*optimizers)
    for optimizer in optimizers:
        p = params_of(optimizer)[0]
        assert p.grad is not None
        p.grad = layout(p.grad)
        optimizer.step()


@each(
    "shape, strides",
    [((4, 3), ((1, 4), (3, 1))), ((2, 2, 2), ((4, 1, 2), (2, 4, 1)))],
    ids=["one_contiguous", "none_contiguous"],
)
def test_a_gradient_comes_back_in_another_layout(
    device: torch.device, backend: str, shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]
) -> None:
    x = torch.empty_strided(shape, strides[0], dtype=F64, device=device).fill_(0.5)  # no copies
    params = [[Parameter(x.clone()), Parameter(x.clone())] for _ in range(2)]
    ours, theirs = FusedAdamW(params[0], backend=backend), torch.optim.AdamW(params[1])
    for stride in (*strides, strides[0]):

        def laid_out(grad: Tensor, stride: tuple[int, ...] = stride) -> Tensor:
            return grad.new_empty_strided(shape, stride).copy_(grad)

        step_with(laid_out, ours, theirs)
        assert_same(ours, theirs)
        step_all(ours, theirs, absent=0)
        assert_same(ours, theirs)


@each(
    "reshaped",
    [lambda x: x.as_strided((2, 12), (1, 2)), lambda x: x.view(24), lambda x: x.view(12, 2)],
    ids=["strided", "fewer_dimensions", "rows"],
)
def test_a_gradient_comes_back_in_another_shape(
    device: torch.device, backend: str, reshaped: Callable[[Tensor], Tensor]
) -> None:
    """Its param has changed while it was away: what was known of its layout says nothing."""
    column = torch.randn(24, 1, dtype=F64, device=device)
    params = [[Parameter(column.clone()), Parameter(column.clone())] for _ in range(2)]
    ours, theirs = FusedAdamW(params[0], backend=backend), torch.optim.AdamW(params[1])
    step_with(lambda grad: grad.as_strided((24, 1), (1, 2)), ours, theirs)  # counts as contiguous
    for optimizer in (ours, theirs):
        p = params_of(optimizer)[0]
        p.grad, p.data = None, reshaped(p.data)
        state = optimizer.state[p]
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = reshaped(state[key].clone())
    step_all(ours, theirs, absent=0)
    step_with(Tensor.contiguous, ours, theirs)
    assert_same(ours, theirs)
    assert ours._plan is not None
    assert len(ours._plan.copied) == (not params_of(ours)[0].is_contiguous())  # else as they are
