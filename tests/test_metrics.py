"""group_metrics: what metrics() says by group, against float64 arithmetic on the same values."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from captures import Recording, refused_until_a_step
from torch import Tensor
from torch.nn import Parameter
from truth import TrueAdamW, real64

from fused_adamw import FusedAdamW, formats, launch, reference, storage
from fused_adamw import plan as planning
from fused_adamw.kernels import table as t
from fused_adamw.kernels.launch_parameters import LaunchParameters

each = pytest.mark.parametrize
NAMES = ("update_rms", "param_rms", "lost_updates")
# around a block of 1,024 and a vector of 8; make_params lets every other start off its alignment
SIZES = (1, 7, 8, 9, 1023, 1025, 3000, 0)
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def make_params(device: torch.device, dtypes: Sequence[torch.dtype]) -> list[Parameter]:
    return [
        Parameter(torch.randn(n + 1, dtype=dtype, device=device)[n % 2 :][:n].detach())
        for dtype in dtypes
        for n in SIZES
    ]


def set_grads(step: int, params: Sequence[Parameter], scale: float = 1.0) -> None:
    """Gradients, in step 0 for all params and then for four out of five."""
    torch.manual_seed(step)
    for i, p in enumerate(params):
        absent = step > 0 and (i + step) % 5 == 0
        p.grad = None if absent else scale * torch.randn_like(p)


def kept_of(adamw: FusedAdamW, p: Parameter) -> Tensor:
    """What the optimizer keeps of a param: its master if it has one. Float64, on the CPU."""
    state = adamw.state.get(p, {})
    if "master_remainder" in state:
        bits = state["master_remainder"].view(torch.int16)
        return real64(formats.decode_remainder(p.detach(), bits))
    return real64(state.get("master_param", p))


class Expected:
    """Metrics of one step, from values before and after it, in float64."""

    def __init__(self, adamw: FusedAdamW, unscale: float = 1.0) -> None:
        self.adamw = adamw
        self.groups: list[list[tuple[Parameter, Tensor, Tensor]]] = []
        for group in adamw.param_groups:
            own = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                names = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
                options = {k: group[k] for k in (*names, "decoupled_weight_decay")}
                true = TrueAdamW(p, **options)
                true.p = before = kept_of(adamw, p)
                state = adamw.state.get(p, {})
                if state:  # moments as they are stored, so that their rounding does not count
                    true.t = int(state["step"])
                    for key, name in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                        setattr(true, key, self.moment(state, name))
                    true.v_max = true.v
                    if group["amsgrad"]:
                        true.v_max = self.moment(state, "max_exp_avg_sq")
                true.step(p.grad * unscale)
                own.append((p, before, true.p - before))
            self.groups.append(own)

    @staticmethod
    def moment(state: dict[str, Tensor], name: str) -> Tensor:
        stored = storage.decoded(name, state)
        assert stored is not None
        return real64(stored)

    def check(self, metrics: dict[str, Tensor]) -> None:
        assert all(metrics[name].shape == (len(self.groups),) for name in NAMES)
        assert all(metrics[name].dtype == F64 for name in NAMES)
        for number, own in enumerate(self.groups):
            added = torch.cat([x.reshape(-1) for *_, x in own] or [torch.zeros(0)])
            kept = [kept_of(self.adamw, p).reshape(-1) for p, *_ in own]
            after = torch.cat(kept or [torch.zeros(0)])
            before = torch.cat([x.reshape(-1) for _, x, _ in own] or [torch.zeros(0)])
            lost = ((after == before) & (added != 0)).sum() / max(1, int((added != 0).sum()))
            values = (
                added.square().sum().div(max(1, len(added))).sqrt(),
                after.square().sum().div(max(1, len(added))).sqrt(),
                lost,
            )
            for name, value in zip(NAMES, values, strict=True):
                # the kernel's squares and their sums over a block are float32
                near = pytest.approx(value.item(), rel=2e-6, abs=0)
                assert metrics[name][number].item() == near, (name, number)


@each("amsgrad", [False, True])
@each("dtypes", [[F32], [F64], [torch.complex64], [BF16, F32, F16, F64]], ids=str)
def test_as_float64_tells(
    device: torch.device, backend: Any, dtypes: list[torch.dtype], amsgrad: bool
) -> None:
    """Several groups and dtypes, among them a group of empty tensors and one without gradients."""
    params = make_params(device, dtypes)
    idle = [Parameter(torch.randn(9, device=device))]
    groups: list[dict[str, Any]] = [
        {"params": params[::2], "weight_decay": 0.0},
        {"params": [Parameter(torch.zeros(0, 3, device=device)) for _ in range(2)]},
        {"params": params[1::2], "maximize": True, "lr": 0.1, "decoupled_weight_decay": False},
        {"params": idle},
        {"params": [Parameter(torch.randn(5, 4, 3, device=device))], "amsgrad": True, "eps": 1e-3},
    ]
    adamw = FusedAdamW(groups, backend=backend, amsgrad=amsgrad, group_metrics=True)
    for p in groups[1]["params"]:
        p.grad = torch.zeros_like(p)
    last = groups[4]["params"]
    for step in range(1, 5):
        set_grads(step, params + last)
        expected = Expected(adamw)
        adamw.step()
        metrics = adamw.metrics()
        expected.check(metrics)
        measured = [True, False, True, False, last[0].grad is not None]
        assert (metrics["update_rms"] > 0).tolist() == measured
        assert metrics["grad_norm"] == 0, "nothing asked for the norm"


@each("amsgrad", [False, True])
def test_storage_formats(
    device: torch.device, backend: Any, amsgrad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is kept: masters, rounded weights, decoded moments; a group for each format."""
    monkeypatch.setattr(reference, "PIECE_PER_THREAD", t.QUANT_BLOCK)
    kinds: list[tuple[torch.dtype, dict[str, Any]]] = [
        (BF16, {"master_weights": True, "state_dtype": F32}),
        (BF16, {"master_weights": True, "state_dtype": "int8"}),
        (F16, {"master_weights": True, "state_dtype": F32}),
        (BF16, {"stochastic_rounding": True}),
        (BF16, {"stochastic_rounding": True, "state_dtype": (F32, "int8")}),
        (F32, {"state_dtype": "int8"}),
    ]
    groups = [{"params": make_params(device, [dtype]), **options} for dtype, options in kinds]
    params = [p for group in groups for p in group["params"]]
    adamw = FusedAdamW(groups, amsgrad=amsgrad, backend=backend, group_metrics=True)
    for step in range(3):
        set_grads(step, params)
        expected = Expected(adamw)
        adamw.step()
        expected.check(adamw.metrics())


