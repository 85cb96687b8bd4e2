"""torch's optimizer contract, on both paths, step by step beside torch.optim.AdamW.

What is compared with torch is float64 (float32 where GradScaler wants it): there the roundings are
1e-15, so that anything above CONTRACT is a difference in what is done, not in how it is rounded.
"""

from __future__ import annotations

import copy
import io
import pickle
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode
from truth import same_bits, set_grad

from fused_adamw import FusedAdamW, plan

CONTRACT = {"rtol": 1e-12, "atol": 1e-14}
F64 = torch.float64
each = pytest.mark.parametrize
TORCH = {  # torch's implementations; capturable steps on accelerators only
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
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
    for _ in range(2):
        step_all(ours, theirs)
        assert_same(ours, theirs)
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
        step_all(ours, theirs)
        assert_same(ours, theirs)
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

    def value() -> Any:
        if which == "lr":
            return torch.full(shape, 0.05, dtype=F64)
        return tuple(torch.full(shape, x, dtype=F64) for x in (0.8, 0.99))

    params = make_params(device)
    ours = FusedAdamW(params, **{**OPTIONS, which: value()}, backend=backend)
    theirs = torch.optim.AdamW(clones(params), **{**OPTIONS, which: value()}, foreach=False)
    for _ in range(3):
        step_all(ours, theirs)
        assert_same(ours, theirs)
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


def test_overlapping_params_are_refused_by_the_kernel(device: torch.device) -> None:
    """Two Parameters that share one element of a buffer; the names are those that were given."""
    buffer = torch.ones(8, device=device)
    named = [("head.weight", Parameter(buffer[:5])), ("embed.weight", Parameter(buffer[4:]))]
    optimizer = FusedAdamW(named, backend="triton")
    for _, p in named:
        p.grad = torch.ones_like(p, requires_grad=False)
    with pytest.raises(ValueError, match=r"head\.weight.*embed\.weight"):
        optimizer.step()
    assert (buffer == 1).all()
    assert not optimizer.state


def test_the_same_param_twice_is_updated_twice_by_the_reference() -> None:
    p, twin = (Parameter(torch.ones(3, dtype=F64)) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ours = FusedAdamW([p, p], backend="reference")
    with pytest.warns(UserWarning, match="duplicate parameters"):
        theirs = torch.optim.AdamW([twin, twin], foreach=False)
    for _ in range(2):
        step_all(ours, theirs)
        assert_same(ours, theirs)
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
    for _ in range(2):
        step_all(ours, theirs)
        assert_same(ours, theirs)
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
def test_version_counters(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """Of all that was written, and of nothing else: a param without a gradient keeps its own."""
    optimizer = FusedAdamW(make_params(device, dtype), amsgrad=True, backend=backend)
    step_all(optimizer)
    give_grads(optimizer, absent=1)
    params = params_of(optimizer)

    def versions() -> list[list[int]]:
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return [[p._version, *(optimizer.state[p][k]._version for k in keys)] for p in params]

    before, grads = versions(), [p.grad._version for p in params if p.grad is not None]
    optimizer.step()
    for i, (old, new) in enumerate(zip(before, versions(), strict=True)):
        assert all((b > a) == (i != 1) for a, b in zip(old, new, strict=True)), (i, old, new)
    assert [p.grad._version for p in params if p.grad is not None] == grads


def test_version_counters_of_steps(device: torch.device, backend: str) -> None:
    optimizer, _ = beside_torch(device, backend)
    for _ in range(2):
        step_all(optimizer)
        before = [optimizer.state[p]["step"]._version for p in params_of(optimizer)]
        step_all(optimizer)
        after = [optimizer.state[p]["step"]._version for p in params_of(optimizer)]
        assert all(b > a for a, b in zip(before, after, strict=True))


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

    Of two steps, but of one with amsgrad: torch then writes over what the graph has saved.
    """
    steps = 1 if amsgrad else 2

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


# ------------------------------------------------------------------------- copies and checkpoints


def test_deepcopy(device: torch.device, backend: str) -> None:
    optimizer, _ = beside_torch(device, backend, amsgrad=True)
    step_all(optimizer)
    twin = copy.deepcopy(optimizer)
    assert type(twin) is FusedAdamW
    assert twin.backend == backend
    assert {p.data_ptr() for p in params_of(twin)}.isdisjoint(
        p.data_ptr() for p in params_of(optimizer)
    )
    for _ in range(2):
        step_all(optimizer, twin)
        assert_same(optimizer, twin, tolerance=0)


def test_pickle(device: torch.device, backend: str) -> None:
    optimizer, _ = beside_torch(device, backend, amsgrad=True)
    step_all(optimizer)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.backend == backend
    assert twin._step_supports_amp_scaling
    for _ in range(2):
        step_all(optimizer, twin)
        assert_same(optimizer, twin, tolerance=0)


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@each("dtype", [torch.float32, torch.bfloat16], ids=str)
@each("amsgrad", [False, True])
def test_resume_is_bit_exact(
    device: torch.device, backend: str, dtype: torch.dtype, amsgrad: bool
) -> None:
    """Five steps at once, or two, a file, another optimizer with other options, and three."""
    at_once = FusedAdamW(make_params(device, dtype), **OPTIONS, amsgrad=amsgrad, backend=backend)
    first = FusedAdamW(
        clones(params_of(at_once)),  # type: ignore[arg-type]
        **OPTIONS,
        amsgrad=amsgrad,
        backend=backend,
    )
    for absent in (None, 1):
        step_all(at_once, first, absent=absent)
    resumed = FusedAdamW(clones(params_of(first)), lr=1.0, backend=backend)  # type: ignore[arg-type]
    resumed.load_state_dict(saved_and_loaded(first.state_dict()))
    for absent in (0, None, None):
        step_all(at_once, resumed, absent=absent)
        assert_same(at_once, resumed, tolerance=0)


def test_backend_is_no_part_of_the_state_dict(device: torch.device, backend: str) -> None:
    ours, theirs = beside_torch(device, backend)
    step_all(ours, theirs)
    mine, its = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == its.keys()
    assert mine["param_groups"][0].keys() == its["param_groups"][0].keys()
    assert mine["state"].keys() == its["state"].keys()
    assert all(mine["state"][i].keys() == its["state"][i].keys() for i in its["state"])
    other = FusedAdamW(make_params(device), backend="reference")
    other.load_state_dict(mine)
    assert other.backend == "reference"


@each("impl", [*TORCH, "capturable"])
@each("amsgrad", [False, True])
def test_torchs_checkpoint_here(
    device: torch.device, backend: str, impl: str, amsgrad: bool
) -> None:
    """Then both go on from there. Off accelerators capturable is a flag of the file only."""
    params = make_params(device)
    theirs = torch.optim.AdamW(
        clones(params), **OPTIONS, amsgrad=amsgrad, **TORCH.get(impl, {"foreach": False})
    )
    for absent in (None, 2):
        step_all(theirs, absent=absent)
    saved = saved_and_loaded(theirs.state_dict())
    if impl == "capturable":
        saved["param_groups"][0]["capturable"] = True
    ours = FusedAdamW(clones(params_of(theirs)), backend=backend)  # type: ignore[arg-type]
    ours.load_state_dict(saved)
    assert_same(ours, theirs)
    for absent in (0, None):
        step_all(ours, theirs, absent=absent)
        assert_same(ours, theirs)


@each("impl", TORCH)
@each("amsgrad", [False, True])
def test_our_checkpoint_in_torch(
    device: torch.device, backend: str, impl: str, amsgrad: bool
) -> None:
    ours = FusedAdamW(make_params(device), **OPTIONS, amsgrad=amsgrad, backend=backend)
    for absent in (None, 2):
        step_all(ours, absent=absent)
    saved = saved_and_loaded(ours.state_dict())
    theirs = torch.optim.AdamW(clones(params_of(ours)), **TORCH[impl])  # type: ignore[arg-type]
    saved["param_groups"][0].update({"foreach": None, "fused": None, **TORCH[impl]})
    theirs.load_state_dict(saved)
    assert_same(ours, theirs)
    for absent in (0, None):
        step_all(ours, theirs, absent=absent)
        assert_same(ours, theirs)


def test_old_layouts(device: torch.device, backend: str) -> None:
    """torch before 1.12: Python numbers as steps, and groups that know five options."""
    ours, theirs = beside_torch(device, backend)
    for absent in (None, 1):
        step_all(theirs, absent=absent)
    old = copy.deepcopy(theirs.state_dict())
    for state in old["state"].values():
        state["step"] = int(state["step"])
    known = ("lr", "betas", "eps", "weight_decay", "params")
    old["param_groups"] = [{k: g[k] for k in known} for g in old["param_groups"]]
    for p, twin in zip(params_of(ours), params_of(theirs), strict=True):
        p.data.copy_(twin.data)
    ours.load_state_dict(old)
    for _ in range(2):
        step_all(ours, theirs)
        assert_same(ours, theirs)
    assert [state["step"] for state in old["state"].values()] == [2, 1, 2]


def test_loading_aliases_nothing(device: torch.device, backend: str) -> None:
    """Neither state nor a tensor lr: stepping on leaves the loaded dict as it was."""
    lr = torch.tensor(0.1, dtype=F64, device=device)
    source = FusedAdamW(make_params(device), lr=lr, amsgrad=True, backend=backend)
    step_all(source)
    saved = source.state_dict()
    kept = copy.deepcopy(saved)
    optimizer = FusedAdamW(clones(params_of(source)), amsgrad=True, backend=backend)  # type: ignore[arg-type]
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["lr"].mul_(0.5)
    step_all(optimizer)
    for index, state in kept["state"].items():
        own = optimizer.state[params_of(optimizer)[index]]
        for key, value in state.items():
            assert same_bits(value, saved["state"][index][key])
            assert own[key].data_ptr() != saved["state"][index][key].data_ptr()
    assert lr.item() == 0.1


@each("layout", ["channels_last", "transposed"])
def test_loading_casts_to_dtype_and_layout_of_the_param(
    device: torch.device, backend: str, layout: str
) -> None:
    """float32 of a contiguous param into bfloat16 of another layout; steps stay float32."""
    value = torch.randn(2, 5, 3, 3, device=device)
    source = FusedAdamW([Parameter(value)], amsgrad=True, backend=backend)
    step_all(source)
    source.state[params_of(source)[0]]["step"].fill_(299)  # bfloat16 would stop at 256
    moved = value.to(torch.bfloat16)
    moved = (
        moved.to(memory_format=torch.channels_last)
        if layout == "channels_last"
        else moved.transpose(0, 1).contiguous().transpose(0, 1)
    )
    p = Parameter(moved)
    assert not p.is_contiguous()
    optimizer = FusedAdamW([p], amsgrad=True, backend=backend)
    optimizer.load_state_dict(source.state_dict())
    (old,) = (source.state[q] for q in params_of(source))
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        own = optimizer.state[p][key]
        assert own.dtype == torch.bfloat16
        assert own.stride() == p.stride()
        assert torch.equal(own, old[key].to(torch.bfloat16))
    assert optimizer.state[p]["step"].dtype == torch.float32
    step_all(optimizer)
    assert float(optimizer.state[p]["step"]) == 300


def test_decoupled_belongs_to_the_constructed_optimizer(device: torch.device, backend: str) -> None:
    """torch's AdamW saves True and old files nothing: neither turns L2 into decay, or back."""
    params = make_params(device)
    both = [
        FusedAdamW(clones(params), **OPTIONS, decoupled_weight_decay=d, backend=backend)
        for d in (True, False)
    ]
    for optimizer in both:
        step_all(optimizer)
    saved = [copy.deepcopy(o.state_dict()) for o in both]
    for optimizer, other in zip(both, reversed(saved), strict=True):
        optimizer.load_state_dict(other)
    assert [o.param_groups[0]["decoupled_weight_decay"] for o in both] == [True, False]


def _drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda saved: saved["state"][1].pop(key)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "shape": (lambda s: s["state"][1].update(exp_avg_sq=torch.ones(8)), r"exp_avg_sq of .*\[1\]"),
    "no_exp_avg": (_drop("exp_avg"), "not \\['exp_avg'\\]"),
    "no_step": (_drop("step"), "not \\['step'\\]"),
    "groups": (lambda s: s["param_groups"].append(s["param_groups"][0]), "parameter groups"),
    "params": (lambda s: s["param_groups"][0]["params"].append(3), "doesn't match the size"),
    "lr": (lambda s: s["param_groups"][0].update(lr=float("nan")), "Invalid learning rate: nan"),
    "betas": (lambda s: s["param_groups"][0].update(betas=(0.9, 1.5)), "index 1: 1.5"),
}


@each("break_it, words", BROKEN.values(), ids=BROKEN)
def test_a_load_that_fails_changes_nothing(
    device: torch.device, backend: str, break_it: Callable[[dict[str, Any]], object], words: str
) -> None:
    ours, theirs = beside_torch(device, backend)
    step_all(ours, theirs)
    saved = copy.deepcopy(ours.state_dict())
    step_all(ours, theirs)
    break_it(saved)
    before = snapshot(ours)
    lr = ours.param_groups[0]["lr"]
    with pytest.raises((RuntimeError, ValueError, TypeError), match=words):
        ours.load_state_dict(saved)
    assert_unchanged(ours, before)
    assert ours.param_groups[0]["lr"] == lr
    step_all(ours, theirs)
    assert_same(ours, theirs)


# --------------------------------------------------------------------------------------- GradScaler


def scaled_pair(
    device: torch.device, backend: str, **options: Any
) -> tuple[FusedAdamW, torch.optim.AdamW, list[torch.amp.GradScaler]]:
    params = make_params(device, torch.float32)
    scalers = [
        torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=2) for _ in range(2)
    ]
    theirs = torch.optim.AdamW(clones(params), **OPTIONS, fused=True)
    return FusedAdamW(params, **OPTIONS, backend=backend, **options), theirs, scalers


FLOAT32 = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}  # some ULPs of float32, over 6 steps


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
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@each("what", ["step", "model", "both"])
def test_torch_compile(device: torch.device, backend: str, what: str) -> None:
    """A graph break is fine, an error or another result is not; no compiler is needed for eager."""
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


