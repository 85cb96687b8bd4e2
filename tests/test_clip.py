"""max_grad_norm, skip_nonfinite and metrics(): against clip_grad_norm_ and torch.optim.AdamW."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from fused_adamw import FusedAdamW, norm, reference
from fused_adamw.kernels import table as t
from fused_adamw.launch import Launcher

each = pytest.mark.parametrize
SIZES = (1, 7, 8, 9, 1023, 1025, 3000, 0)
EPS = {"eps": 0.1}  # float16 holds no second moments of clipped gradients: keep quotients sane


def make_params(device: torch.device, dtypes: list[torch.dtype]) -> list[Parameter]:
    return [
        Parameter(torch.randn(n + 1, dtype=dtype, device=device)[n % 2 :][:n].detach())
        for dtype in dtypes
        for n in SIZES
    ]


def twin(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params]


def set_grads(step: int, *lists: list[Parameter], scale: float = 1.0) -> None:
    for params in lists:
        torch.manual_seed(step)
        for i, p in enumerate(params):
            absent = (i + step) % 5 == 0
            p.grad = None if absent else scale * torch.randn_like(p)


def assert_close(ours: list[Parameter], theirs: list[Parameter]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        loose = 2e-2 if p.dtype in (torch.bfloat16, torch.float16) else 2e-6
        torch.testing.assert_close(p, q, rtol=loose, atol=loose)


@each("max_norm", [0.5, 1e6])
@each(
    "dtypes",
    [
        [torch.float32],
        [torch.float64],
        [torch.complex64],
        [torch.bfloat16, torch.float32, torch.float16],
    ],
    ids=str,
)
def test_as_torch_clips(
    device: torch.device, backend: Any, dtypes: list[torch.dtype], max_norm: float
) -> None:
    params = make_params(device, dtypes)
    others = twin(params)
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.1, "maximize": True}]
    their_groups = [{"params": others[::2]}, {**groups[1], "params": others[1::2]}]
    ours = FusedAdamW(groups, backend=backend, max_grad_norm=max_norm, **EPS)
    theirs = torch.optim.AdamW(their_groups, **EPS)
    for step in range(3):
        set_grads(step, params, others)
        kept = [None if p.grad is None else p.grad.clone() for p in params]
        reals = [torch.view_as_real(g) if g.is_complex() else g for g in kept if g is not None]
        exact = math.sqrt(sum(g.double().square().sum().item() for g in reals))
        factor = min(1.0, max_norm / (exact + 1e-6))
        if len(dtypes) == 1:
            norm = clip_grad_norm_([q for q in others if q.grad is not None], max_norm).item()
            assert norm == pytest.approx(exact, rel=1e-6)
        else:  # it adds bfloat16 norms, to three digits
            for q in others:
                if q.grad is not None:
                    q.grad.mul_(factor)
        ours.step()
        theirs.step()
        assert_close(params, others)
        metrics = ours.metrics()
        assert metrics["grad_norm"].item() == pytest.approx(exact, rel=1e-14)
        assert metrics["clip_factor"].item() == pytest.approx(factor, rel=1e-14)
        assert metrics["skipped_steps"].item() == 0
        for p, grad in zip(params, kept, strict=True):
            assert (p.grad is None) == (grad is None)
            if grad is not None:
                assert torch.equal(p.grad, grad), "gradients stay as they are"  # type: ignore[arg-type]


def test_layouts(device: torch.device, backend: Any) -> None:
    """Gradients in another layout than the param, expanded ones, params with gaps."""
    params = [
        Parameter(torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)),
        Parameter(torch.randn(6, 4, device=device)),
        Parameter(torch.randn(6, 8, device=device)[:, ::2]),
        Parameter(torch.randn(3, 3, device=device)),
    ]
    others = twin(params)
    grads = [
        torch.randn(2, 3, 4, 5, device=device),
        torch.randn(4, 6, device=device).t(),
        torch.randn(6, 4, device=device),
        torch.randn(3, 1, device=device).expand(3, 3),
    ]
    ours = FusedAdamW(params, backend=backend, max_grad_norm=1.0)
    theirs = torch.optim.AdamW(others)
    for _ in range(2):
        for p, q, grad in zip(params, others, grads, strict=True):
            p.grad, q.grad = grad, grad.clone(memory_format=torch.contiguous_format)
        clip_grad_norm_(others, 1.0)
        ours.step()
        theirs.step()
        assert_close(params, others)


@each("size", [1e30, 1e-30, 1e-42])
def test_norm_neither_overflows_nor_vanishes(
    device: torch.device, backend: Any, size: float
) -> None:
    p = Parameter(torch.zeros(3000, device=device))
    p.grad = torch.full_like(p, size)
    optimizer = FusedAdamW([p], backend=backend, max_grad_norm=1.0)
    optimizer.step()
    exact = math.sqrt(3000) * float(p.grad[0].double())
    assert optimizer.metrics()["grad_norm"].item() == pytest.approx(exact, rel=1e-12)


def test_norm_over_a_large_range_is_truer_than_torchs() -> None:
    torch.manual_seed(0)
    grad = torch.randn(10**8).mul_(torch.randn(10**8).mul_(3).exp_())
    exact = math.sqrt(math.fsum(x.double().square().sum().item() for x in grad.split(10**6)))
    ours = reference.sum_squares([grad]).sqrt().item()
    assert abs(ours / exact - 1) <= max(abs(grad.norm().item() / exact - 1), 1e-14)


def test_norm_has_the_same_bits_again(device: torch.device, backend: Any) -> None:
    norms = set()
    for _ in range(2):
        torch.manual_seed(3)
        params = make_params(device, [torch.float32, torch.bfloat16])
        set_grads(1, params)
        optimizer = FusedAdamW(params, backend=backend, max_grad_norm=1.0)
        optimizer.step()
        norms.add(optimizer.metrics()["grad_norm"].item())
    assert len(norms) == 1


def test_sums_of_more_chunks_than_programs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(t, "SUMS", 4)
    params = [Parameter(torch.ones(n, device=device)) for n in (5000, 3, 2048, 1025)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = FusedAdamW(params, backend="triton", max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"].item() == pytest.approx(math.sqrt(8076), rel=1e-14)


@each("bad", [math.nan, math.inf, -math.inf])
@each("place", [0, 5])
def test_skip_leaves_everything_as_it_is(
    device: torch.device, backend: Any, bad: float, place: int
) -> None:
    params = make_params(device, [torch.float32, torch.bfloat16])
    optimizer = FusedAdamW(params, backend=backend, skip_nonfinite=True)
    set_grads(1, params)
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    set_grads(2, params)
    victim = [p for p in params if p.grad is not None and p.numel()][place]
    assert victim.grad is not None
    victim.grad[-1] = bad
    optimizer.step()
    for p, old in zip(params, before[0], strict=True):
        assert torch.equal(p, old)
    state = optimizer.state_dict()["state"]
    for i, old_state in before[1].items():
        assert all(torch.equal(state[i][key], x) for key, x in old_state.items())
    assert optimizer.metrics()["skipped_steps"].item() == 1
    set_grads(3, params)
    optimizer.step()
    assert optimizer.metrics()["skipped_steps"].item() == 1
    assert not torch.equal(params[4], before[0][4])


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's, of infinity * 0
@each("bad", [math.nan, math.inf])
def test_without_skip_clipping_goes_on_as_torch(
    device: torch.device, backend: Any, bad: float
) -> None:
    params = [Parameter(torch.ones(9, device=device)), Parameter(torch.ones(3, device=device))]
    others = twin(params)
    for own in (params, others):
        for p in own:
            p.grad = torch.ones_like(p)
        own[0].grad[4] = bad  # type: ignore[index]
    FusedAdamW(params, backend=backend, max_grad_norm=1.0).step()
    clip_grad_norm_(others, 1.0)
    torch.optim.AdamW(others).step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)


@each("found", [0.0, 2.0])
@each("scale", [1024.0, -1024.0])
def test_under_grad_scaler(device: torch.device, backend: Any, found: float, scale: float) -> None:
    """The norm is that of the unscaled gradients, which are left behind, unclipped."""
    params = make_params(device, [torch.float32])
    others = twin(params)
    optimizer: Any = FusedAdamW(params, backend=backend, max_grad_norm=0.5)
    theirs = torch.optim.AdamW(others)
    set_grads(1, params, scale=scale)
    set_grads(1, others)
    before = twin(params)
    optimizer.grad_scale = torch.tensor(scale, device=device)
    optimizer.found_inf = torch.tensor(found, device=device)
    optimizer.step()
    norm = clip_grad_norm_([q for q in others if q.grad is not None], 0.5)
    assert optimizer.metrics()["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-6)
    assert optimizer.metrics()["skipped_steps"].item() == (found != 0)
    if found:
        assert_close(params, before)
        return
    theirs.step()
    assert_close(params, others)
    set_grads(1, others)
    for p, q in zip(params, others, strict=True):
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


@each("unscale_first", [False, True])
def test_grad_scaler_with_overflows_follows_torchs_fused(
    device: torch.device, backend: Any, unscale_first: bool
) -> None:
    """Clipping, skipping and a tensor lr on: step by step as unscale_, clip_grad_norm_ and step."""
    params = make_params(device, [torch.float32])
    others = twin(params)
    lr = torch.tensor(0.01, device=device)
    ours = FusedAdamW(params, lr, backend=backend, max_grad_norm=0.5, skip_nonfinite=True)
    theirs = torch.optim.AdamW(others, lr, fused=True)
    scalers = [
        torch.amp.GradScaler(device.type, init_scale=4.0, growth_interval=2) for _ in range(2)
    ]
    scales, skipped = [], 0
    for step in range(12):
        lr.mul_(0.9)
        set_grads(step, params, others, scale=scalers[0].get_scale() if step else 4.0)
        if step in (3, 4, 9):
            skipped += 1
            for own in (params, others):
                next(p.grad for p in own[::-1] if p.grad is not None and p.numel())[0] = math.inf
        for scaler, optimizer in zip(scalers, (ours, theirs), strict=True):
            scaler.scale(torch.zeros((), device=device))  # as a loss would initialise it
            if unscale_first or optimizer is theirs:
                scaler.unscale_(optimizer)
            if optimizer is theirs:
                norm = clip_grad_norm_([q for q in others if q.grad is not None], 0.5)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        scales.append(scalers[0].get_scale())
        assert_close(params, others)
        metrics = ours.metrics()
        assert metrics["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-6, nan_ok=True)
        assert metrics["skipped_steps"].item() == skipped
        steps = [[float(s["step"]) for s in o.state.values()] for o in (ours, theirs)]
        assert steps[0] == steps[1]
    assert scales == [4.0, 8.0, 8.0, 4.0, 2.0, 2.0, 4.0, 4.0, 8.0, 4.0, 4.0, 8.0]


def test_changed_between_steps(device: torch.device, backend: Any) -> None:
    params = make_params(device, [torch.float32])
    others = twin(params)
    ours = FusedAdamW(params, backend=backend)
    theirs = torch.optim.AdamW(others)
    for step, max_norm in enumerate((None, 0.1, 2.0, None)):
        ours.max_grad_norm = max_norm
        set_grads(step, params, others)
        if max_norm is not None:
            clip_grad_norm_([q for q in others if q.grad is not None], max_norm)
        ours.step()
        theirs.step()
        assert_close(params, others)


def test_metrics_follow_params_to_another_device(device: torch.device) -> None:
    """What is said is of the last step, and skips are counted on, back and forth."""
    here, there = (device, torch.device("cpu")) if device.type == "cuda" else (device, None)
    p = Parameter(torch.ones(4, device=device))
    optimizer = FusedAdamW([p], skip_nonfinite=True)
    for moves in range(4):
        if there is not None:
            p.data = p.data.to(here if moves % 2 else there)
            for key, x in optimizer.state[p].items():
                optimizer.state[p][key] = x.to(p.device)
        elif moves:  # as if the steps before had been on a GPU
            optimizer._metrics[torch.device("cuda", 0)] = optimizer._metrics.pop(device)
        p.grad = torch.full_like(p, math.nan)
        optimizer.step()
        p.grad = torch.full_like(p, moves + 1.0)
        optimizer.step()
        metrics = optimizer.metrics()
        assert metrics["grad_norm"].device == p.device
        assert metrics["grad_norm"].item() == 2 * (moves + 1)
        assert metrics["skipped_steps"].item() == moves + 1
        assert list(optimizer._metrics) == [p.device]


def test_metrics_of_a_step_without_gradients(device: torch.device, backend: str) -> None:
    """Its norm is 0, as torch's; and GradScaler may skip it all the same."""
    p = Parameter(torch.ones(3, device=device))
    optimizer: Any = FusedAdamW([p], max_grad_norm=0.5, backend=backend)  # type: ignore[arg-type]
    for shape in (), (1,):  # ShardedGradScaler's
        optimizer._metrics.clear()
        for found_inf in (0.0, 1.0):
            optimizer.grad_scale = torch.full(shape, 8.0, device=device)
            optimizer.found_inf = torch.full(shape, found_inf, device=device)
            optimizer.step()
            metrics = {key: x.item() for key, x in optimizer.metrics().items()}
            assert metrics == {"grad_norm": 0, "clip_factor": 1, "skipped_steps": found_inf}
    assert not optimizer.state[p]


