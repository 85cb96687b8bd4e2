"""What each rank of tests/test_release.py runs: spawned processes import it by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import OPTIONS, Net, backward, fsdp, whole
from ranks_norm import collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fused_adamw import FusedAdamW, release_gradients


def assert_same(net: nn.Module, other: nn.Module, a: FusedAdamW, b: FusedAdamW) -> None:
    """Params and states are the same bits, everywhere."""
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(p.detach()), whole(q.detach()))
        assert a.state[p].keys() == b.state[q].keys()
        assert all(torch.equal(whole(x), whole(b.state[q][key])) for key, x in a.state[p].items())


def train_fsdp(shape: tuple[int, ...], backend: Any) -> None:
    """FSDP2 or HSDP: the bits of backward(); step(), and no gradient outlives its bucket."""
    net, twin = fsdp(shape), fsdp(shape)
    released = FusedAdamW(net.parameters(), backend=backend, **OPTIONS)
    plain = FusedAdamW(twin.parameters(), backend=backend, **OPTIONS)
    alive: list[int] = []

    params = list(net.parameters())  # during backward the modules have others, unsharded

    def look(_: Tensor) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        alive.append(sum(g.to_local().numel() > 0 for g in grads))  # type: ignore[attr-defined]

    for p in params:
        p.register_post_accumulate_grad_hook(look)
    release = release_gradients(released, 1)
    for step in range(4):
        alive.clear()
        backward(net, step)
        assert len(alive) == 6
        assert max(alive) == 1, "each is updated before the next comes"
        assert all(p.grad is None for p in net.parameters())
        released.step()
        backward(twin, step)
        plain.step()
        assert_same(net, twin, released, plain)
    assert sum(map(len, release.buckets)) == 6


def accumulate_fsdp() -> None:
    """Micro-batches before the last keep their gradients in FSDP; or a module is called twice."""
    net, twin = fsdp(), fsdp()
    released, plain = (FusedAdamW(x.parameters(), **OPTIONS) for x in (net, twin))
    release_gradients(released, 1)
    for step in range(3):
        for model in (net, twin):
            for micro in range(3 if step < 2 else 1):
                torch.manual_seed(100 * step + 10 * micro + dist.get_rank())
                model.set_requires_gradient_sync(micro == 2 or step == 2)  # type: ignore[operator]
                x = torch.randn(3, 6, requires_grad=True)
                y = model(x) if step < 2 else model(x) * model(x.square())
                y.square().mean().backward()
        released.step()
        plain.step()
        plain.zero_grad()
        assert_same(net, twin, released, plain)
    net(torch.randn(3, 6)).sum().backward()
    with pytest.raises(RuntimeError, match="got a second gradient"):
        net(torch.randn(3, 6)).sum().backward()


def clip_fsdp() -> None:
    """The norm is that of all ranks, in step(): also where one of them has no gradient at all."""
    net, twin = fsdp(), fsdp()
    released, plain = (FusedAdamW(x.parameters(), max_grad_norm=0.05) for x in (net, twin))
    release_gradients(released, 1, clip_by_last_norm=True)
    for model, optimizer in ((net, released), (twin, plain)):
        backward(model, 0)
        optimizer.step()
    first, exact = released.metrics(), plain.metrics()
    torch.testing.assert_close(first["grad_norm"], exact["grad_norm"], rtol=1e-12, atol=0)
    assert first["clip_factor"] == 1
    backward(net, 1)
    released.step()
    # what the norm of the first step called for
    torch.testing.assert_close(
        released.metrics()["clip_factor"], exact["clip_factor"], rtol=1e-12, atol=0
    )
    released.step()
    assert released.metrics()["grad_norm"] == 0


def refused() -> None:
    """DDP; and gradients that are on their way to the CPU."""
    net = nn.parallel.DistributedDataParallel(Net())
    optimizer = FusedAdamW(net.parameters())
    with pytest.raises(RuntimeError, match="ranks would drift apart"):
        release_gradients(optimizer)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    offloaded = DTensor.from_local(torch.ones(3, device="meta"), mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match="CPUOffloadPolicy"):
        release_gradients(FusedAdamW([nn.Parameter(offloaded)]))


def local_models() -> None:
    """Plain models that no one reduces, a different one on each rank."""
    torch.manual_seed(dist.get_rank())
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    released, plain = (FusedAdamW(x.parameters(), **OPTIONS) for x in (net, twin))
    release_gradients(released, 1, local_gradients=True)
    for step in range(2):
        for model, optimizer in ((net, released), (twin, plain)):
            backward(model, step)
            optimizer.step()
        assert_same(net, twin, released, plain)


class Experts(nn.Module):
    """Two replicated scales, whose gradients are partial sums, around an expert of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        torch.manual_seed(1)
        everywhere = [Replicate()]
        for name in ("first", "last"):
            scale = DTensor.from_local(torch.randn(5), self.mesh, everywhere)
            self.register_parameter(name, nn.Parameter(scale))
        self.expert = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor, busy: bool) -> Tensor:
        """[rows of this rank, 5] -> []."""
        y = DTensor.from_local(x, self.mesh, [Shard(0)]) * self.first
        if busy:
            y = DTensor.from_local(y.to_local() * self.expert, self.mesh, [Shard(0)])
        z = y * self.last
        total: Tensor = z.to_local().square().sum()
        return total


