"""release_gradients: the bits of backward(); step(), a bucket's gradients, and what is refused."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import ranks_release
import torch
from ranks import need_interpreter, on_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from truth import same_bits

from fused_adamw import FusedAdamW, release, release_gradients
from fused_adamw.launch import Launcher

each = pytest.mark.parametrize
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed or gloo",
)
WIDTH = 12
LAYER = 4 * (WIDTH * WIDTH + WIDTH)  # bytes of a layer's gradients


class Net(nn.Module):
    """Layers, norms, an embedding tied to the head, and experts of which one is used at a time."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.head = nn.Linear(WIDTH, 7)
        self.head.weight = self.embedding.weight
        self.recompute = False

    def forward(self, tokens: Tensor, expert: int) -> Tensor:
        """[batch] -> []: the loss."""
        x: Tensor = self.embedding(tokens)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            if self.recompute:
                x = x + checkpoint(layer, torch.tanh(norm(x)), use_reentrant=False)
            else:
                x = x + layer(torch.tanh(norm(x)))
        x = self.head(x + self.experts[expert](x))
        return nn.functional.cross_entropy(x.float(), (tokens + 1) % 7)


def make(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Net, Net]:
    """Two nets with the same weights."""
    net = Net().to(device, dtype)
    return net, copy.deepcopy(net)


def decayed(net: nn.Module) -> list[dict[str, Any]]:
    """Matrices apart from the rest, as everyone groups them."""
    params = list(net.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1, "amsgrad": True},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0, "maximize": True},
    ]


def tokens(step: int, device: torch.device) -> Tensor:
    """A batch."""
    return torch.randint(7, (5,), generator=torch.Generator().manual_seed(step)).to(device)


def train(optimizer: torch.optim.Optimizer, net: Net, steps: Iterable[int]) -> None:
    """Iterations as users write them; the second expert is idle in every third."""
    device = net.head.bias.device
    for step in steps:
        optimizer.zero_grad()
        net(tokens(step, device), int(step % 3 > 0)).backward()
        optimizer.step()


def assert_same(a: FusedAdamW, b: FusedAdamW) -> None:
    """Params and states of two optimizers are the same bits."""
    pairs = list(zip(flat(a), flat(b), strict=True))
    for p, q in pairs:
        assert torch.equal(p, q)
        own, other = a.state.get(p, {}), b.state.get(q, {})
        assert own.keys() == other.keys()
        assert all(same_bits(x, other[key]) for key, x in own.items())