def test_layouts(device: torch.device, backend: Any) -> None:
    """Params and gradients that are copied in each step; views are measured, not their gaps."""
    params = [
        Parameter(torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)),
        Parameter(torch.randn(6, 8, device=device)[:, ::2]),
        Parameter(torch.randn(6, 4, device=device)),
    ]
    adamw = FusedAdamW(params, backend=backend, group_metrics=True)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, device=device)
        params[2].grad = torch.randn(4, 6, device=device).t()
        expected = Expected(adamw)
        adamw.step()
        expected.check(adamw.metrics())


@each(
    ("dtype", "lr", "lost"),
    [(F32, 1e-4, 0), (BF16, 1e-5, 1), (F16, 1e-5, 1), (F32, 1e-9, 1), (F64, 1e-9, 0)],
)
def test_updates_that_rounding_undoes(
    device: torch.device, backend: Any, dtype: torch.dtype, lr: float, lost: float
) -> None:
    """Below half a step of the param's dtype nothing moves, in float32 neither; zeros lose nothing.

    update_rms is that of the updates that should have been.
    """
    p = Parameter(torch.ones(3000, dtype=dtype, device=device))
    p.grad = torch.ones_like(p)
    p.grad[:1000] = 0
    p.grad[-1] = -1000
    adamw = FusedAdamW([p], lr=lr, weight_decay=0.0, group_metrics=True, backend=backend)
    adamw.step()
    metrics = adamw.metrics()
    assert metrics["lost_updates"].item() == lost
    assert metrics["update_rms"].item() == pytest.approx(lr * math.sqrt(2 / 3), rel=1e-3)
    assert torch.equal(p[1000:], torch.ones_like(p[1000:])) == bool(lost)