def partial_gradients() -> None:
    """Ranks lay gradients out anew in one order, though a bucket waits on one of them only."""
    net, twin = Experts(), Experts()
    released, plain = (FusedAdamW(x.parameters(), **OPTIONS) for x in (net, twin))
    release = release_gradients(released, 2 * 5 * 4, local_gradients=True)
    for step in range(4):
        busy = step < 1 or dist.get_rank() == 0
        for model, optimizer in ((net, released), (twin, plain)):
            torch.manual_seed(10 * step + dist.get_rank())
            optimizer.zero_grad()
            model(torch.randn(3, 5), busy).backward()
            optimizer.step()
        assert_same(net, twin, released, plain)
    assert [len(bucket) for bucket in release.buckets] == [2, 1], "last and expert, first"


def no_collective_unless_clipped() -> None:
    """FSDP2's own are in backward; the end of an iteration asks other ranks for a norm alone."""
    net = fsdp()
    for clips in (False, True):
        limit = 0.05 if clips else None
        optimizer = FusedAdamW(net.parameters(), max_grad_norm=limit)
        with release_gradients(optimizer, clip_by_last_norm=clips):
            for step in range(2):
                backward(net, step)
                with collectives() as made:
                    optimizer.step()
                assert len(made) == clips


def one_rank() -> None:
    """DDP reduces there, too, and FSDP1's mixed precision has other params meanwhile."""
    mixed = MixedPrecision(param_dtype=torch.bfloat16)
    for use_orig_params in (False, True):
        flat = FullyShardedDataParallel(
            Net(),
            device_id=torch.device("cpu"),
            mixed_precision=mixed,
            use_orig_params=use_orig_params,
        )
        optimizer = FusedAdamW(flat.parameters())
        with pytest.raises(RuntimeError, match="excludes FSDP1"):
            release_gradients(optimizer, local_gradients=True)
    net = Net()
    optimizer = FusedAdamW(net.parameters())
    with pytest.raises(RuntimeError, match="be it of one rank: DDP"):
        release_gradients(optimizer)
    release_gradients(optimizer, local_gradients=True)
    backward(net, 0)
    optimizer.step()
    assert all(p.grad is None for p in net.parameters())


def not_finite_beside_copies() -> None:
    """HSDP's other copies learn of a norm that a plain gradient has made NaN."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    layout = [Replicate(), Shard(0)]
    sharded = nn.Parameter(distribute_tensor(torch.ones(8), mesh, layout))
    plain = nn.Parameter(torch.ones(4))
    optimizer = FusedAdamW([sharded, plain], max_grad_norm=1.0)
    release_gradients(optimizer, clip_by_last_norm=True, local_gradients=True)
    scale = torch.nan if dist.get_rank() == 0 else 1.0
    (sharded.sum().to_local() + scale * plain.sum()).backward()  # type: ignore[attr-defined]
    optimizer.step()
    assert optimizer.metrics()["grad_norm"].isnan()