def flat(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All params."""
    return [p for group in optimizer.param_groups for p in group["params"]]


@each(
    ("dtype", "bucket_bytes", "options"),
    [
        (torch.float32, 1, {}),
        (torch.float32, 2 * LAYER, {}),
        (torch.float32, 1 << 30, {}),
        (torch.bfloat16, LAYER, {}),
        (torch.bfloat16, LAYER, {"stochastic_rounding": True}),
        (torch.bfloat16, LAYER, {"master_weights": True, "state_dtype": "int8"}),
    ],
    ids=str,
)
def test_same_bits_as_a_step_after_backward(
    device: torch.device,
    backend: Any,
    dtype: torch.dtype,
    bucket_bytes: int,
    options: dict[str, Any],
) -> None:
    net, twin = make(device, dtype)
    released = FusedAdamW(decayed(net), backend=backend, **options)
    plain = FusedAdamW(decayed(twin), backend=backend, **options)
    release_gradients(released, bucket_bytes)
    for step in range(4):
        train(released, net, [step])
        train(plain, twin, [step])
        assert_same(released, plain)
        assert all(p.grad is None for p in net.parameters())


def test_backward_leaves_no_gradients(device: torch.device) -> None:
    net, _ = make(device)
    optimizer = FusedAdamW(net.parameters())
    release_gradients(optimizer, 2 * LAYER)
    train(optimizer, net, [1])
    before = [p.detach().clone() for p in net.parameters()]
    net(tokens(2, device), 1).backward()
    assert all(p.grad is None for p in net.parameters())
    moved = [not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)]
    assert moved.count(False) == 1, "all but the idle expert are updated before step()"


def test_bytes_of_gradients_alive(device: torch.device) -> None:
    """Of 12 equal layers never more than a bucket of 3."""
    layers = [nn.Linear(WIDTH, WIDTH).to(device) for _ in range(12)]
    net = nn.Sequential(*layers)
    optimizer = FusedAdamW(net.parameters())
    arrived: list[weakref.ref[Tensor]] = []
    most = 0

    def look(p: Tensor) -> None:
        nonlocal most
        assert p.grad is not None
        arrived.append(weakref.ref(p.grad))
        alive = [g for ref in arrived if (g := ref()) is not None]
        most = max(most, sum(g.numel() * g.element_size() for g in alive))

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(look)
    x = torch.randn(2, WIDTH, device=device)
    release = release_gradients(optimizer, 3 * LAYER)
    for _ in range(3):
        most = 0
        net(x).sum().backward()
        optimizer.step()
        assert most == 3 * LAYER
    assert [len(bucket) for bucket in release.buckets] == [6, 6, 6, 6]
    assert {id(p) for p in release.buckets[0]} == {
        id(p) for x in layers[-3:] for p in x.parameters()
    }
    release.remove()
    most = 0
    net(x).sum().backward()
    assert most == 12 * LAYER, "without it all are alive at the end"


def test_one_launch_a_bucket(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    launch = Launcher.launch
    monkeypatch.setattr(
        Launcher, "launch", lambda *arguments: launches.append(1) or launch(*arguments)
    )
    net = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(6)]).to(device)
    optimizer = FusedAdamW(decayed(net), backend="triton")
    release_gradients(optimizer, 2 * LAYER)
    for _ in range(3):
        launches.clear()
        net(torch.randn(2, WIDTH, device=device)).sum().backward()
        assert len(launches) == 3
        optimizer.step()
        assert len(launches) == 3


def test_recomputed_activations(device: torch.device, backend: Any) -> None:
    net, twin = make(device)
    net.recompute = True
    released = FusedAdamW(net.parameters(), backend=backend)
    plain = FusedAdamW(twin.parameters(), backend=backend)
    release_gradients(released, LAYER)
    for step in range(3):
        train(released, net, [step])
        train(plain, twin, [step])
        assert_same(released, plain)


def test_closure(device: torch.device, backend: Any) -> None:
    net, twin = make(device)
    released = FusedAdamW(net.parameters(), backend=backend)
    plain = FusedAdamW(twin.parameters(), backend=backend)
    release_gradients(released, LAYER)

    def closure(optimizer: FusedAdamW, model: Net, step: int) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = model(tokens(step, device), 0)
            loss.backward()
            return loss

        return evaluate

    for step in range(3):
        ours = released.step(closure(released, net, step))
        assert torch.equal(ours, plain.step(closure(plain, twin, step)))
        assert_same(released, plain)


def test_hyper_parameters_are_those_of_the_moment(device: torch.device, backend: Any) -> None:
    """Schedulers, and whatever else writes to the groups, before backward or during it."""
    net, twin = make(device)
    rates = [torch.tensor(0.01, device=device) for _ in range(2)]
    optimizers = [
        FusedAdamW([{**g, "lr": lr} if i else g for i, g in enumerate(decayed(x))], backend=backend)
        for x, lr in zip((net, twin), rates, strict=True)
    ]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(x, 0.5) for x in optimizers]
    release_gradients(optimizers[0], LAYER)
    for step in range(4):
        for optimizer, scheduler, model in zip(optimizers, schedulers, (net, twin), strict=True):
            train(optimizer, model, [step])
            scheduler.step()
            optimizer.param_groups[0]["betas"] = (0.5 + step / 10, 0.99)
            optimizer.param_groups[1]["weight_decay"] = step / 10
        assert_same(*optimizers)


def test_losses_that_share_no_parameter(device: torch.device, backend: Any) -> None:
    """Several backwards before a step are fine, as long as each param gets one gradient."""
    layers = [nn.Linear(WIDTH, WIDTH).to(device) for _ in range(2)]
    twins = copy.deepcopy(layers)
    nets, twin_nets = nn.ModuleList(layers), nn.ModuleList(twins)
    released = FusedAdamW(nets.parameters(), backend=backend)
    plain = FusedAdamW(twin_nets.parameters(), backend=backend)
    release_gradients(released, 3 * LAYER // 2)  # the second bucket gets gradients of both
    for _ in range(3):
        x = torch.randn(2, WIDTH, device=device)
        for layer, twin in zip(layers, twins, strict=True):
            layer(x).square().sum().backward()
            twin(x).square().sum().backward()
        released.step()
        plain.step()
        plain.zero_grad()
        assert_same(released, plain)


def test_accumulation_is_refused(device: torch.device, backend: Any) -> None:
    net, _ = make(device)
    optimizer = FusedAdamW(net.named_parameters(), backend=backend)
    release_gradients(optimizer, LAYER)
    train(optimizer, net, [1])
    net(tokens(2, device), 1).backward()
    steps = {p: s["step"].item() for p, s in optimizer.state.items()}
    with pytest.raises(RuntimeError, match=r"head.bias got a second gradient since the last opt"):
        net(tokens(3, device), 1).backward()
    with pytest.raises(RuntimeError, match=r"head.bias was updated during backward and has a gra"):
        optimizer.step()
    assert steps == {p: s["step"].item() for p, s in optimizer.state.items()}
    optimizer.zero_grad()
    optimizer.step()
    train(optimizer, net, [4])


def test_reentrant_checkpoints_of_a_shared_layer_are_refused(device: torch.device) -> None:
    """Each checkpoint is a backward of its own, so that the layer gets its gradient in parts."""
    layer = nn.Linear(WIDTH, WIDTH).to(device)
    optimizer = FusedAdamW(layer.parameters())
    release_gradients(optimizer, 1)
    x = torch.randn(2, WIDTH, device=device, requires_grad=True)
    for _ in range(2):
        x = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="wants use_reentrant=False"):
        x.sum().backward()


def test_backward_that_still_needs_an_updated_weight_raises(
    device: torch.device, backend: Any
) -> None:
    layers = [nn.Linear(WIDTH, WIDTH, bias=False).to(device) for _ in range(2)]
    first, second = layers
    optimizer = FusedAdamW([x.weight for x in layers], backend=backend)
    release_gradients(optimizer, 1)
    x = first(torch.randn(2, WIDTH, device=device))
    x = torch.tanh(x @ second.weight.detach())  # not counted among the weight's uses
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second(x).sum().backward()


def test_gradients_assigned_after_backward(device: torch.device, backend: Any) -> None:
    """To params that backward did not update: as in any step. To others: refused."""
    net, _ = make(device)
    optimizer = FusedAdamW(net.parameters(), backend=backend)
    release_gradients(optimizer, LAYER)
    train(optimizer, net, [1])
    net(tokens(2, device), 1).backward()
    idle = net.experts[0].weight
    idle.grad = torch.ones_like(idle)  # type: ignore[assignment, arg-type]
    optimizer.step()
    assert optimizer.state[idle]["step"].item() == 1  # type: ignore[index]
    net(tokens(2, device), 1).backward()
    net.head.bias.grad = torch.ones_like(net.head.bias)
    with pytest.raises(RuntimeError, match="Assign no gradients between backward"):
        optimizer.step()


@each(
    ("options", "words"),
    [
        ({"max_grad_norm": 1.0}, "clip_by_last_norm=True"),
        ({"skip_nonfinite": True}, "optimizer.skip_nonfinite = False"),
        ({"differentiable": True}, "torch's own step"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_that_cannot_be_right_are_refused(
    device: torch.device, options: dict[str, Any], words: str
) -> None:
    """At once, and when they are set later: before anything has been updated."""
    layer = nn.Linear(WIDTH, WIDTH).to(device)
    optimizer = FusedAdamW(layer.parameters(), **options)
    with pytest.raises(RuntimeError, match=words):
        release_gradients(optimizer)
    assert optimizer._release is None
    layer(torch.randn(2, WIDTH, device=device)).sum().backward()
    assert layer.bias.grad is not None

    layer.zero_grad()
    optimizer = FusedAdamW(layer.parameters())
    release_gradients(optimizer, 1)
    for key, value in options.items():
        if key == "differentiable":
            optimizer.param_groups[0][key] = value
        else:
            setattr(optimizer, key, value)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=words):
        layer(torch.randn(2, WIDTH, device=device)).sum().backward()
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()
    assert torch.equal(layer.weight, before)


def test_wrong_arguments(device: torch.device) -> None:
    p = nn.Parameter(torch.ones(3, device=device))
    with pytest.raises(TypeError, match="wants a FusedAdamW, not a AdamW"):
        release_gradients(torch.optim.AdamW([p]))  # type: ignore[arg-type]
    optimizer = FusedAdamW([p])
    with pytest.raises(ValueError, match="Invalid bucket_bytes: 0"):
        release_gradients(optimizer, 0)
    release_gradients(optimizer)
    with pytest.raises(RuntimeError, match=r"released already: remove\(\) first"):
        release_gradients(optimizer)


@each("fused", [None, False])
def test_grad_scaler_is_refused(device: torch.device, fused: bool | None) -> None:
    """In the first scaler.step(): no one can tell before it that the loss was scaled."""
    layer = nn.Linear(WIDTH, WIDTH).to(device)
    optimizer = FusedAdamW(layer.parameters(), fused=fused)
    release_gradients(optimizer, 1)
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(layer(torch.randn(2, WIDTH, device=device)).sum()).backward()
    # with fused=False the scaler looks for gradients itself, and says that there are none
    error, words = (
        (RuntimeError, "without a scaler") if fused is None else (AssertionError, "No inf checks")
    )
    with pytest.raises(error, match=words):
        scaler.step(optimizer)


def test_capture_is_refused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(WIDTH, WIDTH).to(device)
    optimizer = FusedAdamW(layer.parameters())
    release_gradients(optimizer, 1)
    monkeypatch.setattr(release, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        layer(torch.randn(2, WIDTH, device=device)).sum().backward()
    assert not optimizer.state


def test_a_gradient_that_cannot_be_used(device: torch.device, backend: Any) -> None:
    """backward() raises what step() would, with the param's name, and the bucket is as it was."""
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3)).to(device)
    optimizer = FusedAdamW(net.named_parameters(), backend=backend)
    release_gradients(optimizer, 1)
    before = net[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"sparse gradients.*0.weight.grad"):
        net(torch.tensor([1, 2], device=device)).sum().backward()
    assert torch.equal(net[0].weight, before)
    assert optimizer.state[net[1].weight]["step"] == 1, "updated before the error"
    optimizer.zero_grad()
    optimizer.step()


