"""What is wrong with a tensor or an option is told, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from truth import same_bits
from twins import (
    Wrapper,
    assert_same,
    assert_unchanged,
    beside_torch,
    give_grads,
    params_of,
    snapshot,
    step_all,
)

from fused_adamw import FusedAdamW

each = pytest.mark.parametrize


class ElsewhereGrad(Parameter):
    """torch lets no gradient of another device in: hand one out."""

    @property  # type: ignore[override]
    def grad(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def _sparse(optimizer: FusedAdamW, p: Tensor) -> None:
    p.grad = torch.ones_like(p, requires_grad=False).to_sparse()


def _wrapped_grad(optimizer: FusedAdamW, p: Tensor) -> None:
    p.grad = Wrapper(torch.ones_like(p, requires_grad=False))  # its address is 0


def _grad_dtype(dtype: torch.dtype) -> Callable[[FusedAdamW, Tensor], None]:
    def bad(optimizer: FusedAdamW, p: Tensor) -> None:
        p.grad = torch.ones_like(p, requires_grad=False)
        p.grad.data = p.grad.data.to(dtype)  # torch lets no other dtype in

    return bad


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


def _wrapped_lr(optimizer: FusedAdamW, p: Tensor) -> None:
    optimizer.param_groups[0]["lr"] = Wrapper(torch.ones((), device=p.device))


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
    "wrapped_grad": (_wrapped_grad, TypeError, "gradient has to be one as well"),
    "complex_grad": (_grad_dtype(torch.complex64), TypeError, "gradient is torch.complex64"),
    "int_grad": (_grad_dtype(torch.int32), TypeError, "gradient is torch.int32"),
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
    "lr_text": (_hyper(lr="0.1"), TypeError, "Invalid lr: '0.1'"),
    "lr_wrapped": (_wrapped_lr, TypeError, "Invalid lr: a Wrapper"),
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


def test_an_lr_that_changes_in_place_is_checked(device: torch.device, backend: str) -> None:
    """The same object with another value: not to be taken for what was checked."""
    p, lr = Parameter(torch.ones(3, device=device)), torch.tensor(0.1)
    ours = FusedAdamW([p], lr=lr, backend=backend)
    step_all(ours)
    give_grads(ours)
    before = snapshot(ours)
    lr.fill_(float("nan"))
    with pytest.raises(ValueError, match="Invalid learning rate"):
        ours.step()
    lr.fill_(0.1)
    assert_unchanged(ours, before)


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


def test_messages_name_the_param_by_group_and_position(device: torch.device) -> None:
    params = [Parameter(torch.ones(1, device=device)) for _ in range(3)]
    adamw = FusedAdamW([{"params": params[:2]}, {"params": []}, {"params": params[2:]}])
    assert [adamw._name_at(place) for place in range(3)] == [
        "param_groups[0]['params'][0]",
        "param_groups[0]['params'][1]",
        "param_groups[2]['params'][0]",
    ]
    assert FusedAdamW([("head.bias", params[0])])._name_at(0) == "head.bias"


@each("key", ["exp_avg", "step"])
def test_a_state_that_keeps_its_memory_elsewhere_is_refused(
    device: torch.device, backend: str, key: str
) -> None:
    """A collective's result that nobody has waited for, say: its address is 0."""
    ours, theirs = beside_torch(device, backend)
    step_all(ours, theirs)
    state = ours.state[params_of(ours)[1]]
    plain, state[key] = state[key], Wrapper(state[key])
    give_grads(ours, theirs)
    before = [p.detach().clone() for p in params_of(ours)]
    with pytest.raises(TypeError, match=f"{key} of .* is a Wrapper"):
        ours.step()
    assert all(map(same_bits, params_of(ours), before))
    state[key] = plain
    for optimizer in (ours, theirs):
        optimizer.step()
    assert_same(ours, theirs)


FREED = r"somebody has freed it"


