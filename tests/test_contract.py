"""torch's optimizer contract, on both paths, step by step beside torch.optim.AdamW.

Of the constructor, groups, steps, autograd, and torch's global switches. State dicts, GradScaler,
what goes stale and errors have files of their own.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from truth import same_bits
from twins import (
    F64,
    OPTIONS,
    TORCH_VERSION,
    assert_same,
    assert_unchanged,
    beside_torch,
    clones,
    give_grads,
    go_on_alike,
    make_params,
    params_of,
    snapshot,
    step_all,
)

from fused_adamw import FusedAdamW, look
from fused_adamw.checks import refuse_overlaps

each = pytest.mark.parametrize

# ---------------------------------------------------------------------------------- constructor
BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lr_negative": ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    "lr_nan": ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
    "lr_two_elements": ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
    "beta1_one": ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    "beta1_negative": ({"betas": (-0.1, 0.9)}, ValueError, "Invalid beta parameter at index 0"),
    "beta2_one": ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
    "beta2_nan": (
        {"betas": (0.9, float("nan"))},
        ValueError,
        "Invalid beta parameter at index 1: nan",
    ),
    "betas_mixed": (
        {"betas": (0.9, torch.tensor(0.9))},
        ValueError,
        "betas must be either both floats or both Tensors",
    ),
    "eps_negative": ({"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0"),
    "decay_negative": ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay value: -1.0"),
    "fused_differentiable": (
        {"fused": True, "differentiable": True},
        RuntimeError,
        "`fused` does not support `differentiable`",
    ),
    "fused_foreach": (
        {"fused": True, "foreach": True},
        RuntimeError,
        "`fused` and `foreach` cannot be `True` together.",
    ),
}

OWN_BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lr_inf": ({"lr": float("inf")}, ValueError, "Invalid learning rate: inf"),
    "eps_inf": ({"eps": float("inf")}, ValueError, "Invalid epsilon value: inf"),
    "beta_two_elements": (
        {"betas": (torch.full((2,), 0.9), torch.tensor(0.9))},
        ValueError,
        r"Tensor betas[0] must be 1-element",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "Invalid backend: 'cuda'"),
}


@each("options, error, words", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_constructor_errors_are_torchs(options: Any, error: type[Exception], words: str) -> None:
    for cls in (FusedAdamW, torch.optim.AdamW):
        with pytest.raises(error, match=re.escape(words)):
            cls([Parameter(torch.ones(1))], **options)


@each("options, error, words", OWN_BAD_OPTIONS.values(), ids=OWN_BAD_OPTIONS)
def test_constructor_errors_of_our_own(options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        FusedAdamW([Parameter(torch.ones(1))], **options)


def test_constructor_errors_of_params_are_torchs() -> None:
    leaf = Parameter(torch.ones(1))
    bad: list[tuple[Any, type[Exception]]] = [
        ([], ValueError),
        (leaf, TypeError),
        ([leaf * 2], ValueError),
        ([{"params": [leaf]}, {"params": [leaf]}], ValueError),
        (["x"], TypeError),
    ]
    for params, error in bad:
        messages = []
        for cls in (FusedAdamW, torch.optim.AdamW):
            with pytest.raises(error) as caught:
                cls(params)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


@each("options, error, words", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_groups_own_options_are_checked_too(
    options: Any, error: type[Exception], words: str
) -> None:
    if error is RuntimeError:
        options = {"lr": -2.0}  # fused and foreach are no error in a group, in torch neither
        error, words = ValueError, "Invalid learning rate"
    with pytest.raises(error, match=re.escape(words)):
        FusedAdamW([{"params": [Parameter(torch.ones(1))], **options}])


def test_repr_shows_the_groups_as_torch_does() -> None:
    if TORCH_VERSION < (2, 7):
        pytest.skip("torch 2.6's groups do not say decoupled_weight_decay")
    p = Parameter(torch.ones(1))
    ours, theirs = (cls([p], lr=0.25) for cls in (FusedAdamW, torch.optim.AdamW))
    assert repr(ours) == repr(theirs).replace("AdamW (", "FusedAdamW (")


# ----------------------------------------------------------------------------------- groups, step
def test_add_param_group_in_mid_training(device: torch.device, backend: str) -> None:
    ours, theirs = beside_torch(device, backend)
    step_all(ours, theirs)
    late = Parameter(torch.randn(5, device=device, dtype=F64))
    ours.add_param_group({"params": late, "lr": 0.3, "betas": (0.5, 0.6), "amsgrad": True})
    theirs.add_param_group(
        {"params": clones([late]), "lr": 0.3, "betas": (0.5, 0.6), "amsgrad": True}
    )
    go_on_alike(ours, theirs)
    assert float(ours.state[late]["step"]) == 2


@each("options, error, words", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_a_refused_group_leaves_the_optimizer_as_it_was(
    backend: str, options: Any, error: type[Exception], words: str
) -> None:
    if error is RuntimeError:  # fused and foreach are no error in a group, in torch neither
        options, error = {"params": []}, ValueError
        words = "some parameters appear in more than one parameter group"
    ours, theirs = beside_torch(torch.device("cpu"), "reference")
    step_all(ours, theirs)
    before = snapshot(ours)
    new = Parameter(torch.ones(1))
    bad = {"params": [new], **options}
    if "params" in options:
        bad["params"] = [new, params_of(ours)[0]]
    with pytest.raises(error, match=re.escape(words)):
        ours.add_param_group(bad)
    assert_unchanged(ours, before)
    step_all(ours, theirs)
    assert_same(ours, theirs)


def test_closure(device: torch.device, backend: str) -> None:
    """Run once, with gradients enabled even under no_grad, and its loss is returned."""
    p = Parameter(torch.ones(3, device=device))
    optimizer = FusedAdamW([p], backend=backend)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * 2).sum()
        loss.backward()
        seen.append(torch.is_grad_enabled())
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 6
    assert seen == [True]
    assert (p < 1).all()
    assert torch.is_grad_enabled()


def test_step_hooks_run_in_order(device: torch.device, backend: str) -> None:
    optimizer, _ = beside_torch(device, backend)
    seen: list[Any] = []

    def before(opt: Any, args: Any, kwargs: Any) -> None:
        seen.append(("before", float(opt.state[params_of(opt)[0]].get("step", 0))))

    def after(opt: Any, args: Any, kwargs: Any) -> None:
        seen.append(("after", float(opt.state[params_of(opt)[0]]["step"])))

    handle = optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    step_all(optimizer)
    handle.remove()
    step_all(optimizer)
    assert seen == [("before", 0), ("after", 1), ("after", 2)]


def test_state_dict_hooks(device: torch.device, backend: str) -> None:
    optimizer, _ = beside_torch(device, backend)
    step_all(optimizer)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, sd: {**sd, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda o, sd: {k: v for k, v in sd.items() if k != "extra"}
    )
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert seen == ["save", "loaded"]


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "one_cycle": lambda o: OneCycleLR(o, max_lr=0.1, total_steps=9, cycle_momentum=True),
    "lambda": lambda o: LambdaLR(o, lambda step: 0.5**step),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=8),  # the last lr is 0 but for its rounding
}


@each("name", SCHEDULERS)
@each("lr", [0.05, torch.tensor(0.05, dtype=F64)], ids=["float", "tensor"])
def test_schedulers(device: torch.device, backend: str, name: str, lr: Any) -> None:
    params = make_params(device)
    ours = FusedAdamW(params, lr=copy.deepcopy(lr), backend=backend)
    theirs = torch.optim.AdamW(clones(params), lr=copy.deepcopy(lr), foreach=False)
    both = [SCHEDULERS[name](o) for o in (ours, theirs)]
    betas = set()
    for _ in range(9):
        go_on_alike(ours, theirs, steps=1)
        assert float(ours.param_groups[0]["lr"]) == float(theirs.param_groups[0]["lr"])
        betas.add(ours.param_groups[0]["betas"])
        if both[0].last_epoch < 8:
            for scheduler in both:
                scheduler.step()
    assert (len(betas) > 5) == (name == "one_cycle")


@each("shape", [(), (1,)], ids=["0-dim", "1-element"])
@each("which", ["lr", "betas"])
def test_tensor_hyper_parameters(
    device: torch.device, backend: str, shape: tuple[int, ...], which: str
) -> None:
    """On the CPU, changed in place between steps; float64, so that torch uses all of its bits."""
    if shape and TORCH_VERSION < (2, 7):
        pytest.skip("torch 2.6's for-loop takes 0-dim tensors only")

    def value() -> Any:
        if which == "lr":
            return torch.full(shape, 0.05, dtype=F64)
        return tuple(torch.full(shape, x, dtype=F64) for x in (0.8, 0.99))

    params = make_params(device)
    ours = FusedAdamW(params, **{**OPTIONS, which: value()}, backend=backend)
    theirs = torch.optim.AdamW(clones(params), **{**OPTIONS, which: value()}, foreach=False)
    for _ in range(3):
        go_on_alike(ours, theirs, steps=1)
        for optimizer in (ours, theirs):
            xs = optimizer.param_groups[0][which]
            for x in [xs] if which == "lr" else xs:
                x.mul_(0.9)


def test_tied_params_are_updated_once(device: torch.device, backend: str) -> None:
    def model() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
        net[2].weight = net[0].weight
        return net.to(device, F64)

    ours_net, theirs_net = model(), model()
    theirs_net.load_state_dict(ours_net.state_dict())
    ours = FusedAdamW(ours_net.parameters(), backend=backend)
    theirs = torch.optim.AdamW(theirs_net.parameters(), foreach=False)
    x = torch.randn(3, 4, device=device, dtype=F64)
    for _ in range(3):
        for net, optimizer in ((ours_net, ours), (theirs_net, theirs)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        assert_same(ours, theirs)
    assert len(params_of(ours)) == 1


def test_the_same_param_twice_is_refused_by_the_kernel(device: torch.device) -> None:
    p = Parameter(torch.ones(3, device=device))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = FusedAdamW([p, p], backend="triton")
    p.grad = torch.ones_like(p)
    message = r"param_groups\[0\]\['params'\]\[0\].*param_groups\[0\]\['params'\]\[1\]"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert (p == 1).all()
    assert not optimizer.state


@each("late", [False, True], ids=["at_once", "first_gradient"])
def test_overlapping_params_are_refused_by_the_kernel(device: torch.device, late: bool) -> None:
    """Two Parameters that share one element of a buffer; the names are those that were given."""
    buffer = torch.ones(8, device=device)
    named = [("head.weight", Parameter(buffer[:5])), ("embed.weight", Parameter(buffer[4:]))]
    optimizer = FusedAdamW(named, lr=0.0, backend="triton")
    named[0][1].grad = torch.ones_like(buffer[:5])
    if late:
        optimizer.step()
    named[1][1].grad = torch.ones_like(buffer[4:])
    with pytest.raises(ValueError, match=r"head\.weight.*embed\.weight"):
        optimizer.step()
    assert (buffer == 1).all()
    assert len(optimizer.state) == late


def test_overlapping_states_are_refused_by_the_kernel(device: torch.device) -> None:
    params = [Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = FusedAdamW(params, backend="triton")
    step_all(optimizer)
    pool = torch.zeros(6, device=device)
    first, second = (optimizer.state[p] for p in params)
    first["exp_avg"], second["exp_avg"] = pool[:3], pool[3:]  # side by side
    step_all(optimizer)
    second["exp_avg_sq"] = pool[2:5]
    words = r"exp_avg of param_groups\[0\]\['params'\]\[0\] and exp_avg_sq of .*\[1\] overlap"
    with pytest.raises(ValueError, match=words):
        step_all(optimizer)


@each(
    ("spans", "message"),
    [
        ([(0, 8), (8, 8), (16, 0), (16, 4)], None),  # one behind the other
        ([(16, 8), (20, 0), (0, 16)], None),  # without elements, within another
        ([(16, 8), (20, 0), (0, 17)], "2 and 0 overlap"),
        ([(9, 0), (0, 100), (50, 1), (60, 1)], "1 and 2 overlap"),  # the one within the other
    ],
    ids=str,
)
def test_overlaps(spans: list[tuple[int, int]], message: str | None) -> None:
    """Addresses and sizes; a message of None: there is nothing to refuse."""
    starts, sizes = zip(*spans, strict=True)
    refused = pytest.raises(ValueError, match=message) if message else contextlib.nullcontext()
    with refused:
        refuse_overlaps(starts, sizes, str)


def test_overlapping_stand_ins_are_no_params_that_overlap(device: torch.device) -> None:
    """Every second element each: what the kernel updates are copies."""
    buffer = torch.ones(8, device=device)
    params = [Parameter(buffer[::2]), Parameter(buffer[1::2])]
    optimizer = FusedAdamW(params, backend="triton")
    step_all(optimizer)
    assert (buffer != 1).all()


def test_the_same_param_twice_is_updated_twice_by_the_reference() -> None:
    p, twin = (Parameter(torch.ones(3, dtype=F64)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ours = FusedAdamW([p, p], backend="reference")
    with pytest.warns(UserWarning, match="duplicate parameters"):
        theirs = torch.optim.AdamW([twin, twin], foreach=False)
    go_on_alike(ours, theirs)
    assert float(ours.state[p]["step"]) == 4


def test_empty_groups_and_tensors(device: torch.device, backend: str) -> None:
    """Groups without params, or that end in an empty tensor: what comes before it is updated."""
    own = make_params(device)
    empty = Parameter(torch.zeros(0, 3, device=device, dtype=F64))
    groups = [
        {"params": []},
        {"params": [own[0], empty]},
        {"params": []},
        {"params": own[1:]},
        {"params": [Parameter(torch.zeros(0, device=device, dtype=F64))]},
    ]
    ours = FusedAdamW(groups, backend=backend)
    theirs = torch.optim.AdamW([{"params": clones(g["params"])} for g in groups], foreach=False)
    go_on_alike(ours, theirs)
    assert float(ours.state[empty]["step"]) == 2
    nothing = FusedAdamW([{"params": []}], backend=backend)
    nothing.step()
    assert nothing.state_dict()["state"] == {}


def test_a_step_without_any_gradient_changes_nothing(device: torch.device, backend: str) -> None:
    optimizer, _ = beside_torch(device, backend)
    before = snapshot(optimizer)
    optimizer.step()
    assert_unchanged(optimizer, before)
    step_all(optimizer)
    before = snapshot(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_unchanged(optimizer, before)


@each("set_to_none", [True, False])
def test_zero_grad(device: torch.device, backend: str, set_to_none: bool) -> None:
    """A gradient of zeros still moves the weight by its moments; none at all leaves it alone."""
    ours, theirs = beside_torch(device, backend)
    step_all(ours, theirs)
    before = snapshot(ours)
    for optimizer in (ours, theirs):
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
    assert_same(ours, theirs)
    if set_to_none:
        assert_unchanged(ours, before)
    step_all(ours, theirs)
    assert_same(ours, theirs)


def test_params_counted_on_their_own(device: torch.device, backend: str) -> None:
    ours, theirs = beside_torch(device, backend)
    for absent in (0, 1, None, 2, 0, None):
        step_all(ours, theirs, absent=absent)
        assert_same(ours, theirs)
    assert [float(ours.state[p]["step"]) for p in params_of(ours)] == [4, 5, 5]


# ---------------------------------------------------------------------------------- autograd
def test_a_stale_graph_raises(device: torch.device, backend: str) -> None:
    p = Parameter(torch.ones(3, device=device))
    optimizer = FusedAdamW([p], backend=backend)
    for _ in range(2):  # the second with a table that is there already
        p.grad = torch.ones_like(p, requires_grad=False)
        stale = (p * p).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()


@each("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_version_counters(
    device: torch.device, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all that was written, and of nothing else: a param without a gradient keeps its own."""
    monkeypatch.setattr(look, "IN_CACHE", 2)  # so that a look has parts
    groups = [
        {"params": make_params(device, dtype), "amsgrad": amsgrad} for amsgrad in (False, True)
    ]
    optimizer = FusedAdamW(groups, backend=backend)
    step_all(optimizer)
    give_grads(optimizer, absent=1)
    params = params_of(optimizer)

    def versions() -> list[list[int]]:
        kept = [[x for k, x in optimizer.state[p].items() if k != "step"] for p in params]
        return [[x._version for x in (p, *own)] for p, own in zip(params, kept, strict=True)]

    before, grads = versions(), [p.grad._version for p in params if p.grad is not None]
    optimizer.step()
    for i, (old, new) in enumerate(zip(before, versions(), strict=True)):
        assert all((b > a) == (i != 1) for a, b in zip(old, new, strict=True)), (i, old, new)
    assert [p.grad._version for p in params if p.grad is not None] == grads