def test_groups_that_change(device: torch.device, backend: Any) -> None:
    """Groups added, layers frozen and thawed, params moved to another group: all are followed."""
    nets = make(device)
    optimizers = []
    for net in nets:
        net.layers.requires_grad_(False)
        net.layers[1].requires_grad_(True)
        params = [p for p in net.parameters() if p is not net.head.bias]
        groups = [{"params": params[::2], "lr": 0.1}, {"params": params[1::2]}]
        optimizers.append(FusedAdamW(groups, backend=backend))
    released, plain = optimizers
    handle = release_gradients(released, 2 * LAYER)

    def both(*steps: int) -> None:
        for optimizer, net in zip(optimizers, nets, strict=True):
            train(optimizer, net, steps)
        assert_same(released, plain)

    both(1, 2)
    for net in nets:  # another layer's turn
        net.layers[1].requires_grad_(False)
        net.layers[0].requires_grad_(True)
    both(3, 4)
    known = {id(p) for bucket in handle.buckets for p in bucket}
    assert id(nets[0].layers[0].weight) in known
    assert id(nets[0].layers[1].weight) not in known
    for optimizer, net in zip(optimizers, nets, strict=True):
        optimizer.add_param_group({"params": [net.head.bias], "lr": 0.5})
    both(5)
    for optimizer in optimizers:
        optimizer.param_groups[2]["params"].append(optimizer.param_groups[0]["params"].pop())
    both(6, 7)
    gone = [optimizer.param_groups[1]["params"].pop() for optimizer in optimizers]
    before = gone[0].detach().clone()
    both(8, 9)
    assert torch.equal(gone[0], before), "no longer the optimizer's"
    for optimizer, p in zip(optimizers, gone, strict=True):
        p.grad = None
        optimizer.param_groups[1]["params"].append(p)
    both(10, 11)
    nets[0](tokens(1, device), 1).backward()
    assert nets[0].head.bias.grad is None
    assert all(p.grad is None for p in flat(released))