@each(("dtype", "lr", "lost"), [(BF16, 1e-5, 0), (F16, 1e-5, 0), (BF16, 1e-9, 1), (F16, 1e-9, 1)])
def test_masters_lose_what_float32_does(
    device: torch.device, backend: Any, dtype: torch.dtype, lr: float, lost: float
) -> None:
    """The master has moved where the param shows nothing of it yet."""
    p = Parameter(torch.ones(3000, dtype=dtype, device=device))
    p.grad = torch.ones_like(p)
    adamw = FusedAdamW(
        [p], lr=lr, weight_decay=0.0, master_weights=True, group_metrics=True, backend=backend
    )
    adamw.step()
    assert torch.equal(p, torch.ones_like(p))
    metrics = adamw.metrics()
    assert metrics["lost_updates"].item() == lost
    assert metrics["update_rms"].item() == pytest.approx(lr, rel=1e-4)
    assert metrics["param_rms"].item() == pytest.approx(1 - lr * (1 - lost), rel=1e-6)


def test_stochastic_rounding_undoes_the_rest(device: torch.device, backend: Any) -> None:
    """An eighth of the distance to the next number: one update in eight is made, as a whole one."""
    p = Parameter(torch.ones(3000, dtype=BF16, device=device))
    p.grad = torch.ones_like(p)
    adamw = FusedAdamW(
        [p],
        lr=2.0**-11,
        weight_decay=0.0,
        stochastic_rounding=True,
        group_metrics=True,
        backend=backend,
    )
    adamw.step()
    metrics = adamw.metrics()
    assert metrics["lost_updates"].item() == (p == 1).double().mean().item()
    assert abs(metrics["lost_updates"].item() - 7 / 8) < 5 * math.sqrt(7 / 64 / 3000)
    assert metrics["update_rms"].item() == pytest.approx(2.0**-11, rel=1e-4)


def test_half_of_the_updates_lost(device: torch.device, backend: Any) -> None:
    p = Parameter(torch.tensor([1.0, 1.0, 1e-3, 1e-3], dtype=BF16, device=device))
    p.grad = torch.ones_like(p)
    adamw = FusedAdamW([p], lr=1e-4, weight_decay=0.0, group_metrics=True, backend=backend)
    adamw.step()
    assert adamw.metrics()["lost_updates"].item() == 0.5


