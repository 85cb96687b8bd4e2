"""Masters, stochastic rounding, 8-bit moments: through the optimizer, on both backends."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from truth import same_bits

from fused_adamw import FusedAdamW, convert_to_bf16_, convert_to_fp32_, formats, storage
from fused_adamw import state as stating
from fused_adamw.checks import STORED
from fused_adamw.kernels import table as t
from fused_adamw.launch import Launcher
from fused_adamw.shards import local_of_loaded

each = pytest.mark.parametrize
F32, BF16, F16, F64, I16, U8 = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int16, torch.uint8),
)
# one element, around a vector and a quantisation block, around the kernel's block, a matrix whose
# rows are whole quantisation blocks and one whose rows are not, nothing
SHAPES: tuple[tuple[int, ...], ...] = (
    *((1,), (7,), (63,), (64,), (65,), (1023,), (1024,), (1025,), (3000,)),
    *((5, 64), (9, 128), (6, 70), (0,), (0, 64), ()),
)


@pytest.fixture(autouse=True)
def _short_vectors_are_quantised(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the ragged ends of long ones, and take the interpreter a hundredth of the time."""
    if "which_moments" not in request.node.name:
        monkeypatch.setattr(storage, "FLAT_VECTOR", 0)


def in_8_bits(p: Tensor) -> bool:
    """Of SHAPES."""
    return p.dim() > 0 and p.shape[-1] != 70


def make(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[Any] = SHAPES
) -> list[Parameter]:
    torch.manual_seed(1)
    return [Parameter(torch.randn(s, device=device).to(dtype)) for s in shapes]


def backward(params: Sequence[Tensor], step: int, dtype: torch.dtype = BF16) -> None:
    """Gradients of 6 decades, that every dtype has exactly; some are missing in some steps."""
    torch.manual_seed(100 + step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, device=p.device) * 10.0 ** (
            -6 * torch.rand(p.shape, device=p.device)
        )
        p.grad = None if (i + step) % 6 == 5 else g.to(dtype).to(p.dtype)


def train(optimizer: FusedAdamW, steps: range, dtype: torch.dtype = BF16) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        backward(params, step, dtype)
        optimizer.step()


def master_of(optimizer: FusedAdamW, p: Tensor) -> Tensor:
    state = optimizer.state[p]
    if "master_param" in state:
        return state["master_param"]  # type: ignore[no-any-return]
    if "master_remainder" not in state:
        return p.detach().float()
    return formats.decode_remainder(p.detach(), state["master_remainder"].view(I16))


def moments(optimizer: FusedAdamW, p: Tensor) -> list[Tensor]:
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    found = [storage.decoded(name, optimizer.state[p]) for name in names]
    return [x for x in found if x is not None]


@each(
    "options", [{}, {"amsgrad": True, "maximize": True}, {"decoupled_weight_decay": False}], ids=str
)
@each("dtype", [BF16, F16], ids=str)
def test_masters_follow_float32_to_the_bit(
    device: torch.device, backend: Any, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    low, full = make(device, dtype), make(device, dtype)
    full = [Parameter(p.detach().float()) for p in full]
    options = {"lr": 0.01, "weight_decay": 0.1, "backend": backend, **options}
    ours = FusedAdamW(low, master_weights=True, **options)
    truth = FusedAdamW(full, **options)
    for step in range(6):
        train(ours, range(step, step + 1), dtype)
        train(truth, range(step, step + 1), dtype)
        for p, q in zip(low, full, strict=True):
            if p in ours.state:
                assert torch.equal(master_of(ours, p), q.detach()), tuple(p.shape)
                for a, b in zip(moments(ours, p), moments(truth, q), strict=True):
                    assert torch.equal(a, b)
            seen = formats.encode_remainder(q.detach())[0] if dtype == BF16 else q.detach().half()
            assert torch.equal(p.detach(), seen)


def test_master_is_two_bytes(device: torch.device, backend: Any) -> None:
    params = make(device, BF16, [(64, 64)])
    optimizer = FusedAdamW(params, backend=backend, master_weights=True, state_dtype="int8")
    train(optimizer, range(1))
    memory = optimizer.memory()
    tables = memory.pop("tables")
    assert (tables > 0) == (backend == "triton")
    assert memory == {
        "param bfloat16": 8192,
        "grad bfloat16": 8192,
        "step float32": 4,
        "exp_avg_q uint8": 4096,
        "exp_avg_scale uint8": 64,
        "exp_avg_sq_q uint8": 4096,
        "exp_avg_sq_scale uint8": 64,
        "master_remainder bfloat16": 8192,
    }


@each("dtype", [BF16, F16], ids=str)
@each("how", ["data", "model", "resync"])
def test_weights_changed_from_outside_are_followed(
    device: torch.device, backend: Any, dtype: torch.dtype, how: str
) -> None:
    model = nn.Linear(70, 9, device=device, dtype=dtype)
    optimizer = FusedAdamW(
        model.parameters(),
        lr=1e-3,
        master_weights=True,
        weight_decay=0,
        backend=backend,
    )
    train(optimizer, range(3))
    other = {k: torch.randn_like(x) for k, x in model.state_dict().items()}
    if how == "data":
        for k, p in model.named_parameters():
            p.data.copy_(other[k])
    else:
        model.load_state_dict(other)
    if how == "resync":
        optimizer.resync_master_weights()
        for k, p in model.named_parameters():
            assert torch.equal(master_of(optimizer, p), other[k].float())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), other[k], rtol=0.01, atol=0.02)