def test_a_param_replaced_by_another_object(device: torch.device, backend: Any) -> None:
    """As who resizes an embedding does: the new one's gradients are released from then on."""
    p, q = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    optimizer = FusedAdamW([p], backend=backend, lr=0.1, weight_decay=0.0)
    release_gradients(optimizer, 1)
    p.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = q
    for step in range(2):
        q.sum().backward()
        optimizer.step()
        assert q.grad is None
        torch.testing.assert_close(q.detach(), torch.full_like(q, 0.9 - 0.1 * step))
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.9))


def test_a_gradient_that_another_hook_has_taken(device: torch.device, backend: Any) -> None:
    p, q = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    taken: list[Tensor] = []

    def take(x: Tensor) -> None:
        assert x.grad is not None
        taken.append(x.grad)
        x.grad = None

    p.register_post_accumulate_grad_hook(take)
    optimizer = FusedAdamW([p, q], backend=backend, lr=0.1, weight_decay=0.0)
    release_gradients(optimizer, 1)
    for _ in range(2):
        (p.sum() + q.sum()).backward()
        optimizer.step()
    assert len(taken) == 2
    assert torch.equal(p, torch.ones_like(p))
    torch.testing.assert_close(q.detach(), torch.full_like(q, 0.8))


def test_a_param_that_left_arrives_first(device: torch.device) -> None:
    """Under FSDP2, which runs a param's hooks itself: they must not change then."""
    p, q = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    optimizer = FusedAdamW([p, q])
    release_gradients(optimizer, 1)
    q.register_post_accumulate_grad_hook(lambda _: None)  # another one comes after ours
    optimizer.param_groups[0]["params"].pop()
    for x in (q, p):
        x.grad = torch.ones_like(x)
        for hook in x._post_accumulate_grad_hooks.values():  # type: ignore[attr-defined]
            hook(x)
    assert (p.grad is None, q.grad is None) == (True, False)