def test_metrics_stay_where_they_are_in_a_step_without_gradients(device: torch.device) -> None:
    """Nor do they go to a param that is nowhere."""
    idle, p = Parameter(torch.ones(4, device="meta")), Parameter(torch.ones(4, device=device))
    optimizer = FusedAdamW([idle, p], max_grad_norm=1.0)
    optimizer.step()
    p.grad = torch.ones_like(p)
    optimizer.step()
    kept = optimizer._metrics[device]
    p.grad = None
    optimizer.state.clear()  # p is as if it had never been updated
    optimizer.step()
    assert list(optimizer._metrics) == [device]
    assert optimizer._metrics[device] is kept
    assert optimizer.metrics()["grad_norm"] == 0


def test_off_there_is_nothing_to_launch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    real = Launcher.sum_squares

    def counted(self: Launcher, *arguments: Any) -> Tensor:
        launched.append(arguments[2])
        return real(self, *arguments)

    monkeypatch.setattr(Launcher, "sum_squares", counted)
    params = make_params(device, [torch.float32, torch.bfloat16])
    set_grads(1, params)
    optimizer = FusedAdamW(params, backend="triton")
    optimizer.step()
    assert launched == []
    assert optimizer.metrics()["skipped_steps"].item() == 0
    optimizer.skip_nonfinite = True
    optimizer.step()
    assert launched == [1], "one launch, whatever the number of tensors and dtypes"