def test_convert_keeps_the_float32_weights(device: torch.device, backend: Any) -> None:
    def build() -> tuple[nn.Module, FusedAdamW]:
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(6, 70), nn.BatchNorm1d(70), nn.Linear(70, 3)).to(device)
        groups = [
            {"params": list(net[0].parameters())},
            {"params": list(net[1:].parameters()), "lr": 0.02},
        ]
        options: Any = {"master_weights": True, "backend": backend}
        return net, FusedAdamW(groups, lr=0.01, **options)

    (a, low), (b, full) = build(), build()
    train(low, range(2))
    train(full, range(2))
    params = list(a.parameters())
    for p in params:
        p.grad = torch.zeros_like(p)
    assert convert_to_bf16_(a, low) is a
    assert list(a.parameters()) == params or all(
        map(torch.Tensor.is_set_to, a.parameters(), params)
    )
    assert all(x.dtype in (BF16, torch.int64) for x in a.state_dict().values())
    assert all(p.grad is not None and p.grad.dtype == BF16 for p in params)
    for p, q in zip(params, b.parameters(), strict=True):
        assert torch.equal(master_of(low, p), q.detach())
    for step in range(2, 5):
        train(low, range(step, step + 1))
        train(full, range(step, step + 1))
    for p, q in zip(params, b.parameters(), strict=True):
        assert torch.equal(master_of(low, p), q.detach())
    assert low.state[params[0]]["step"].item() == 5


def test_convert_before_the_first_step(device: torch.device, backend: Any) -> None:
    net = nn.Linear(70, 3, device=device)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = FusedAdamW(net.parameters(), master_weights=True, backend=backend)
    convert_to_bf16_(net, optimizer)
    for p, x in zip(net.parameters(), before, strict=True):
        assert torch.equal(master_of(optimizer, p), x)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    for p, x in zip(net.parameters(), before, strict=True):
        assert torch.equal(master_of(optimizer, p), x)
    train(optimizer, range(1))


def test_convert_resumes(device: torch.device, backend: Any) -> None:
    """From the checkpoint of a converted model, whose moments are still float32."""

    def build() -> tuple[nn.Module, FusedAdamW]:
        net = nn.Linear(70, 3, device=device)
        return net, FusedAdamW(net.parameters(), master_weights=True, backend=backend)

    (a, straight), (b, resumed) = build(), build()
    train(straight, range(2))
    convert_to_bf16_(a, straight)
    train(straight, range(2, 3))
    b.bfloat16().load_state_dict(a.state_dict())
    resumed.load_state_dict(straight.state_dict())
    for optimizer in (straight, resumed):
        train(optimizer, range(3, 5))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        assert straight.state[p]["exp_avg_sq"].dtype == resumed.state[q]["exp_avg"].dtype == F32
        for key, x in straight.state[p].items():
            assert same_bits(x, resumed.state[q][key]), key


def test_convert_gives_frozen_params_no_moments(device: torch.device, backend: Any) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(device)
    frozen = net[0].requires_grad_(False)
    before = [p.detach().clone() for p in frozen.parameters()]
    optimizer = FusedAdamW(net.parameters(), master_weights=True, backend=backend)
    net(torch.ones(2, 64, device=device)).sum().backward()
    optimizer.step()
    convert_to_bf16_(net, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for again in (False, True):
        if again:
            optimizer.load_state_dict(saved)
        net(torch.ones(2, 64, device=device).bfloat16()).sum().backward()
        optimizer.step()
        for p, x in zip(frozen.parameters(), before, strict=True):
            assert optimizer.state[p].keys() == {"master_remainder"}
            assert torch.equal(master_of(optimizer, p), x)
    frozen.requires_grad_(True)
    net(torch.ones(2, 64, device=device).bfloat16()).sum().backward()
    optimizer.step()
    assert {s["step"].item() for s in optimizer.state.values()} == {1, 3}


@each("dtype", [BF16, F16], ids=str)
@each("state_dtype", [None, "int8"], ids=str)
def test_convert_to_float32_and_back(
    device: torch.device, backend: Any, dtype: torch.dtype, state_dtype: Any
) -> None:
    """float32 weights from masters are the float32 course, and train on as if never converted."""
    options: Any = {"lr": 0.01, "backend": backend, "state_dtype": state_dtype}
    nets = [nn.Sequential(nn.Linear(64, 5), nn.Linear(5, 3)).to(device, dtype) for _ in range(2)]
    nets[1].float().load_state_dict(nets[0].state_dict())
    low, full = (FusedAdamW(net.parameters(), master_weights=True, **options) for net in nets)
    params = list(nets[0].parameters())
    for optimizer in (low, full):
        train(optimizer, range(3), dtype)
    assert convert_to_fp32_(nets[0], low) is nets[0]
    assert all(x is y for x, y in zip(params, nets[0].parameters(), strict=True))
    for optimizer in (low, full):
        train(optimizer, range(3, 5), dtype)
    for p, q in zip(params, nets[1].parameters(), strict=True):
        assert torch.equal(p, q)
        assert low.state[p].keys() == full.state[q].keys()
        assert all(same_bits(x, full.state[q][key]) for key, x in low.state[p].items())
    if dtype == BF16:
        convert_to_bf16_(nets[0], low)
        convert_to_fp32_(nets[0], low)
        assert all(torch.equal(p, q) for p, q in zip(params, nets[1].parameters(), strict=True))


def test_convert_to_float32_without_masters(device: torch.device) -> None:
    net = nn.Linear(70, 3, device=device, dtype=BF16)
    optimizer = FusedAdamW(net.parameters(), lr=0.01)
    train(optimizer, range(2))
    before = [p.detach().clone() for p in net.parameters()]
    kept = [moments(optimizer, p) for p in net.parameters()]
    convert_to_fp32_(net, optimizer)
    for p, x, own in zip(net.parameters(), before, kept, strict=True):
        assert torch.equal(p, x.float())
        for a, b in zip(moments(optimizer, p), own, strict=True):
            assert a.dtype == F32
            assert torch.equal(a, b.float())
    with pytest.raises(ValueError, match="found no bfloat16"):
        convert_to_fp32_(net, optimizer)


class _NotConvertible(nn.Linear):
    def _apply(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError("quantised layer")


def test_convert_changes_nothing_if_it_raises() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Linear(4, 4))
    net.append(_NotConvertible(4, 4))
    own = [p for layer in net[1:] for p in layer.parameters()]
    optimizer = FusedAdamW(own, master_weights=True, state_dtype=(F32, "int8"))
    train(optimizer, range(2))
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    for p in net.parameters():
        p.grad = torch.full_like(p, 1 / 3)
    objects = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]
    with pytest.raises(NotImplementedError, match="quantised layer"):
        convert_to_bf16_(net, optimizer)
    again = [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())]
    assert all(x is y for x, y in zip(objects, again, strict=True))
    for (_, x), (_, y) in zip(saved[0].items(), net.state_dict().items(), strict=True):
        assert same_bits(x, y)
    assert all(p.grad is not None and (p.grad == 1 / 3).all() for p in net.parameters())
    half = nn.Sequential(nn.Linear(4, 4).bfloat16(), _NotConvertible(4, 4))
    with pytest.raises(NotImplementedError, match="quantised layer"):
        convert_to_fp32_(half, FusedAdamW(half.parameters()))
    assert half[0].weight.dtype == BF16
    for p, state in saved[1]["state"].items():
        assert optimizer.state[own[p]].keys() == state.keys()
        assert all(same_bits(x, optimizer.state[own[p]][key]) for key, x in state.items())