def test_a_group_added_between_backward_and_step(device: torch.device, backend: Any) -> None:
    net, twin = make(device)
    optimizers = [FusedAdamW(x.layers.parameters(), backend=backend) for x in (net, twin)]
    release_gradients(optimizers[0], LAYER)
    for optimizer, model in zip(optimizers, (net, twin), strict=True):
        model(tokens(1, device), 1).backward()
        optimizer.add_param_group({"params": list(model.norms.parameters()), "lr": 0.5})
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()
        model(tokens(2, device), 1).backward()
    assert all(p.grad is None for p in flat(optimizers[0]))
    for optimizer in optimizers:
        optimizer.step()
    assert_same(*optimizers)


def test_checkpoints(device: torch.device, backend: Any) -> None:
    """Loaded under a release; one saved under it goes on without, and in torch."""
    net, twin = make(device)
    released = FusedAdamW(net.parameters(), backend=backend)
    plain = FusedAdamW(twin.parameters(), backend=backend)
    release_gradients(released, LAYER)
    train(released, net, range(3))
    train(plain, twin, range(3))
    saved, weights = copy.deepcopy((released.state_dict(), net.state_dict()))
    train(released, net, range(3, 6))
    net.load_state_dict(weights)
    released.load_state_dict(saved)
    train(released, net, range(3, 6))
    train(plain, twin, range(3, 6))
    assert_same(released, plain)
    torch.optim.AdamW(twin.parameters()).load_state_dict(released.state_dict())
    plain.load_state_dict(released.state_dict())
    assert_same(released, plain)


