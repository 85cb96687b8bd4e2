"""Copies and checkpoints of the optimizer, to and from torch.optim.AdamW."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from truth import same_bits
from twins import (
    F64,
    OPTIONS,
    TORCH_VERSION,
    assert_same,
    assert_unchanged,
    beside_torch,
    clones,
    go_on_alike,
    make_params,
    params_of,
    snapshot,
    step_all,
)

from fused_adamw import FusedAdamW

each = pytest.mark.parametrize
TORCH = {  # torch's implementations; capturable steps on accelerators only
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def test_deepcopy(device: torch.device, backend: str) -> None:
    optimizer, _ = beside_torch(device, backend, amsgrad=True)
    step_all(optimizer)
    twin = copy.deepcopy(optimizer)
    assert type(twin) is FusedAdamW
    assert twin.backend == backend
    assert {p.data_ptr() for p in params_of(twin)}.isdisjoint(
        p.data_ptr() for p in params_of(optimizer)
    )
    go_on_alike(optimizer, twin, tolerance=0)


def test_pickle(device: torch.device, backend: str) -> None:
    optimizer, _ = beside_torch(device, backend, amsgrad=True)
    step_all(optimizer)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.backend == backend
    assert twin._step_supports_amp_scaling
    go_on_alike(optimizer, twin, tolerance=0)


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
    newer = {"decoupled_weight_decay"} if TORCH_VERSION < (2, 7) else set()
    assert mine["param_groups"][0].keys() - newer == its["param_groups"][0].keys()
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
    go_on_alike(ours, theirs)
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