def test_copies_keep_the_options_and_checkpoints_leave_them_out(device: torch.device) -> None:
    p = Parameter(torch.ones(3, device=device))
    optimizer = FusedAdamW([p], max_grad_norm=0.25, skip_nonfinite=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (other.max_grad_norm, other.skip_nonfinite) == (0.25, True)
        for q in other.param_groups[0]["params"]:
            q.grad = torch.ones_like(q)
        other.step()
        assert other.metrics()["clip_factor"].item() == pytest.approx(0.25 / math.sqrt(3), rel=1e-4)
    saved = optimizer.state_dict()
    assert "max_grad_norm" not in saved["param_groups"][0]
    torch.optim.AdamW([p]).load_state_dict(saved)
    optimizer.load_state_dict(saved)
    assert optimizer.max_grad_norm == 0.25


@each(
    "bad",
    [0, -1.0, math.nan, "one", "1.0", b"1", 10**400, torch.ones(()).numpy(), torch.ones(2)],
    ids=str,
)
def test_bad_norms_are_refused(device: torch.device, bad: Any) -> None:
    p = Parameter(torch.ones(3, device=device))
    with pytest.raises(ValueError, match="Invalid max_grad_norm"):
        FusedAdamW([p], max_grad_norm=bad)
    optimizer = FusedAdamW([p], max_grad_norm=1.0)
    p.grad = torch.ones_like(p)
    optimizer.max_grad_norm = bad
    with pytest.raises(ValueError, match="Invalid max_grad_norm"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(p, torch.ones_like(p))


def test_differentiable_groups_cannot_be_clipped(device: torch.device) -> None:
    p = Parameter(torch.ones(3, device=device))
    p.grad = torch.ones_like(p)
    optimizer = FusedAdamW([p], differentiable=True, skip_nonfinite=True)
    with pytest.raises(RuntimeError, match="cannot be clipped or skipped"):
        optimizer.step()
    assert not optimizer.state


@each(
    ("there", "served", "home"),
    [
        (True, "cpu:gloo,cuda:nccl", "cuda"),
        (True, "cpu:gloo", "cpu"),
        (False, "cpu:gloo,cuda:gloo", "cpu"),
    ],
)
def test_where_a_rank_without_params_takes_part(
    monkeypatch: pytest.MonkeyPatch, there: bool, served: str, home: str
) -> None:
    """torch's CUDA build names its accelerator on a machine that has none as well."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: served)
    assert norm.device_of(object()) == torch.device(home)


def test_a_rank_without_params_measures_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = torch.device("meta")
    monkeypatch.setattr(norm, "device_of", lambda given: elsewhere)
    optimizer = FusedAdamW([{"params": []}], max_grad_norm=1.0, group_metrics=True)
    assert optimizer.metrics()["update_rms"].device == elsewhere


def test_without_any_param(device: torch.device, backend: Any) -> None:
    optimizer = FusedAdamW([{"params": []}], max_grad_norm=1.0, backend=backend)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == 0