def test_copies_are_without(device: torch.device, backend: Any) -> None:
    net, _ = make(device)
    optimizer = FusedAdamW(net.parameters(), backend=backend)
    release_gradients(optimizer, LAYER)
    train(optimizer, net, range(2))
    for twin, other in (
        copy.deepcopy((net, optimizer)),
        pickle.loads(pickle.dumps((net, optimizer))),
    ):
        assert_same(optimizer, other)
        twin(tokens(5, device), 1).backward()
        assert sum(p.grad is None for p in twin.parameters()) == 1, "only the idle expert"
        other.step()
        assert any(not torch.equal(p, q) for p, q in zip(flat(optimizer), flat(other), strict=True))


def test_remove(device: torch.device, backend: Any) -> None:
    net, twin = make(device)
    released = FusedAdamW(net.parameters(), backend=backend)
    plain = FusedAdamW(twin.parameters(), backend=backend)
    with release_gradients(released, LAYER) as handle:
        train(released, net, range(2))
    handle.remove()
    train(plain, twin, range(2))
    train(released, net, [2])
    train(plain, twin, [2])
    assert net.head.bias.grad is not None
    assert_same(released, plain)
    released.zero_grad()
    other = release_gradients(released, LAYER)
    handle.remove()
    assert released._release is other, "a handle removes nothing but its own"
    train(released, net, range(3, 5))
    train(plain, twin, range(3, 5))
    assert_same(released, plain)


def test_params_do_not_keep_the_optimizer_alive(device: torch.device) -> None:
    layer = nn.Linear(WIDTH, WIDTH).to(device)
    optimizer = FusedAdamW(layer.parameters())
    release_gradients(optimizer, 1)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    layer(torch.randn(2, WIDTH, device=device)).sum().backward()
    assert layer.bias.grad is not None


@each("bucket_bytes", [LAYER, 1 << 30])
def test_clip_by_last_norm(device: torch.device, backend: Any, bucket_bytes: int) -> None:
    """The factor comes from the last step's norm, whole; the first step's is 1."""
    net, twin = make(device)
    released = FusedAdamW(decayed(net), backend=backend, max_grad_norm=0.5)
    plain = FusedAdamW(decayed(twin), backend=backend)
    release_gradients(released, bucket_bytes, clip_by_last_norm=True)
    norm, factor = 0.0, 1.0
    for step in range(5):
        if step == 3:  # an attribute, as without a release
            released.max_grad_norm = 0.01
        train(released, net, [step])
        plain.zero_grad()
        twin(tokens(step, device), int(step % 3 > 0)).backward()
        if step:
            factor = min(1.0, released.max_grad_norm / (norm + 1e-6))  # type: ignore[operator]
        grads = [p.grad for p in twin.parameters() if p.grad is not None]
        norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt().item()
        for g in grads:
            g.mul_(factor)
        plain.step()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        metrics = released.metrics()
        assert metrics["grad_norm"].item() == pytest.approx(norm, rel=1e-5)
        assert metrics["clip_factor"].item() == pytest.approx(factor, rel=1e-5)
        assert metrics["skipped_steps"].item() == 0
    assert factor < 1
    for max_norm in (None, 0.01):  # the step before was not measured
        released.max_grad_norm = max_norm
        train(released, net, [6])
    assert released.metrics()["clip_factor"] == 1