def test_version_counters_of_steps(device: torch.device, backend: str) -> None:
    """Also where they are views of several tensors, made when their params came, and of none."""
    optimizer, _ = beside_torch(device, backend)
    for group_added in (False, True):
        for _ in range(2):
            step_all(optimizer)
            before = [optimizer.state[p]["step"]._version for p in params_of(optimizer)]
            step_all(optimizer)
            after = [optimizer.state[p]["step"]._version for p in params_of(optimizer)]
            assert all(b > a for a, b in zip(before, after, strict=True))
            if backend == "triton" and not group_added:  # once for all that share a counter
                assert all(b == a + 1 for a, b in zip(before, after, strict=True))
        optimizer.add_param_group({"params": make_params(device)})
        step_all(optimizer)
        alone = optimizer.state[params_of(optimizer)[1]]
        alone["step"] = alone["step"].clone()


def test_nothing_of_the_step_is_recorded(device: torch.device, backend: str) -> None:
    optimizer, _ = beside_torch(device, backend)
    step_all(optimizer)
    for p in params_of(optimizer):
        assert p.grad_fn is None
        assert p.is_leaf
        assert not any(x.requires_grad for x in optimizer.state[p].values())


@pytest.fixture
def warn_always() -> Iterator[None]:
    """Most of torch's warnings come once in a process: let none be used up by another test."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.usefixtures("warn_always")
@each("decoupled", [True, False])
@each("amsgrad", [True, False])
def test_differentiable_is_torchs_own(decoupled: bool, amsgrad: bool) -> None:
    """The gradient with respect to start, gradients and lr, without a warning about the latter.

    Of two steps, but of one with amsgrad: torch then writes over what the graph has saved, and
    torch 2.6 always.
    """
    steps = 1 if amsgrad or TORCH_VERSION < (2, 7) else 2

    def run(cls: Any, **options: Any) -> list[Tensor]:
        torch.manual_seed(1)
        leaves = [torch.randn(4, dtype=F64, requires_grad=True) for _ in range(steps + 1)]
        lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
        p = leaves[0].clone()
        optimizer = cls([p], lr=lr, amsgrad=amsgrad, differentiable=True, **options)
        for grad in leaves[1:]:
            p.grad = grad
            optimizer.step()
        value = (p * torch.arange(1, 5, dtype=F64)).sum()
        return [p, *torch.autograd.grad(value, [*leaves, lr])]

    ours = run(FusedAdamW, decoupled_weight_decay=decoupled, weight_decay=0.1)
    theirs = run(torch.optim.AdamW if decoupled else torch.optim.Adam, weight_decay=0.1)
    for a, b in zip(ours, theirs, strict=True):
        assert same_bits(a, b)
    assert all(x.abs().max() > 0 for x in ours)


def test_a_differentiable_group_that_raises_comes_first(device: torch.device, backend: str) -> None:
    p, q = (Parameter(torch.ones(3, device=device)) for _ in range(2))
    groups = [{"params": [p]}, {"params": [q], "differentiable": True}]
    optimizer = FusedAdamW(groups, backend=backend)  # type: ignore[arg-type]
    step_all(optimizer)
    before = [x.clone() for x in (p, *optimizer.state[p].values())]
    optimizer.state[q]["exp_avg"] = torch.zeros(4, device=device)
    with pytest.raises(RuntimeError, match="size of tensor"):
        step_all(optimizer)
    assert all(map(torch.equal, before, (p, *optimizer.state[p].values())))


@each("by_default", [False, True], ids=["group_alone", "by_default"])
def test_a_graph_is_recorded_if_differentiable_is_the_default(
    device: torch.device, backend: str, by_default: bool
) -> None:
    """As torch has it; beside a group that is not differentiable, and has none either way."""

    def run(cls: Any, **options: Any) -> list[Tensor]:
        torch.manual_seed(2)
        recorded, other = (torch.randn(4, dtype=F64, device=device) for _ in range(2))
        groups = [
            {"params": [recorded], "differentiable": True},
            {"params": [other.requires_grad_()], "differentiable": False},
        ]
        optimizer = cls(groups, differentiable=by_default, **options)
        recorded.grad = torch.ones_like(recorded, requires_grad=True)
        other.grad = torch.ones_like(other)
        optimizer.step()
        assert recorded.requires_grad == by_default
        assert other.is_leaf
        return [recorded, other]

    if by_default:  # torch has one switch for all groups, and then refuses the other
        run(FusedAdamW, backend=backend)
        return
    for a, b in zip(run(FusedAdamW, backend=backend), run(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------- torch's global switches
@each("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_default_dtype(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """Steps are float32 but under float64, as torch's; updates do not depend on it."""
    plain = FusedAdamW(make_params(device, torch.float32), backend=backend)
    params = clones(params_of(plain))  # type: ignore[arg-type]
    step_all(plain)
    grads = [p.grad for p in params_of(plain)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        optimizer = FusedAdamW(params, backend=backend)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
        copied = copy.deepcopy(optimizer)
    finally:
        torch.set_default_dtype(before)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    for p, q in zip(params, params_of(plain), strict=True):
        assert same_bits(p, q)
        assert optimizer.state[p]["step"].dtype == want
    step_all(optimizer, copied, plain)
    for a, b, c in zip(*map(params_of, (optimizer, copied, plain)), strict=True):
        assert same_bits(a, b)
        assert same_bits(a, c)


@each("default", ["cpu", "meta"])
def test_default_device(device: torch.device, backend: str, default: str) -> None:
    """A default device other than the params': nothing of the step may land there."""
    ours, theirs = beside_torch(device, backend)
    give_grads(ours, theirs)
    theirs.step()
    torch.set_default_device(default)
    try:
        ours.step()
        ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    finally:
        torch.set_default_device(None)
    assert_same(ours, theirs)
    assert {x.device.type for s in ours.state.values() for x in s.values()} == {device.type}


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """torch.compile starts from nothing, whatever other tests have compiled."""
    with warnings.catch_warnings():  # the import of torch's compiler warns of torch's own code
        warnings.simplefilter("ignore")
        torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@each("what", ["step", "model", "both"])
def test_torch_compile(device: torch.device, backend: str, what: str) -> None:
    """A graph break is fine, an error or another result is not; no compiler is needed for eager."""
    if TORCH_VERSION < (2, 7):
        pytest.skip("torch 2.6 cannot compile with Triton 3.6, which the kernels want")
    nets = [nn.Linear(4, 4).to(device, F64) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours = FusedAdamW(nets[0].parameters(), backend=backend)
    theirs = torch.optim.AdamW(nets[1].parameters(), foreach=False)
    model: Any = nets[0]
    step: Any = ours.step
    if what != "step":
        model = torch.compile(model, backend="eager")
    if what != "model":
        step = torch.compile(step, backend="eager")
    x = torch.randn(3, 4, device=device, dtype=F64)
    for _ in range(3):
        for net, optimizer, do in ((model, ours, step), (nets[1], theirs, theirs.step)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            do()
        assert_same(ours, theirs)


def test_betas_changed_in_place(device: torch.device, backend: str) -> None:
    """A list is a sequence of two betas as well."""
    ours, theirs = beside_torch(device, backend)
    for beta1 in (0.9, 0.9, 0.5, 0.5):
        for optimizer in (ours, theirs):
            if not isinstance(optimizer.param_groups[0]["betas"], list):
                optimizer.param_groups[0]["betas"] = list(optimizer.param_groups[0]["betas"])
            optimizer.param_groups[0]["betas"][0] = beta1
        step_all(ours, theirs)
        assert_same(ours, theirs)