@each("part", [False, True], ids=["whole", "view"])
@each("what", ["param", "grad", "exp_avg", "step"])
@each("late", [False, True], ids=["", "beside_a_first_gradient"])
def test_freed_memory_is_refused(
    device: torch.device, backend: str, what: str, late: bool, part: bool
) -> None:
    """As trainers free it who offload; the address is 0 then, of a view its offset."""
    skip = 64 if part else 0
    params = [Parameter(torch.ones(64 + skip, device=device)[skip:]) for _ in range(4)]
    adamw = FusedAdamW(params, backend=backend)

    def give(absent: int | None) -> None:
        for i, p in enumerate(params):
            g = None if i in (3, absent) else torch.ones(64 + skip, device=device)[skip:]
            p.grad = g

    give(2)
    adamw.step()
    state = adamw.state[params[1]]
    state["step"] = torch.ones(1 + skip, device=device)[skip]  # not a part of what others have
    state["exp_avg"] = torch.ones(64 + skip, device=device)[skip:]
    adamw.step()
    give(None if late else 2)
    freed = {"param": params[1], "grad": params[1].grad, **state}[what]
    storage = freed.untyped_storage()
    kept, size = freed.detach().clone(), storage.nbytes()
    before = [p.detach().clone() for p in (params[0], params[2])]
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=FREED):
        adamw.step()
    assert all(map(same_bits, (params[0], params[2]), before))
    if what != "grad":  # those that are idle may be elsewhere, until a gradient comes
        grad, params[1].grad = params[1].grad, None
        params[3].data.untyped_storage().resize_(0)
        for _ in range(2):
            adamw.step()
        params[1].grad = grad
        with pytest.raises(RuntimeError, match=FREED):
            adamw.step()
    storage.resize_(size)
    freed.data.copy_(kept)
    adamw.step()
    assert float(state["step"]) == 3


def test_steps_that_are_freed_with_one_of_them_are_refused(
    device: torch.device, backend: str
) -> None:
    """As first made they are views of one tensor."""
    ours, _ = beside_torch(device, backend)
    step_all(ours)
    ours.state[params_of(ours)[1]]["step"].untyped_storage().resize_(0)
    give_grads(ours)
    with pytest.raises(RuntimeError, match="step of .*" + FREED):
        ours.step()


def test_what_is_idle_and_freed_is_not_read(device: torch.device, backend: str) -> None:
    """Params with gaps, which have stand-ins, and parts of buffers, at one address by then."""
    matrix, *flat = (torch.ones(*shape, device=device) for shape in ((64, 128), (128,), (128,)))
    views = matrix[:, :64], matrix[:32, 64:], *(x[64:] for x in flat), torch.ones_like(matrix)
    params = [Parameter(x) for x in views]
    adamw = FusedAdamW(params, backend=backend)
    step_all(adamw)
    for p in params[:-1]:
        p.grad = None
    kept = [x.clone() for x in (matrix, *flat)]
    for x in (matrix, *flat):
        x.untyped_storage().resize_(0)
    adamw.step()
    moment = adamw.state[params[0]]["exp_avg"]
    moment.untyped_storage().resize_(0)
    adamw.step()
    with pytest.raises(RuntimeError, match="exp_avg of .*" + FREED):
        adamw.load_state_dict(adamw.state_dict())
    adamw.param_groups[0]["state_dtype"] = torch.bfloat16
    with pytest.raises(RuntimeError, match=FREED):
        adamw.step()
    del adamw.param_groups[0]["state_dtype"]
    for x, old in zip((matrix, *flat), kept, strict=True):
        x.untyped_storage().resize_(old.nbytes)
        x.copy_(old)
    moment.untyped_storage().resize_(moment.nbytes)
    moment.zero_()
    step_all(adamw)
    assert [float(adamw.state[p]["step"]) for p in params] == [2, 2, 2, 2, 4]


def test_masters_are_not_synced_with_freed_params(device: torch.device) -> None:
    p = Parameter(torch.ones(64, device=device).bfloat16())
    adamw = FusedAdamW([p], master_weights=True)
    step_all(adamw)
    p.data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory of .*" + FREED):
        adamw.resync_master_weights()


@each("bad", [0.0, {"x": 1}, [1.0, 2.0]], ids=lambda x: type(x).__name__)
@each("key", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_no_tensor(
    device: torch.device, backend: Any, key: str, bad: object
) -> None:
    p = Parameter(torch.ones(3, device=device))
    optimizer = FusedAdamW([p], backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    right, before = optimizer.state[p][key], p.detach().clone()
    optimizer.state[p][key] = bad
    wanted = rf"^{key} of param_groups\[0\].* is a {type(bad).__name__}; it has to be a tensor"
    saved = optimizer.state_dict()
    other = FusedAdamW([p])
    for act in (optimizer.step, lambda: other.load_state_dict(saved)):
        with pytest.raises(TypeError, match=wanted):
            act()
    assert not other.state
    assert torch.equal(p, before)
    optimizer.state[p][key] = right
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 2


@each(
    ("bad", "error", "words"),
    [
        (torch.ones(()).numpy(), TypeError, r"Invalid lr: array\(1\., dtype=float32\)"),
        (10**400, ValueError, "Invalid learning rate: 1000"),
    ],
    ids=["array", "large int"],
)
def test_numbers_that_are_none(
    device: torch.device, bad: Any, error: type[Exception], words: str
) -> None:
    p = Parameter(torch.ones(3, device=device))
    with pytest.raises(error, match=words):
        FusedAdamW([p], lr=bad)
    optimizer = FusedAdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = bad
    with pytest.raises(error, match=words):
        optimizer.step()
    assert torch.equal(p, before)