@each("change", ["freeze", "pop", "add"])
def test_norm_of_groups_that_change_before_step(
    device: torch.device, backend: Any, change: str
) -> None:
    """What was updated during backward counts, whatever the groups are when step() is called."""
    net, twin = make(device)
    released = FusedAdamW(decayed(net), backend=backend, max_grad_norm=math.inf)
    release_gradients(released, 1, clip_by_last_norm=True)
    net(tokens(1, device), 1).backward()
    if change == "freeze":
        net.head.requires_grad_(False)
    elif change == "pop":
        released.param_groups.pop()
    else:
        released.add_param_group({"params": [nn.Parameter(torch.ones(2, device=device))]})
    released.step()
    twin(tokens(1, device), 1).backward()
    grads = [p.grad for p in twin.parameters() if p.grad is not None]
    norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt().item()
    assert released.metrics()["grad_norm"].item() == pytest.approx(norm, rel=1e-6)


def test_first_step_after_a_load_is_not_clipped(device: torch.device, backend: Any) -> None:
    net, _ = make(device)
    released = FusedAdamW(net.parameters(), backend=backend, max_grad_norm=1e-3)
    release_gradients(released, 1, clip_by_last_norm=True)
    factors = []
    for step in range(4):
        train(released, net, [step])
        factors.append(released.metrics()["clip_factor"].item())
        if step == 1:
            released.load_state_dict(released.state_dict())
    assert [x == 1 for x in factors] == [True, False, True, False]


def test_states_are_kept_for_the_stream_of_step(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 calls hooks on a stream of its own; states made there are saved and freed elsewhere."""
    if device.type != "cpu":
        pytest.skip("played with streams that are none")
    net, _ = make(device)
    released = FusedAdamW(net.parameters())
    release_gradients(released, LAYER)
    told: list[Tensor] = []
    monkeypatch.setattr(release, "stream_of", lambda device: "main")
    monkeypatch.setattr(release, "used_here", told.extend)
    train(released, net, [1])
    states = [x for s in released.state.values() for x in s.values()]
    assert {id(x) for x in told} == {id(x) for x in states}
    told.clear()
    train(released, net, [2])
    assert not told
    released.load_state_dict(released.state_dict())
    train(released, net, [4])
    states = [x for s in released.state.values() for x in s.values()]
    assert {id(x) for x in told} == {id(x) for x in states}


def test_a_backward_that_raises_half_way(device: torch.device, backend: Any) -> None:
    """Its iteration is ended as the error of the next one says."""
    net, _ = make(device)
    optimizer = FusedAdamW(net.named_parameters(), backend=backend)
    release_gradients(optimizer, LAYER)
    train(optimizer, net, [1])
    loss = net(tokens(2, device), 1)

    def fails(_: Tensor) -> None:
        raise MemoryError

    hook = net.layers[0].weight.register_hook(fails)
    with pytest.raises(MemoryError):
        loss.backward()
    hook.remove()
    assert optimizer.state[net.head.bias]["step"] == 2
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"that raised, zero_grad\(\) and then step\(\) end its"):
        net(tokens(2, device), 1).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state[net.head.bias]["step"] == 2
    train(optimizer, net, [3])
    assert optimizer.state[net.head.bias]["step"] == 3


@needs_gloo
@each("backend", ["reference", "triton"])
def test_fsdp2(backend: str) -> None:
    need_interpreter(backend)
    on_ranks(2, ranks_release.train_fsdp, (), backend)


@needs_gloo
def test_hsdp() -> None:
    on_ranks(4, ranks_release.train_fsdp, (2, 2), "reference")


@needs_gloo
@each(
    "scenario",
    [
        ranks_release.accumulate_fsdp,
        ranks_release.clip_fsdp,
        ranks_release.refused,
        ranks_release.local_models,
        ranks_release.partial_gradients,
        ranks_release.no_collective_unless_clipped,
    ],
    ids=lambda x: x.__name__,
)
def test_two_ranks(scenario: Callable[[], None]) -> None:
    on_ranks(2, scenario)


@needs_gloo
def test_not_finite_beside_copies() -> None:
    on_ranks(4, ranks_release.not_finite_beside_copies)


@needs_gloo
def test_plain_params_on_one_rank() -> None:
    on_ranks(1, ranks_release.one_rank)