def test_lost_nan_and_infinity_are_not_hidden(device: torch.device, backend: Any) -> None:
    params = [Parameter(torch.ones(9, device=device)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    assert params[1].grad is not None
    params[1].grad[3] = math.nan
    adamw = FusedAdamW([{"params": [p]} for p in params], group_metrics=True, backend=backend)
    adamw.step()
    for name in ("update_rms", "param_rms"):
        assert adamw.metrics()[name].isnan().tolist() == [False, True, False]
    assert adamw.metrics()["lost_updates"].tolist() == [0, 0, 0]


@each("how", ["found_inf", "skip_nonfinite"])
def test_a_skipped_step_leaves_the_metrics(device: torch.device, backend: Any, how: str) -> None:
    """Also those of params that have a gradient in one of the two steps only."""
    params = make_params(device, [F32, BF16])
    adamw: Any = FusedAdamW(
        [{"params": params[:5]}, {"params": params[5:]}],
        group_metrics=True,
        skip_nonfinite=how == "skip_nonfinite",
        backend=backend,
    )
    for step in range(2):
        set_grads(step, params)
        adamw.step()
    before = adamw.metrics()
    set_grads(2, params)
    if how == "found_inf":
        adamw.found_inf = torch.tensor(2.0, device=device)
    else:
        grad = params[6].grad
        assert grad is not None
        grad[-1] = math.inf
    adamw.step()
    after = adamw.metrics()
    assert after["skipped_steps"].item() == (how == "skip_nonfinite")
    for name in NAMES:
        assert torch.equal(before[name], after[name])
    if how == "found_inf":
        adamw.found_inf = None
    set_grads(4, params)
    expected = Expected(adamw)
    adamw.step()
    expected.check(adamw.metrics())


def test_a_param_in_anothers_place_has_no_metrics_before_its_step(
    device: torch.device, backend: Any
) -> None:
    p, q = (torch.nn.Parameter(torch.full((4,), x, device=device)) for x in (1.0, 5.0))
    adamw = FusedAdamW([p], group_metrics=True, skip_nonfinite=True, backend=backend)
    p.grad = torch.ones_like(p)
    adamw.step()
    adamw.param_groups[0]["params"][0] = q
    q.grad = torch.full_like(q, math.nan)
    adamw.step()  # skipped
    assert [adamw.metrics()[name].tolist() for name in NAMES] == [[0.0]] * 3


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's, of those lanes
def test_lanes_past_the_end_do_not_count(device: torch.device, backend: Any) -> None:
    """Without eps they are 0 / 0 in the interpreter; on GPUs what they load is anything."""
    params = make_params(device, [F32, BF16])
    adamw = FusedAdamW(params, eps=0.0, group_metrics=True, backend=backend)
    set_grads(1, params)
    for p in params:
        if p.grad is not None:
            p.grad.masked_fill_(p.grad == 0, 1.0)  # torch 2.11's randn gives zeros in bfloat16
    expected = Expected(adamw)
    adamw.step()
    expected.check(adamw.metrics())


def test_under_grad_scaler(device: torch.device, backend: Any) -> None:
    params = make_params(device, [F32, BF16])
    adamw: Any = FusedAdamW(params, group_metrics=True, backend=backend)
    set_grads(1, params, scale=1024.0)
    adamw.grad_scale = torch.tensor(1024.0, device=device)
    adamw.found_inf = torch.tensor(0.0, device=device)
    expected = Expected(adamw, unscale=1 / 1024)
    adamw.step()
    expected.check(adamw.metrics())


def test_with_clipping(device: torch.device, backend: Any) -> None:
    """The update measured is the clipped one."""
    params = make_params(device, [F32])
    adamw = FusedAdamW(params, eps=0.1, max_grad_norm=0.5, group_metrics=True, backend=backend)
    set_grads(1, params)
    norm = math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None)
    )
    expected = Expected(adamw, unscale=0.5 / (norm + 1e-6))
    adamw.step()
    expected.check(adamw.metrics())


def test_the_same_bits_again(device: torch.device, backend: Any) -> None:
    seen = []
    for _ in range(2):
        torch.manual_seed(3)
        params = make_params(device, [F32, BF16])
        set_grads(1, params)
        adamw = FusedAdamW(params, group_metrics=True, backend=backend)
        adamw.step()
        seen += [adamw.metrics(), adamw.metrics()]
    for one, name in itertools.product(seen[1:], NAMES):
        assert torch.equal(one[name], seen[0][name])