# ------------------------------------------------------------------------------- errors of a step


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


class ElsewhereGrad(Parameter):
    """torch lets no gradient of another device in: hand one out."""

    @property  # type: ignore[override]
    def grad(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def _sparse(optimizer: FusedAdamW, p: Tensor) -> None:
    p.grad = torch.ones_like(p, requires_grad=False).to_sparse()


def _state(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[FusedAdamW, Tensor], None]:
    def bad(optimizer: FusedAdamW, p: Tensor) -> None:
        optimizer.state[p][key] = change(optimizer.state[p][key])

    return bad


def _add(make: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def bad(optimizer: FusedAdamW, p: Tensor) -> None:
        new = make(p.detach())
        optimizer.add_param_group({"params": [new]})
        if type(new) is Parameter:
            new.grad = torch.empty_like(new, requires_grad=False)
        elif isinstance(new, Wrapper):
            new.grad = Wrapper(p.detach())

    return bad


def _hyper(**values: Any) -> Callable[[FusedAdamW, Tensor], None]:
    return lambda optimizer, p: optimizer.param_groups[0].update(values)


def _expanded(p: Tensor) -> Tensor:
    return Parameter(p.new_ones(1, 4).expand(3, 4))


def _int(p: Tensor) -> Tensor:
    return Parameter(p.new_ones(3, dtype=torch.int32), requires_grad=False)


def _float8(p: Tensor) -> Tensor:
    return Parameter(p.new_ones(3).to(torch.float8_e5m2), requires_grad=False)


def _conj(p: Tensor) -> Tensor:
    return Parameter(torch.ones(3, dtype=torch.complex64, device=p.device).conj())


STEP_ERRORS: dict[str, tuple[Callable[..., None], type[Exception], str]] = {
    "sparse_grad": (_sparse, RuntimeError, "does not support sparse gradients, please consider S"),
    "expanded_param": (_add(_expanded), RuntimeError, "overlapping elements"),
    "grad_elsewhere": (_add(ElsewhereGrad), RuntimeError, "gradient is on meta"),
    "int_param": (_add(_int), TypeError, "torch.int32"),
    "float8_param": (_add(_float8), TypeError, "torch.float8_e5m2"),
    # torch refuses it, too: an update of the stored elements would be that of the conjugates
    "conjugated_param": (_add(_conj), RuntimeError, "conj"),
    "state_elsewhere": (
        _state("exp_avg", lambda x: x.to("meta")),
        RuntimeError,
        "exp_avg of .* is on meta",
    ),
    "state_shape": (_state("exp_avg_sq", lambda x: x[:-1]), RuntimeError, "exp_avg_sq of .* shape"),
    "state_dtype": (
        _state("exp_avg", lambda x: x.to(torch.int64)),
        TypeError,
        "exp_avg of .*int64",
    ),
    "step_elsewhere": (_state("step", lambda x: x.to("meta")), RuntimeError, "step"),
    "step_shape": (_state("step", lambda x: x.repeat(2)), RuntimeError, "step"),
    "state_missing": (
        lambda optimizer, p: optimizer.state[p].pop("exp_avg"),
        RuntimeError,
        r"not \['exp_avg'\]",
    ),
    "lr_nan": (_hyper(lr=float("nan")), ValueError, "Invalid learning rate: nan"),
    "lr_inf": (_hyper(lr=float("inf")), ValueError, "Invalid learning rate: inf"),
    "betas": (_hyper(betas=(0.9, 1.0)), ValueError, "Invalid beta parameter at index 1"),
    "eps": (_hyper(eps=-1.0), ValueError, "Invalid epsilon"),
    "weight_decay": (_hyper(weight_decay=float("nan")), ValueError, "Invalid weight_decay"),
}


@each("spoil, error, words", STEP_ERRORS.values(), ids=STEP_ERRORS)
@each("steps", [0, 1], ids=["first_step", "later_step"])
def test_an_error_of_a_step_changes_nothing(
    device: torch.device,
    backend: str,
    steps: int,
    spoil: Callable[..., None],
    error: type[Exception],
    words: str,
) -> None:
    """What is wrong with one tensor leaves all others as they are, and the next step works."""
    ours, theirs = beside_torch(device, backend)
    for _ in range(steps):
        step_all(ours, theirs)
    victim = params_of(ours)[1]
    if not steps and spoil.__qualname__.startswith("_state"):
        ours.state[victim] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(victim.data),
            "exp_avg_sq": torch.zeros_like(victim.data),
        }
    elif not steps and "pop" in spoil.__code__.co_names:
        ours.state[victim] = {"step": torch.zeros((), device=device)}
        ours.state[victim]["exp_avg_sq"] = torch.zeros_like(victim.data)
        spoil = lambda optimizer, p: None  # noqa: E731
    give_grads(ours, theirs)
    state, groups = dict(ours.state[victim]) if victim in ours.state else None, ours.param_groups
    options, count, grad = dict(groups[0]), len(groups), victim.grad
    spoil(ours, victim)
    before = snapshot(ours)
    for _ in range(2):  # the second time it is no surprise, and still an error
        with pytest.raises(error, match=words):
            ours.step()
        assert_unchanged(ours, before)
    # undo what was spoilt: the step is then as if nothing had been
    del groups[count:]
    groups[0].update(options)
    victim.grad = grad
    if steps and state is not None:
        ours.state[victim] = state
    elif not steps:
        ours.state.pop(victim, None)
    ours.step()
    theirs.step()
    assert_same(ours, theirs)


# ----------------------------------------------------------------------------------- staleness
# Each way in which what was known of the tensors goes stale: done to both, then both go on.


def _at_other_memory(o: Any, p: Tensor) -> None:
    p.data = p.data.clone()


def _other_dtype(o: Any, p: Tensor) -> None:
    p.data = p.data.to(torch.float32)
    for key in ("exp_avg", "exp_avg_sq"):
        o.state[p][key] = o.state[p][key].to(torch.float32)


def _other_shape(o: Any, p: Tensor) -> None:
    p.grad = None
    p.data = torch.ones(2, 7, dtype=p.dtype, device=p.device)
    o.state.pop(p)


def _other_layout(o: Any, p: Tensor) -> None:
    p.grad = None
    p.data = p.data.contiguous() if not p.is_contiguous() else p.data


def _same_memory_transposed(o: Any, p: Tensor) -> None:
    """The address stays, and the numel; the shape and what the elements mean do not."""
    p.grad = None
    p.data = p.data.t()
    for key in ("exp_avg", "exp_avg_sq"):
        o.state[p][key] = o.state[p][key].t()


def _state_replaced(o: Any, p: Tensor) -> None:
    """As RL trainers do, which move states to the CPU and back."""
    for key, value in o.state[p].items():
        o.state[p][key] = value.clone() * 0.5 if key != "step" else value.clone()


def _state_swapped_through_data(o: Any, p: Tensor) -> None:
    """The objects stay, their memory does not."""
    for key, value in o.state[p].items():
        value.data = value.data * 0.5 if key != "step" else torch.full_like(value, 5)


def _states_swapped(o: Any, p: Tensor) -> None:
    """The same objects under each other's keys; one is for a square root, so without a sign."""
    state = o.state[p]
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"].abs_()


def _state_written_in_place(o: Any, p: Tensor) -> None:
    o.state[p]["exp_avg"].mul_(0.5)
    o.state[p]["step"].fill_(7)


def _step_replaced(o: Any, p: Tensor) -> None:
    o.state[p]["step"] = torch.tensor(5.0)


def _all_state_cleared(o: Any, p: Tensor) -> None:
    o.state.clear()


def _one_state_deleted(o: Any, p: Tensor) -> None:
    del o.state[p]


def _add_group(o: Any, p: Tensor) -> None:
    torch.manual_seed(7)
    o.add_param_group({"params": [Parameter(torch.randn(3, dtype=F64, device=p.device))], "lr": 1})


def _loaded(o: Any, p: Tensor) -> None:
    saved = copy.deepcopy(o.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    for state in saved["state"].values():
        state["exp_avg"] *= 2
    o.load_state_dict(saved)


def _param_appended(o: Any, p: Tensor) -> None:
    torch.manual_seed(7)
    new = Parameter(torch.randn(4, dtype=F64, device=p.device))
    o.param_groups[0]["params"].insert(1, new)


def _param_removed(o: Any, p: Tensor) -> None:
    del o.param_groups[0]["params"][1]


def _params_reversed(o: Any, p: Tensor) -> None:
    o.param_groups[0]["params"].reverse()


def _param_moved_to_another_group(o: Any, p: Tensor) -> None:
    other = o.param_groups[0]["params"].pop(1)
    o.add_param_group({"params": [other], "lr": 0.5, "weight_decay": 0.0})


def _param_object_replaced(o: Any, p: Tensor) -> None:
    """Another Parameter over the same memory: torch's state belongs to the object, so it is new."""
    params = o.param_groups[0]["params"]
    params[next(i for i, x in enumerate(params) if x is p)] = Parameter(p.data)


def _options_changed(o: Any, p: Tensor) -> None:
    o.param_groups[0].update(lr=0.2, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.3, maximize=True)


STALE = {
    f.__name__.strip("_"): f
    for f in (
        _at_other_memory,
        _other_shape,
        _other_layout,
        _same_memory_transposed,
        _state_replaced,
        _state_swapped_through_data,
        _states_swapped,
        _state_written_in_place,
        _step_replaced,
        _all_state_cleared,
        _one_state_deleted,
        _add_group,
        _loaded,
        _param_appended,
        _param_removed,
        _params_reversed,
        _param_moved_to_another_group,
        _param_object_replaced,
        _options_changed,
    )
}


@each("change", STALE.values(), ids=STALE)
@each("which, absent", [(0, None), (0, 2), (1, None)], ids=["", "one_idle", "second_part"])
def test_stale(
    device: torch.device,
    backend: str,
    change: Callable[..., None],
    which: int,
    absent: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "IN_CACHE", 1)  # so that each param is another part of a look
    ours, theirs = beside_torch(device, backend)
    for _ in range(2):  # the second with the first one's plan
        step_all(ours, theirs, absent=absent)
    for optimizer in (ours, theirs):
        change(optimizer, params_of(optimizer)[which])
    for _ in range(2):
        step_all(ours, theirs, absent=absent)
        assert_same(ours, theirs)


def test_stale_dtype_of_param_and_state(device: torch.device, backend: str) -> None:
    """Other memory of another dtype; compared in float32, whose rounding it then has."""
    ours, theirs = beside_torch(device, backend)
    step_all(ours, theirs)
    for optimizer in (ours, theirs):
        _other_dtype(optimizer, params_of(optimizer)[0])
    for _ in range(2):
        step_all(ours, theirs)
        assert_same(ours, theirs, tolerance=FLOAT32)


@each("through_data", [False, True], ids=["", "through_data"])
@each("key", ["exp_avg", "exp_avg_sq", "param"])
def test_stale_dtype_at_the_same_address(
    device: torch.device, backend: str, key: str, through_data: bool
) -> None:
    """Memory freed and given out again at once, now for 9 float64 where 9 float32 were.

    The allocators round sizes up (CUDA's to 512 bytes), so that this is nothing rare. Params are
    always swapped through `.data`; a state may be, and keeps its object then.
    """
    p = Parameter(torch.randn(9, device=device))
    ours = FusedAdamW([p], **OPTIONS, backend=backend)
    memory = torch.zeros(9, dtype=F64, device=device)
    as32 = memory.view(torch.float32)[:9]
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
    for _ in range(2):
        step_all(ours, fresh)
        assert_same(ours, fresh, tolerance=0)


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
    for _ in range(2):
        step_all(ours, theirs)
        assert_same(ours, theirs)


def test_stale_state_whose_object_has_the_id_of_the_last(
    device: torch.device, backend: str
) -> None:
    """A state that died, and its place in memory given to a view of the same elements."""
    ours, theirs, p, twin = squares(device, backend)
    memory = torch.zeros(9, dtype=F64, device=device)
    ours.state[p]["exp_avg"] = memory.view(3, 3).copy_(ours.state[p]["exp_avg"])
    step_all(ours, theirs)
    last, others = id(ours.state[p].pop("exp_avg")), []
    while id(transposed := memory.as_strided((3, 3), (1, 3))) != last:
        others.append(transposed)  # kept, so that the next one is elsewhere
        assert len(others) < 10_000
    ours.state[p]["exp_avg"] = transposed
    theirs.state[twin]["exp_avg"] = theirs.state[twin]["exp_avg"].t()
    for _ in range(2):
        step_all(ours, theirs)
        assert_same(ours, theirs)


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
    for _ in range(2):
        step_all(ours, theirs)
        assert_same(ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.param_groups[0]["amsgrad"] = False
    step_all(ours, theirs)
    assert_same(ours, theirs)


def test_gradients_that_come_and_go(
    device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a param that had none in the first steps, and for all at once."""
    monkeypatch.setattr(plan, "IN_CACHE", 2)  # so that there are parts of a look: 2 params and 1
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


# ------------------------------------------------------------------------------ no reads, no work


class Recorded(TorchDispatchMode):
    """The operations of torch that a step runs; a host read of a tensor is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "profiler":  # torch's own mark around every step
            self.names.append(func.name())
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a step has read a tensor from the host")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernels: the interpreter itself copies what it is given."""
    from fused_adamw.kernels import adamw, schedule

    monkeypatch.setattr(schedule, "schedule", lambda *args, **kwargs: None)
    monkeypatch.setattr(adamw, "adamw", lambda *args, **kwargs: None)


@pytest.mark.usefixtures("no_launch")
@each("scaled", [False, True], ids=["", "grad_scaler"])
def test_a_step_reads_nothing_from_the_device(device: torch.device, scaled: bool) -> None:
    """From the first step on, with gradients that move and go and options that change."""
    optimizer = FusedAdamW(make_params(device), amsgrad=True, backend="triton")
    if scaled:
        optimizer.grad_scale = torch.tensor(2.0, device=device)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
    for step in range(4):
        give_grads(optimizer, absent=step if step < 3 else None)
        optimizer.param_groups[0]["lr"] = 0.1 * step
        with Recorded() as mode:
            optimizer.step()
        # Words are written through NumPy, whose view of a tensor begins with detach(). State is
        # made in step 0, and in step 1 for the param that was absent.
        first = {"aten::zeros_like", "aten::lift_fresh", "aten::unbind.int"} if step < 2 else set()
        known = {"aten::empty.memory_format", "aten::detach", "aten::slice.Tensor", "aten::copy_"}
        assert set(mode.names) <= known | first


@pytest.mark.usefixtures("no_launch")
def test_a_step_with_nothing_moved_runs_no_operation(device: torch.device) -> None:
    """No copy, no allocation, and none for the first step's reserve either."""
    optimizer = FusedAdamW(make_params(device), backend="triton")
    step_all(optimizer)
    with Recorded() as mode:
        optimizer.step()
    assert mode.names == []


def test_recorded_sees_a_host_read() -> None:
    """So that the tests above can fail."""
    with Recorded(), pytest.raises(AssertionError, match="has read a tensor"):
        float(torch.ones(()))


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


def test_tensor_subclass_is_refused_where_it_is_passed(device: torch.device, backend: str) -> None:
    wrapper = Wrapper(torch.ones(3, device=device))
    with pytest.raises(TypeError, match="is a Wrapper, a tensor subclass"):
        FusedAdamW([wrapper], backend=backend)
    ours = FusedAdamW([Parameter(torch.ones(3, device=device))], backend=backend)
    with pytest.raises(TypeError, match="is a Wrapper, a tensor subclass"):
        ours.add_param_group({"params": [wrapper]})
    assert len(ours.param_groups) == 1


def test_running_out_of_memory_for_state_changes_nothing(
    device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = Parameter(torch.ones(3, device=device))
    p.grad = torch.ones_like(p, requires_grad=False)
    ours = FusedAdamW([p], backend=backend)
    real, calls = torch.zeros_like, iter(range(2))

    def runs_out(*args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        ours.step()
    monkeypatch.undo()
    assert not ours.state
    ours.step()
    assert float(ours.state[p]["step"]) == 1


def test_group_that_is_differentiable_leaves_unscaling_to_the_scaler(device: torch.device) -> None:
    p, q = (Parameter(torch.ones(3, device=device)) for _ in range(2))
    ours = FusedAdamW([{"params": [p]}, {"params": [q], "differentiable": True}])
    assert not ours._step_supports_amp_scaling
    ours.found_inf = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="fused=False"):
        ours.step()


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