def test_convert_wants_masters() -> None:
    net = nn.Linear(7, 3)
    with pytest.raises(ValueError, match="master_weights=True"):
        convert_to_bf16_(net, FusedAdamW(net.parameters()))
    assert net.weight.dtype == F32


@each("options", [{"stochastic_rounding": True}, {"state_dtype": "int8"}], ids=str)
def test_random_bits_depend_on_seed_step_and_position_alone(
    device: torch.device, backend: Any, options: dict[str, Any]
) -> None:
    """The same on a replica and in other groups; not with another seed or at another position."""
    runs = []
    for seed, split in ((0, 0), (0, 2), (1, 0)):
        params = make(device, BF16, [(3000,)] * 4)
        groups = [{"params": params[:split]}, {"params": params[split:]}] if split else params
        optimizer = FusedAdamW(groups, lr=1e-4, seed=seed, backend=backend, **options)
        for step in range(2):
            torch.manual_seed(step)
            g = torch.randn(3000, device=device).bfloat16()
            for p in params:
                p.grad = g.clone()
            optimizer.step()
        key = "exp_avg_sq_q" if "state_dtype" in options else "exp_avg_sq"
        runs.append([optimizer.state[p][key] for p in params])
    for a, b, c in zip(*runs, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert not torch.equal(runs[0][0], runs[0][1]), "positions differ"


@each("moments_too", [False, True])
def test_stochastic_rounding_moves_weights_that_nearest_leaves(
    device: torch.device, backend: Any, moments_too: bool
) -> None:
    """Updates of 1/16 of the distance of two bfloat16: the mean follows, the nearest stands."""
    size, steps = 4096, 16
    means = []
    for stochastic in (False, True):
        p = Parameter(torch.full((size,), 1.0, dtype=BF16, device=device))
        optimizer = FusedAdamW(
            [p],
            lr=2.0**-11,  # bfloat16 next to 1.0: 2^-7 above, 2^-8 below
            weight_decay=0,
            stochastic_rounding=stochastic,
            state_dtype=None if moments_too else F32,
            backend=backend,
        )
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        means.append(p.double().mean().item())
        values = set(p.detach().float().unique().tolist())
    assert means[0] == 1.0
    expected = 1 - steps * 2.0**-11
    sigma = 2.0**-8 / 2 / math.sqrt(size)
    assert abs(means[1] - expected) < 5 * sigma
    assert len(values) > 2


def test_second_moments_in_bfloat16_decay_only_with_stochastic_rounding(
    device: torch.device, backend: Any
) -> None:
    kept = []
    for stochastic in (False, True):
        p = Parameter(torch.zeros(4096, dtype=BF16, device=device))
        optimizer = FusedAdamW([p], stochastic_rounding=stochastic, backend=backend)
        p.grad = torch.ones_like(p)
        optimizer.step()
        first = optimizer.state[p]["exp_avg_sq"].double().mean().item()
        for _ in range(20):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        kept.append(optimizer.state[p]["exp_avg_sq"].double().mean().item() / first)
    assert kept[0] == 1.0
    assert kept[1] == pytest.approx(0.999**20, abs=5 * 2.0**-8 * 4 / math.sqrt(4096))


@each("amsgrad", [False, True])
@each("dtype", [F32, BF16], ids=str)
def test_8_bit_moments_are_near_float32(
    device: torch.device, backend: Any, dtype: torch.dtype, amsgrad: bool
) -> None:
    params, others = make(device, dtype), make(device, dtype)
    options: Any = {"amsgrad": amsgrad, "lr": 0.01}
    ours = FusedAdamW(params, state_dtype="int8", backend=backend, **options)
    truth = FusedAdamW(others, state_dtype=F32, backend="reference", **options)
    for step in range(5):
        train(ours, range(step, step + 1))
        train(truth, range(step, step + 1))
    for p, q in zip(params, others, strict=True):
        if q not in truth.state or not p.numel():
            continue
        plain = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"} & ours.state[p].keys()
        assert not plain if in_8_bits(p) else len(plain) == 2 + amsgrad
        for a, b in zip(moments(ours, p), moments(truth, q), strict=True):
            largest = b.abs().max()
            assert ((a - b).abs() <= 0.08 * b.abs() + 0.02 * largest).all()
        assert ours.state[p]["step"] == truth.state[q]["step"]


def test_first_moments_are_rounded_to_nearest(device: torch.device, backend: Any) -> None:
    """Stochastic rounding is for the param and the second moment."""
    states = []
    for stochastic in (False, True):
        params = make(device, BF16)
        optimizer = FusedAdamW(params, stochastic_rounding=stochastic, backend=backend)
        train(optimizer, range(3))
        states.append([optimizer.state[p] for p in params])
    pairs = list(zip(*states, strict=True))
    assert all(same_bits(a["exp_avg"], b["exp_avg"]) for a, b in pairs)
    assert not all(same_bits(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in pairs)


@each("pair", [("int8", F32), (BF16, "int8"), (F32, BF16), (None, "int8")], ids=str)
def test_moments_may_differ(device: torch.device, backend: Any, pair: Any) -> None:
    params = make(device, BF16)
    optimizer = FusedAdamW(params, state_dtype=pair, backend=backend)
    train(optimizer, range(2))
    for p in params:
        for name, wanted in zip(("exp_avg", "exp_avg_sq"), pair, strict=True):
            key = f"{name}_q" if wanted == "int8" and in_8_bits(p) else name
            dtype = (U8 if in_8_bits(p) else F32) if wanted == "int8" else (wanted or BF16)
            assert optimizer.state[p][key].dtype == dtype


@each(
    ("shape", "strides", "quantised"),
    [
        ((4, 64), None, True),
        ((4, 2, 32), None, True),
        ((0, 64), None, True),
        ((8, 64, 3, 3), None, True),
        ((8, 64, 1, 1), (64, 1, 64, 64), True),  # channels_last says nothing here
        ((65536,), None, True),
        ((70001,), None, True),
        ((65535,), None, False),  # norms, biases
        ((4, 70), None, False),
        ((8, 3, 7, 7), None, False),
        ((4, 0), None, False),
        ((), None, False),
        ((8, 64, 3, 3), (576, 1, 192, 64), False),  # channels_last
        ((70, 64), (1, 70), False),
        ((4, 64), (128, 1), False),  # gaps
        ((70001,), (2,), False),
    ],
    ids=str,
)
def test_which_moments_are_in_8_bits(
    shape: tuple[int, ...], strides: tuple[int, ...] | None, quantised: bool
) -> None:
    p = torch.empty(shape) if strides is None else torch.empty_strided(shape, strides)
    with torch.no_grad():
        p = Parameter(p.fill_(1))
    optimizer = FusedAdamW([p], state_dtype="int8")
    p.grad = torch.ones_like(p)
    optimizer.step()
    kept = {"exp_avg_q", "exp_avg_sq_q"} & optimizer.state[p].keys()
    assert len(kept) == (2 if quantised else 0)
    dtype = "uint8" if quantised else "float32"
    assert f"exp_avg{'_q' * quantised} {dtype}" in optimizer.memory()
    assert ("8 bits in blocks" in repr(optimizer)) == quantised


def test_codes_do_not_depend_on_the_layout(device: torch.device) -> None:
    """Checkpoints that keep values alone, DCP's and safetensors', load into every layout."""
    torch.manual_seed(1)
    value = torch.randn(8, 64, 3, 2, device=device)
    layouts = (torch.contiguous_format, torch.channels_last)
    params = [Parameter(value.clone(memory_format=layout)) for layout in layouts]
    saver = FusedAdamW(params, lr=0.01, state_dtype="int8")
    for p in params:
        p.grad = value.clone(memory_format=torch.preserve_format)
    saver.step()
    saved = copy.deepcopy(saver.state_dict())  # else its states are the saver's
    for swapped, layout in itertools.product((False, True), layouts):
        for state in saved["state"].values():
            state.update(
                {k: x.contiguous(memory_format=layout) for k, x in state.items() if x.dim() == 4}
            )
        own = [Parameter(p.detach().clone()) for p in (params[::-1] if swapped else params)]
        loader = FusedAdamW(own, lr=0.01, state_dtype="int8")
        loader.load_state_dict(saved)
        for p, q in zip(params, own, strict=True):
            for a, b in zip(moments(saver, p), moments(loader, q), strict=True):
                assert ((a - b).abs() <= 0.07 * a.abs() + 0.02 * a.abs().max()).all(), swapped
    state = saver.state[params[0]]
    state["exp_avg_scale"] = state["exp_avg_scale"].t().contiguous().t()
    before = moments(saver, params[0])[0]
    params[0].grad = torch.zeros_like(params[0])
    saver.step()
    after = moments(saver, params[0])[0]
    torch.testing.assert_close(after, 0.9 * before, rtol=0.07, atol=0.02 * before.max().item())


def test_all_formats_in_one_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-group options, mixed freely; each group as in an optimizer of its own."""
    launched: list[int] = []
    real = Launcher.launch

    def counted(self: Launcher, *arguments: Any) -> None:
        launched.append(1)
        real(self, *arguments)

    monkeypatch.setattr(Launcher, "launch", counted)
    kinds: list[tuple[torch.dtype, dict[str, Any]]] = [
        (F32, {}),
        (F32, {"state_dtype": "int8"}),
        (BF16, {"state_dtype": F32}),
        (BF16, {"master_weights": True, "state_dtype": "int8"}),
        (BF16, {"stochastic_rounding": True}),
        (F16, {"master_weights": True, "state_dtype": (BF16, F32)}),
    ]
    groups = [{"params": make(device, dtype, [(5, 64), (1025,)]), **o} for dtype, o in kinds]
    optimizer = FusedAdamW(groups, backend="triton", lr=0.01)
    for step in range(3):
        train(optimizer, range(step, step + 1))
    assert len(launched) == 3
    for number, (dtype, options) in enumerate(kinds):
        params = [p for d, _ in kinds[: number + 1] for p in make(device, d, [(5, 64), (1025,)])]
        before, own = params[: 2 * number], params[2 * number :]
        alone = FusedAdamW(
            [{"params": before, "lr": 0.0}, {"params": own, **options}], backend="triton", lr=0.01
        )
        for step in range(3):
            train(alone, range(step, step + 1))
        for p, q in zip(groups[number]["params"], own, strict=True):
            assert torch.equal(p, q), (dtype, options)
            for key, x in alone.state[q].items():
                assert same_bits(optimizer.state[p][key], x), key


FORMATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float32": {"state_dtype": F32},
    "bfloat16": {"state_dtype": BF16},
    "int8": {"state_dtype": "int8"},
    "master": {"master_weights": True, "state_dtype": F32},
    "master+int8": {"master_weights": True, "state_dtype": "int8"},
    "stochastic": {"stochastic_rounding": True},
}


@each("amsgrad", [False, True])
@each("name", FORMATS)
def test_resume_is_bit_exact(device: torch.device, backend: Any, name: str, amsgrad: bool) -> None:
    """Through a file that holds plain tensors, into a new optimizer; the seed comes along."""
    options: Any = {"backend": backend, "amsgrad": amsgrad, "lr": 0.01, **FORMATS[name]}
    params, others = make(device, BF16), make(device, BF16)
    straight = FusedAdamW(params, seed=5, **options)
    train(straight, range(2))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    resumed = FusedAdamW(others, **options)
    resumed.load_state_dict(loaded)
    for x in loaded["state"].values():
        for value in x.values():
            if isinstance(value, Tensor):
                value.fill_(1)  # nothing is aliased
    train(straight, range(2, 4))
    train(resumed, range(2, 4))
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        a, b = straight.state[p], resumed.state[q]
        assert a.keys() == b.keys()
        assert all(same_bits(x, b[key]) for key, x in a.items())


@each("source", FORMATS)
@each("target", FORMATS)
def test_load_converts(device: torch.device, source: str, target: str) -> None:
    params = make(device, BF16)
    saver = FusedAdamW(params, lr=0.01, **FORMATS[source])
    train(saver, range(3))
    loader = FusedAdamW(params, lr=0.01, **FORMATS[target])
    loader.load_state_dict(saver.state_dict())
    group = loader.param_groups[0]
    for key in ("master_weights", "stochastic_rounding", "state_dtype"):
        wanted = FORMATS[target].get(key, storage.OPTIONS[key])
        assert group.get(key, storage.OPTIONS[key]) == storage.named(wanted)
    for p in params:
        if p not in saver.state:
            continue
        assert loader.state[p]["step"] == saver.state[p]["step"]
        for a, b in zip(moments(saver, p), moments(loader, p), strict=True):
            exact = source == target or (target, source) == ("float32", "bfloat16")
            if exact:
                assert torch.equal(a.float(), b.float())
            elif p.numel():
                assert (
                    (a.float() - b.float()).abs() <= 0.04 * a.abs() + 0.01 * a.abs().max()
                ).all()
        if "master" in source and "master" in target:
            assert torch.equal(master_of(saver, p), master_of(loader, p))
        elif "master" in target:
            assert torch.equal(master_of(loader, p), p.float())
    train(loader, range(3, 4))
    for p in saver.state:
        assert loader.state[p].keys() == {"step", *storage.storage_of(group, p).keys}


def test_states_are_laid_out_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a collective: ranks whose strings hash otherwise would swap moments in silence."""
    p = Parameter(torch.ones(2, 64, dtype=BF16))
    optimizer = FusedAdamW([p], amsgrad=True, master_weights=True, state_dtype="int8")
    train(optimizer, range(1))
    saved = optimizer.state_dict()
    laid_out: list[str] = []

    def spy(x: Tensor, param: Tensor) -> Tensor:
        laid_out.extend(key for key, given in saved["state"][0].items() if given is x)
        return local_of_loaded(x, param)

    monkeypatch.setattr(stating, "local_of_loaded", spy)
    optimizer.load_state_dict(saved)
    assert len(laid_out) == 7  # by chance a set has this order once in 5040
    assert laid_out == [key for key in STORED if key in laid_out]


def test_torch_loads_plain_formats_and_refuses_codes(device: torch.device) -> None:
    params = make(device, F32)
    for name in ("float32", "int8"):
        ours = FusedAdamW(params, **FORMATS[name])
        train(ours, range(1))
        torchs = torch.optim.AdamW(params)
        torchs.load_state_dict(copy.deepcopy(ours.state_dict()))
        backward(params, 7)
        if name == "int8":
            with pytest.raises(KeyError, match="exp_avg"):
                torchs.step()
        else:
            torchs.step()


@each("fused", [False, True])
def test_from_torch(device: torch.device, fused: bool) -> None:
    params = make(device, F32)
    torchs = torch.optim.AdamW(params, fused=fused)
    for step in range(2):
        backward(params, step)
        torchs.step()
    ours = FusedAdamW(params, state_dtype="int8")
    ours.load_state_dict(torchs.state_dict())
    for p in params:
        if p in torchs.state and p.numel():
            for a, b in zip(moments(ours, p), list(torchs.state[p].values())[1:], strict=True):
                assert ((a - b).abs() <= 0.04 * b.abs() + 0.01 * b.abs().max()).all()


@each("name", FORMATS)
def test_copies(device: torch.device, backend: Any, name: str) -> None:
    params = make(device, BF16)
    optimizer = FusedAdamW(params, lr=0.01, backend=backend, **FORMATS[name])
    train(optimizer, range(2))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        own = twin.param_groups[0]["params"]
        train(twin, range(2, 3))
        assert {k for p in own for k in twin.state[p]} == {
            k for p in params for k in optimizer.state[p]
        }
    train(optimizer, range(2, 3))
    for p, q in zip(params, own, strict=True):
        assert torch.equal(p, q)


def test_options_may_change_between_steps(device: torch.device, backend: Any) -> None:
    params = make(device, BF16)
    optimizer = FusedAdamW(params, lr=0.01, backend=backend)
    for step, name in enumerate(FORMATS):
        group = optimizer.param_groups[0]
        group.update({**storage.OPTIONS, **FORMATS[name]})
        train(optimizer, range(step, step + 1))
        for p, state in optimizer.state.items():
            assert state.keys() == {"step", *storage.storage_of(group, p).keys}


@each("wanted", [F32, None, "int8"], ids=str)
def test_a_maximum_that_amsgrad_left_behind(
    device: torch.device, backend: Any, wanted: Any
) -> None:
    """It stays, in whatever format, and is converted when amsgrad wants it again."""
    p = Parameter(torch.ones(2, 64, dtype=BF16, device=device))
    optimizer = FusedAdamW([p], amsgrad=True, state_dtype=BF16, backend=backend)
    group, options = optimizer.param_groups[0], {"state_dtype": wanted}
    p.grad = torch.full_like(p, 4.0)
    optimizer.step()
    group.update(options, amsgrad=False)
    if wanted is None:
        state = optimizer.state[p]
        state["exp_avg"], state["exp_avg_sq"] = (
            state["exp_avg"].float(),
            state["exp_avg_sq"].float(),
        )
    p.grad = torch.zeros_like(p)
    optimizer.step()
    p.data = p.data.clone()  # all is checked again
    optimizer.step()
    other = FusedAdamW([p], backend=backend, state_dtype=wanted)
    other.load_state_dict(optimizer.state_dict())
    for own in (optimizer, other):
        own.step()
        own.param_groups[0]["amsgrad"] = True
        own.step()
        found = moments(own, p)
        assert len(found) == 3
        assert found[1].dtype == found[2].dtype
        torch.testing.assert_close(
            found[2].float(), torch.full_like(found[2], 0.016).float(), rtol=0.05, atol=0
        )


def test_torchs_maximum_that_amsgrad_left_behind(device: torch.device) -> None:
    p = Parameter(torch.ones(8, device=device))
    theirs = torch.optim.AdamW([p], amsgrad=True)
    p.grad = torch.ones_like(p)
    theirs.step()
    theirs.param_groups[0]["amsgrad"] = False
    q = Parameter(p.detach().bfloat16())
    ours = FusedAdamW([q], state_dtype=F32)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[q]["max_exp_avg_sq"], theirs.state[p]["max_exp_avg_sq"])
    q.grad = torch.ones_like(q)
    ours.step()


@each("layout", ["channels_last", "transposed", "slice", "unaligned"])
@each("name", ["master+int8", "stochastic"])
def test_layouts(device: torch.device, layout: str, name: str) -> None:
    """Both backends keep the same, in memory order; loading into another layout keeps values."""
    build = {
        "channels_last": lambda: torch.randn(4, 64, 5, 3).to(memory_format=torch.channels_last),
        "transposed": lambda: torch.randn(70, 64).t(),
        "slice": lambda: torch.randn(9, 130)[:, 1:129],
        "unaligned": lambda: torch.randn(64 * 20 + 1)[1:].view(20, 64),
    }[layout]
    runs = []
    for backend in ("reference", "triton"):
        torch.manual_seed(2)
        value = build()
        whole = (
            torch.empty_strided(
                value.untyped_storage().nbytes() // 4 and value.shape, value.stride(), dtype=BF16
            )
            if layout != "slice" and layout != "unaligned"
            else None
        )
        if whole is None:
            buffer = torch.zeros(value.untyped_storage().nbytes() // 4, dtype=BF16, device=device)
            whole = buffer.as_strided(value.shape, value.stride(), value.storage_offset())
        whole = whole.to(device)
        whole.copy_(value)
        p = Parameter(whole)
        optimizer: Any = FusedAdamW([p], lr=0.01, backend=backend, **FORMATS[name])
        train(optimizer, range(2))
        runs.append((p, optimizer))
    (p, a), (q, b) = runs
    for x, y in zip(moments(a, p), moments(b, q), strict=True):
        assert x.stride() == y.stride()
        torch.testing.assert_close(x, y, rtol=0.07, atol=1e-3)
    torch.testing.assert_close(master_of(a, p), master_of(b, q), rtol=0.01, atol=0.02)
    plain = Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    other: Any = FusedAdamW([plain], **FORMATS[name])
    other.load_state_dict(a.state_dict())
    for x, y in zip(moments(a, p), moments(other, plain), strict=True):
        torch.testing.assert_close(x, y, rtol=0.07, atol=1e-3)
    train(other, range(2, 3))


@each("when", ["load", "step"])
def test_masters_of_params_with_gaps(device: torch.device, when: str) -> None:
    """Compared with the param's values: an empty stand-in's are what the allocator had there."""
    torch.manual_seed(1)
    low = FusedAdamW([Parameter(torch.randn(16, 8, device=device).half())], master_weights=True)
    train(low, range(2), F16)
    (given,) = (state["master_param"] for state in low.state.values())
    p = Parameter(torch.empty(16, 16, dtype=BF16, device=device)[:, :8])
    p.data.copy_(formats.encode_remainder(given)[0])
    optimizer = FusedAdamW([p], master_weights=True, lr=0.0)
    saved = low.state_dict()
    saved["param_groups"][0]["lr"] = 0.0
    with pytest.MonkeyPatch.context() as patch:
        real = torch.empty_like

        def poisoned(*arguments: Any, **options: Any) -> Tensor:
            x = real(*arguments, **options)
            return x.fill_(7) if x.device.type != "meta" else x

        patch.setattr(torch, "empty_like", poisoned)
        optimizer.load_state_dict(saved)
        if when == "step":
            del optimizer.state[p]["master_remainder"]
            optimizer.state[p]["master_param"] = given.clone()
            p.grad = torch.zeros_like(p)
            optimizer.step()
    assert torch.equal(master_of(optimizer, p), given)


def test_seeds_of_groups_outlive_a_checkpoint_without(device: torch.device) -> None:
    p, q = make(device, BF16, [(64,), (64,)])
    groups: list[dict[str, Any]] = [{"params": [p], "seed": 7}, {"params": [q]}]
    ours = FusedAdamW(groups, stochastic_rounding=True, seed=3)
    ours.load_state_dict(torch.optim.AdamW([{"params": [p]}, {"params": [q]}]).state_dict())
    assert [group["seed"] for group in ours.param_groups] == [7, 3]
    other = FusedAdamW([{"params": [p]}, {"params": [q]}], stochastic_rounding=True, seed=4)
    other.load_state_dict(ours.state_dict())
    assert [group["seed"] for group in other.param_groups] == [7, 3]


def test_graph_of_what_is_shown(device: torch.device) -> None:
    params = make(device, BF16, [(5, 64), (7,)])
    groups = [{"params": params[:1], "state_dtype": "int8", "master_weights": True}]
    optimizer = FusedAdamW([*groups, {"params": params[1:]}])
    shown = repr(optimizer)
    assert "bfloat16 with master_remainder 16 bits, exp_avg 8 bits in blocks of 64" in shown
    assert "bfloat16, exp_avg bfloat16, exp_avg_sq bfloat16: 1 parameters" in shown
    assert "Stored" not in repr(FusedAdamW(make(device, BF16)))


@each(
    ("options", "message"),
    [
        ({"state_dtype": "int4"}, "Invalid state_dtype: 'int4'"),
        ({"state_dtype": torch.float16}, "Invalid state_dtype"),
        ({"state_dtype": (F32,)}, "Invalid state_dtype"),
        ({"state_dtype": ["int8", [1]]}, "Invalid state_dtype"),
        ({"seed": -1}, "Invalid seed: -1"),
        ({"seed": 1.5}, "Invalid seed"),
        ({"differentiable": True, "state_dtype": "int8"}, "functional AdamW"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    p = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        FusedAdamW([p], **options)
    optimizer = FusedAdamW([p])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], **options})
    assert len(optimizer.param_groups) == 1
    p.grad = torch.ones_like(p)
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not optimizer.state


@each(
    ("dtype", "options", "message"),
    [
        (torch.complex64, {"state_dtype": F32}, "their moments are complex"),
        (F64, {"state_dtype": "int8"}, "computed in float32"),
        (F64, {"stochastic_rounding": True, "state_dtype": BF16}, "rounds float32 to bfloat16"),
        (F16, {"stochastic_rounding": True}, "rounds to bfloat16 alone"),
    ],
    ids=str,
)
def test_dtypes_that_cannot_be_stored_so(
    dtype: torch.dtype, options: dict[str, Any], message: str, backend: Any, device: torch.device
) -> None:
    good = Parameter(torch.ones(3, device=device))
    bad = Parameter(torch.ones(3, dtype=dtype, device=device))
    # a group of its own, which has these options alone
    optimizer = FusedAdamW([{"params": [good]}, {"params": [bad], **options}], backend=backend)
    good.grad, bad.grad = torch.ones_like(good), torch.ones_like(bad)
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(good, torch.ones_like(good))


@each("dtypes", [None, F32, (BF16, F32)], ids=str)
def test_float64_and_float32_params_beside(device: torch.device, backend: Any, dtypes: Any) -> None:
    """Options that mean nothing for a dtype leave it alone: float64 is computed in float64."""
    params = [Parameter(torch.ones(9, dtype=d, device=device)) for d in (F64, F32)]
    plain = [Parameter(p.detach().clone()) for p in params]
    stored: Any = {"state_dtype": dtypes, "backend": backend}
    ours = FusedAdamW(params, master_weights=True, stochastic_rounding=True, **stored)
    truth = FusedAdamW(plain, **stored)
    for step in range(2):
        train(ours, range(step, step + 1))
        train(truth, range(step, step + 1))
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


def test_a_damaged_state_is_refused(device: torch.device, backend: Any) -> None:
    p = Parameter(torch.ones(200, device=device))
    optimizer = FusedAdamW([p], state_dtype="int8", backend=backend)
    train(optimizer, range(1))
    saved, state = copy.deepcopy(optimizer.state_dict()), optimizer.state[p]
    for key, bad, error, message in (
        (
            "exp_avg_scale",
            torch.zeros(3, dtype=U8, device=device),
            RuntimeError,
            "4 blocks|blocks of",
        ),
        ("exp_avg_q", torch.zeros(200, device=device), TypeError, "kept in torch.uint8"),
        ("exp_avg_sq_q", torch.zeros(199, dtype=U8, device=device), RuntimeError, "shape"),
    ):
        kept, before = state[key], p.detach().clone()
        state[key] = bad
        p.grad = torch.ones_like(p)
        with pytest.raises(error, match=message):
            optimizer.step()
        state[key] = kept
        assert torch.equal(p, before)
        broken = copy.deepcopy(saved)
        broken["state"][0][key] = bad
        with pytest.raises(error, match=message):
            optimizer.load_state_dict(broken)
    saved["state"][0]["max_exp_avg_sq_q"] = saved["state"][0]["exp_avg_sq_q"]
    with pytest.raises(RuntimeError, match=r"but not \['max_exp_avg_sq'\]"):
        optimizer.load_state_dict(saved)
    del saved["state"][0]["max_exp_avg_sq_q"], saved["state"][0]["exp_avg_scale"]
    with pytest.raises(RuntimeError, match=r"but not \['exp_avg'\]"):
        optimizer.load_state_dict(saved)
    p.data = p.data.clone()  # all is checked again
    for key, bad, message in (
        ("exp_avg", torch.zeros(200, dtype=torch.int32), "has to be a real floating-point tensor"),
        ("exp_avg", torch.zeros(200, dtype=torch.complex64), "start it anew"),
    ):
        state[key] = bad.to(device)
        with pytest.raises(TypeError, match=message):
            optimizer.step()


def test_remainders_are_bits(device: torch.device, backend: Any) -> None:
    """Kept as bfloat16, taken as int16 too, from a checkpoint or by hand; no other dtype is."""
    runs = []
    for how in ("straight", "loaded", "by hand"):
        params = make(device, BF16)
        optimizer = FusedAdamW(params, lr=0.01, master_weights=True, backend=backend)
        train(optimizer, range(3))
        saved = copy.deepcopy(optimizer.state_dict())
        if how == "loaded":
            for state in saved["state"].values():
                state["master_remainder"] = state["master_remainder"].view(I16)
            optimizer.load_state_dict(saved)
        elif how == "by hand":
            for state in optimizer.state.values():
                state["master_remainder"] = state["master_remainder"].view(I16)
        train(optimizer, range(3, 4))
        runs.append([*params, *(optimizer.state[p]["master_remainder"] for p in params)])
        assert all(x.dtype == BF16 for x in runs[-1])
    for straight, *others in zip(*runs, strict=True):
        assert all(same_bits(straight, x) for x in others)
    saved["state"][0]["master_remainder"] = saved["state"][0]["master_remainder"].float()
    with pytest.raises(TypeError, match=r"is torch\.float32; it is kept in torch\.bfloat16"):
        optimizer.load_state_dict(saved)


def test_bytes_of_formats() -> None:
    """Everything is read and written once, the gradient read; scales are a byte for 64."""
    for signature, wanted in (
        (t.Signature(BF16, BF16, F32, F32, False, I16), 26),
        (t.Signature(BF16, BF16, U8, U8, False, I16), 14 + 4 / 64),
        (t.Signature(BF16, BF16, U8, U8, False), 10 + 4 / 64),
        (t.Signature(BF16, BF16, BF16, BF16, False, None, True), 14),
        (t.Signature(F16, F16, F16, F16, False, F32), 22),
        (t.Signature(F32, F32, U8, U8, True), 12 + 6 + 6 / 64),
    ):
        assert signature.bytes_per_element == wanted


def test_states_are_made_one_key_after_the_other(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that they lie in the host's memory in the order in which each step asks for them."""
    keys: list[str] = []
    made = storage.make

    def noted(*args: Any) -> None:
        before = set(args[-1])
        made(*args)
        keys.extend(args[-1].keys() - before)

    monkeypatch.setattr(storage, "make", noted)
    groups = [
        {"params": make(device, BF16), "amsgrad": True, "master_weights": True},
        {"params": make(device, F32), "state_dtype": "int8"},
    ]
    adamw = FusedAdamW(groups, backend="reference")
    backward([p for group in groups for p in group["params"]], 3)
    adamw.step()
    runs = [key for key, _ in itertools.groupby(keys)]
    assert len(runs) == len(set(runs)) == 8
    assert len(keys) == sum(len(s) - 1 for s in adamw.state.values())  # steps apart
    assert all(next(iter(s)) == "step" for s in adamw.state.values())


@each(
    "options",
    [{}, {"state_dtype": "int8"}, {"state_dtype": BF16}, {"master_weights": True}],
    ids=str,
)
def test_planning_anew_leaves_states_as_they_are(
    device: torch.device, backend: Any, options: dict[str, Any]
) -> None:
    """In every format and layout: what is as its group wants it is not made again."""
    usual = [p for p in make(device, BF16) if in_8_bits(p)]
    other_layout = Parameter(torch.randn(64, 5, 64, device=device, dtype=BF16).transpose(0, 1))
    adamw = FusedAdamW([*usual, other_layout], amsgrad=True, backend=backend, **options)
    params = adamw.param_groups[0]["params"]
    backward(params, 3)
    adamw.step()
    before = {p: dict(adamw.state[p]) for p in params}
    adamw.max_grad_norm = 1e9  # with a norm: another plan
    adamw.step()
    for p in params:
        assert adamw.state[p].keys() == before[p].keys()
        assert all(x is before[p][key] for key, x in adamw.state[p].items())


def test_a_group_may_have_one_option_alone(device: torch.device, backend: Any) -> None:
    """What it leaves out is as by default: float64 params would refuse stochastic rounding here."""
    p = Parameter(torch.ones(9, dtype=F64, device=device))
    adamw = FusedAdamW([{"params": [p], "state_dtype": BF16}], backend=backend)
    p.grad = torch.ones_like(p)
    adamw.step()
    assert {x.dtype for key, x in adamw.state[p].items() if key != "step"} == {BF16}