@each(
    "parameters",
    [{"blocks_per_program": 2}, {"block": 2048, "num_warps": 8}, {"exact": True}],
    ids=str,
)
def test_whatever_a_program_takes(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any]
) -> None:
    own = LaunchParameters(**parameters)
    monkeypatch.setattr(planning, "launch_parameters", lambda _: own)
    params = make_params(device, [F32, BF16])
    adamw = FusedAdamW(params, group_metrics=True, backend="triton")
    set_grads(1, params)
    expected = Expected(adamw)
    adamw.step()
    expected.check(adamw.metrics())


def test_memory_of_a_larger_tensor_is_not_read(
    device: torch.device, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A param that shrinks within its chunk leaves rows behind that no program writes again."""
    plan_chunks = t.plan_chunks
    monkeypatch.setattr(t, "CHUNKS_PER_TENSOR", 1)
    monkeypatch.setattr(t, "plan_chunks", lambda numels, block: plan_chunks(numels, block, 0))
    params = [Parameter(torch.randn(n, device=device)) for n in (3000, 5, 2049)]
    adamw = FusedAdamW([{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    adamw.group_metrics = True
    for size in (3000, 1500, 3000):
        params[0].grad = None
        params[0].data = torch.randn(size, device=device)
        adamw.state.pop(params[0], None)
        for p in params:
            p.grad = torch.randn_like(p)
        expected = Expected(adamw)
        adamw.step()
        expected.check(adamw.metrics())
    if backend == "triton":
        assert adamw._plan is not None
        assert adamw._plan.tables[device].blocks_per_chunk == 4


def test_groups_that_come_later(device: torch.device, backend: Any) -> None:
    """Before their first step they read as zeros, as everything does before the first of all."""
    params = make_params(device, [F32])
    adamw = FusedAdamW(params[:4], group_metrics=True, backend=backend)
    assert [adamw.metrics()[name].tolist() for name in NAMES] == [[0.0]] * 3
    set_grads(1, params)
    adamw.step()
    before = adamw.metrics()
    adamw.add_param_group({"params": params[4:]})
    between = adamw.metrics()
    for name in NAMES:
        assert between[name].tolist() == [before[name].item(), 0]
    set_grads(2, params)
    expected = Expected(adamw)
    adamw.step()
    expected.check(adamw.metrics())


def test_groups_that_go(device: torch.device, backend: Any) -> None:
    """A group has the number that it has in param_groups, also before the next step."""
    params = make_params(device, [F32])
    kept, gone, other = params[:2], params[2:4], params[4:]
    groups = [{"params": x} for x in (kept, gone, other)]
    adamw = FusedAdamW(groups, group_metrics=True, backend=backend)
    set_grads(1, params)
    adamw.step()
    before = adamw.metrics()
    assert len({*before["param_rms"].tolist()}) == 3
    del adamw.param_groups[1]
    for name in NAMES:
        assert torch.equal(adamw.metrics()[name], before[name][[0, 2]])
    adamw.param_groups.reverse()
    for name in NAMES:
        assert torch.equal(adamw.metrics()[name], before[name][[2, 0]])
    set_grads(2, params)
    expected = Expected(adamw)
    adamw.step()
    expected.check(adamw.metrics())


def test_copies_keep_the_option_and_checkpoints_leave_it_out(
    device: torch.device, backend: Any
) -> None:
    params = make_params(device, [F32])
    adamw = FusedAdamW(params, group_metrics=True, backend=backend)
    set_grads(1, params)
    adamw.step()
    for other in (copy.deepcopy(adamw), pickle.loads(pickle.dumps(adamw))):
        own = other.param_groups[0]["params"]
        assert other.metrics()["param_rms"].tolist() == [0], "nothing is measured yet"
        set_grads(2, own)
        expected = Expected(other)
        other.step()
        expected.check(other.metrics())
    saved = adamw.state_dict()
    assert "group_metrics" not in saved["param_groups"][0]
    torch.optim.AdamW(params).load_state_dict(saved)
    adamw.load_state_dict(saved)
    assert adamw.metrics()["param_rms"].tolist() == [0]
    set_grads(2, params)
    expected = Expected(adamw)
    adamw.step()
    expected.check(adamw.metrics())


def test_on_in_some_steps_only(device: torch.device, backend: Any) -> None:
    """Off it measures nothing and says nothing; weights have the same bits."""
    params = make_params(device, [F32, BF16])
    twin = copy.deepcopy(params)
    adamw, other = (FusedAdamW(x, backend=backend) for x in (params, twin))
    for step in range(4):
        adamw.group_metrics = step % 2 == 1
        for own in (params, twin):
            set_grads(step, own)
        expected = Expected(adamw)
        adamw.step()
        other.step()
        if adamw.group_metrics:
            expected.check(adamw.metrics())
        else:
            assert not set(NAMES) & set(adamw.metrics())
    assert other._telemetry is None
    assert all(map(torch.equal, params, twin))


def test_backends_in_turn(device: torch.device) -> None:
    """The next step follows the attribute; the one has float32 rows, the other float64 ones."""
    params = make_params(device, [F32])
    adamw = FusedAdamW(params, group_metrics=True, backend="reference")
    seen = []
    for step, backend in enumerate(["reference", "triton", "reference"]):
        adamw.backend = backend  # type: ignore[assignment]
        set_grads(step, params)
        expected = Expected(adamw)
        adamw.step()
        expected.check(adamw.metrics())
        assert adamw._plan is not None
        seen.append(list(adamw._plan.tables))
    assert seen == [[], [device], []]
    before = copy.deepcopy(params)
    adamw.backend = "cuda"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Invalid backend: 'cuda'"):
        adamw.step()
    assert all(map(torch.equal, params, before))


def test_no_launch_more_and_no_memory_after_the_first_step(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params(device, [F32, BF16])
    adamw = FusedAdamW(params, group_metrics=True, backend="triton")
    set_grads(0, params)
    adamw.step()
    kernels, launched = launch.load_kernels(device), []

    def count(module: Any, name: str) -> None:
        real = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> None:
            launched.append(name)
            real(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(kernels.schedule, "schedule")
    count(kernels.adamw, "adamw")
    assert adamw._telemetry is not None
    first = adamw._telemetry.measures[device]
    for step in range(3):
        set_grads(step, params)
        adamw.step()
    assert launched == ["schedule", "adamw"] * 3
    assert adamw._telemetry.measures[device] is first


def test_replays_are_seen(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step writes to the memory that metrics() reads, also when the plan is another."""
    params = make_params(device, [F32, BF16])
    adamw = FusedAdamW(params, group_metrics=True, backend="triton")
    set_grads(0, params)
    adamw.step()
    with Recording(monkeypatch):
        set_grads(2, params)
        expected = Expected(adamw)
        adamw.step()
    expected.check(adamw.metrics())
    captured = adamw._launchers[device].captured[-1]
    assert isinstance(captured, tuple)
    adamw.state[params[1]]["exp_avg"] = torch.zeros_like(params[1])  # a new plan of the same layout
    plan = adamw._plan
    adamw.step()
    assert adamw._plan is not None
    assert adamw._plan.params is not plan.params  # type: ignore[union-attr]
    assert adamw._telemetry is not None
    assert captured[-1] is adamw._telemetry.measures[device]


def test_capture_wants_memory_before_it(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params(device, [F32])
    adamw = FusedAdamW(params, backend="triton")
    set_grads(1, params)
    adamw.step()
    adamw.group_metrics = True
    refused_until_a_step(adamw, params, monkeypatch, "measures have no memory")


def test_differentiable_groups_are_not_measured(device: torch.device) -> None:
    p = Parameter(torch.ones(3, device=device))
    p.grad = torch.ones_like(p)
    adamw = FusedAdamW([p], differentiable=True, group_metrics=True)
    with pytest.raises(RuntimeError, match="set group_metrics=False"):
        adamw.step()
    assert not adamw.state
