"""What each rank of tests/test_storage_across_ranks.py runs: formats of DTensors."""

from __future__ import annotations

from typing import Any

import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fused_adamw import FusedAdamW, storage


def whole(x: Tensor) -> Tensor:
    """All of a DTensor, on every rank; neither gloo nor NCCL knows int16."""
    if not isinstance(x, DTensor) or x.dtype != torch.int16:
        return ranks.whole(x)
    wide = DTensor.from_local(
        x.to_local().int(), x.device_mesh, x.placements, shape=x.shape, stride=x.stride()
    )
    return ranks.whole(wide).short()


def sharded_as_whole(options: dict[str, Any], shape: tuple[int, ...], backend: str) -> None:
    """Bits of params and states in every sharding are those of the whole params."""
    flat = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts = [
        (flat, [Shard(0)]),
        (flat, [Replicate()]),
        (grid, [Replicate(), Shard(1)]),
        (grid, [Shard(0), Shard(1)]),
        (grid, [Shard(0), Replicate()]),
    ]
    torch.manual_seed(5)
    wholes = [nn.Parameter(torch.randn(shape).bfloat16()) for _ in layouts]
    params = [
        nn.Parameter(distribute_tensor(p.detach().clone(), *layout))
        for p, layout in zip(wholes, layouts, strict=True)
    ]
    make: Any = FusedAdamW
    ours = make(params, lr=0.01, seed=3, backend=backend, **options)
    oracle = make(wholes, lr=0.01, seed=3, backend=backend, **options)
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, wholes, strict=True)):
            torch.manual_seed(10 * step + i)
            q.grad = torch.randn(shape).bfloat16()
            p.grad = distribute_tensor(q.grad, *layouts[i])
        ours.step()
        oracle.step()
    for i, (p, q) in enumerate(zip(params, wholes, strict=True)):
        assert torch.equal(whole(p.detach()), q.detach()), layouts[i]
        own, state = ours.state[p], oracle.state[q]
        assert own.keys() == state.keys(), layouts[i]
        for key, x in own.items():
            assert torch.equal(whole(x), state[key]), (layouts[i], key)
    saved = ours.state_dict()
    again = make(params, lr=0.01, **options)
    again.load_state_dict(saved)
    for p in params:
        for key, x in ours.state[p].items():
            assert torch.equal(whole(again.state[p][key]), whole(x)), key


def rows_that_are_no_blocks() -> None:
    """A DTensor whose blocks the sharding would cut keeps float32 moments, and says so."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.randn(6, 70), mesh, [Shard(0)]))
    q = nn.Parameter(distribute_tensor(torch.randn(6, 128), mesh, [Shard(0)]))
    optimizer = FusedAdamW([p, q], state_dtype="int8")
    for x in (p, q):
        x.grad = distribute_tensor(torch.ones(x.shape), mesh, [Shard(0)])
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    assert optimizer.state[q]["exp_avg_q"].dtype == torch.uint8
    assert "exp_avg float32, exp_avg_sq float32: 1 parameters" in repr(optimizer)
    assert {"exp_avg float32", "exp_avg_q uint8"} <= optimizer.memory().keys()


class Net(nn.Module):
    """Rows of whole blocks, and of none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(128, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 128] -> [batch, 3]."""
        y: Tensor = self.last(self.first(x))
        return y


def checkpoint(options: dict[str, Any]) -> None:
    """torch.distributed.checkpoint's dicts under FSDP2: bit-exact, also gathered whole and back."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    def build() -> tuple[nn.Module, FusedAdamW]:
        torch.manual_seed(1)
        net = Net().bfloat16()
        fully_shard(net)
        make: Any = FusedAdamW
        return net, make(net.parameters(), lr=0.01, **options)

    def backward(net: nn.Module, step: int) -> None:
        torch.manual_seed(step)
        net.zero_grad()
        net(torch.randn(4, 128).bfloat16()).square().mean().backward()

    net, optimizer = build()
    for step in range(2):
        backward(net, step)
        optimizer.step()
    for full in (False, True) if "master_weights" not in options else (False,):
        how = StateDictOptions(full_state_dict=full)
        saved = get_optimizer_state_dict(net, optimizer, options=how)
        other, loaded = build()
        set_optimizer_state_dict(other, loaded, saved, options=how)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert optimizer.state[p].keys() == loaded.state[q].keys()
            for name in ("exp_avg", "exp_avg_sq"):
                a = storage.decoded(name, {k: whole(x) for k, x in optimizer.state[p].items()})
                b = storage.decoded(name, {k: whole(x) for k, x in loaded.state[q].items()})
                assert a is not None
                assert b is not None
                assert torch.equal(a, b), (name, full)
