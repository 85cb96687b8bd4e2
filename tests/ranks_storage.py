"""What each rank of tests/test_storage_across_ranks.py runs: formats of DTensors, FSDP1, ZeRO-1."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from truth import same_bits

from fused_adamw import FusedAdamW, storage
from fused_adamw.shards import local


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
            assert same_bits(whole(x), state[key]), (layouts[i], key)
    saved = ours.state_dict()
    again = make(params, lr=0.01, **options)
    again.load_state_dict(saved)
    for p in params:
        for key, x in ours.state[p].items():
            assert same_bits(whole(again.state[p][key]), whole(x)), key


def same_keys_in_every_sharding() -> None:
    """What is in 8 bits is decided by the whole param; but a row is not cut within a block."""
    line = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts = [
        (line, [Shard(0)]),
        (line, [Replicate()]),
        (line, [Shard(1)]),
        (grid, [Shard(0), Shard(1)]),
        (grid, [Shard(1), Replicate()]),
    ]
    cut = (line, [Shard(1)])
    for shape, quantised in (((5, 256), True), ((6, 70), False), ((3, 8, 32), True), ((9,), False)):
        fitting = layouts if len(shape) > 1 else layouts[:2]
        params = [nn.Parameter(distribute_tensor(torch.ones(shape), *x)) for x in fitting]
        params.append(nn.Parameter(torch.ones(shape)))
        if shape == (5, 256):
            params.append(nn.Parameter(distribute_tensor(torch.ones(5, 128), *cut)))
        optimizer = FusedAdamW(params, state_dtype="int8")
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p in params:
            kept = "exp_avg_q" in optimizer.state[p] and "exp_avg_sq_q" in optimizer.state[p]
            assert kept == (quantised and p.shape != (5, 128)), (shape, p)
    assert "exp_avg float32, exp_avg_sq float32: 3 parameters" in repr(optimizer)
    # column-major, of 4 + 1 rows on 4 ranks: those of a single row are contiguous as well
    rows = 2 if dist.get_rank() == 0 else 1
    part = torch.ones(64, rows).t()
    p = nn.Parameter(
        DTensor.from_local(part, line, [Shard(0)], shape=torch.Size((5, 64)), stride=(1, 5))
    )
    optimizer = FusedAdamW([p], state_dtype=("int8", None))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def fsdp2_over_tensor_parallelism() -> None:
    """Rows cut twice are 8 bits, too, and their bits those of the whole param."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = nn.Sequential(nn.Linear(128, 6), nn.Linear(6, 128))
    net = parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(net, mesh=mesh["dp"])
    p = net[0].weight
    q = nn.Parameter(whole(p.detach()).clone())
    ours, oracle = (FusedAdamW([x], lr=0.01, state_dtype="int8") for x in (p, q))
    for step in range(2):
        torch.manual_seed(step)
        q.grad = torch.randn(6, 128)
        p.grad = distribute_tensor(q.grad, mesh["tp"], [Shard(0)])
        first = 2 * mesh.get_local_rank("dp")  # 3 rows on 2 ranks
        part = local(p.grad)[first : first + len(local(p))]
        p.grad = DTensor.from_local(
            part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        ours.step()
        oracle.step()
    assert torch.equal(whole(p.detach()), q.detach())
    for key, x in oracle.state[q].items():
        assert same_bits(whole(ours.state[p][key]), x), key
    assert "exp_avg_q" in ours.state[p]


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


def fsdp2(options: dict[str, Any]) -> tuple[nn.Module, FusedAdamW]:
    """A bfloat16 model of 5 and 3 rows: some ranks have fewer of them, some none."""
    torch.manual_seed(1)
    net = Net().bfloat16()
    fully_shard(net)
    make: Any = FusedAdamW
    return net, make(net.parameters(), lr=0.01, **options)


def step_alike(optimizer: FusedAdamW, step: int) -> None:
    """A step with gradients that do not depend on the number of ranks."""
    torch.manual_seed(step)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = distribute_tensor(
            torch.randn(p.shape).bfloat16(), p.device_mesh, p.placements, src_data_rank=None
        )
    optimizer.step()


def awkward(shape: torch.Size) -> Tensor:
    """Remainders that look like infinity, NaN of both kinds, and numbers."""
    bits = torch.arange(shape.numel()) * 51 + 0x7F80
    return bits.to(torch.int16).view(torch.bfloat16).view(shape)


def put_awkward_remainders(optimizer: FusedAdamW) -> None:
    for p, state in optimizer.state.items():
        if "master_remainder" in state:
            x = local(state["master_remainder"])
            given = distribute_tensor(awkward(p.shape), p.device_mesh, p.placements)  # type: ignore[attr-defined]
            x.view(torch.int16).copy_(local(given).view(torch.int16))


def checkpoint(options: dict[str, Any]) -> None:
    """torch.distributed.checkpoint's dicts under FSDP2: bit-exact, also gathered whole and back."""
    net, optimizer = fsdp2(options)
    for step in range(2):
        step_alike(optimizer, step)
    put_awkward_remainders(optimizer)
    for full in (False, True):
        how = StateDictOptions(full_state_dict=full)
        saved = get_optimizer_state_dict(net, optimizer, options=how)
        other, loaded = fsdp2(options)
        set_optimizer_state_dict(other, loaded, saved, options=how)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert optimizer.state[p].keys() == loaded.state[q].keys()
            for key, x in optimizer.state[p].items():
                assert same_bits(local(x), local(loaded.state[q][key])), (key, full)


def save_whole(folder: Path, options: dict[str, Any]) -> None:
    """Train two steps, leave the whole state in a file of rank 0, then train a third."""
    net, optimizer = fsdp2(options)
    for step in range(2):
        step_alike(optimizer, step)
    put_awkward_remainders(optimizer)
    how = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(net, optimizer, options=how)
    before = {name: whole(p.detach()) for name, p in net.named_parameters()}
    if dist.get_rank() == 0:  # before the step: torch leaves what is on the CPU where it is
        torch.save((saved, before), folder / "whole.pt")
    step_alike(optimizer, 2)
    after = {name: whole(p.detach()) for name, p in net.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(after, folder / "after.pt")


def load_whole(folder: Path, options: dict[str, Any]) -> None:
    """Rank 0 reads it and sends each rank its part; the third step is theirs, to the bit."""
    saved, before = torch.load(folder / "whole.pt", weights_only=True)
    after = torch.load(folder / "after.pt", weights_only=True)
    net, optimizer = fsdp2(options)
    for name, p in net.named_parameters():
        p.data.copy_(distribute_tensor(before[name], p.device_mesh, p.placements))  # type: ignore[attr-defined]
    set_optimizer_state_dict(
        net,
        optimizer,
        saved if dist.get_rank() == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    for name, p in net.named_parameters():
        state, expected = optimizer.state[p], saved["state"][name]
        assert state.keys() == expected.keys()
        for key, x in state.items():
            assert same_bits(whole(x), expected[key]), (name, key)
        if "master_remainder" in state:
            assert same_bits(expected["master_remainder"], awkward(p.shape))
    step_alike(optimizer, 2)
    for name, p in net.named_parameters():
        assert torch.equal(whole(p.detach()), after[name]), name


def backward(net: nn.Module, step: int) -> None:
    torch.manual_seed(10 * step + dist.get_rank())
    net.zero_grad()
    net(torch.randn(4, 128).bfloat16()).square().mean().backward()


def fsdp1() -> None:
    """FSDP1's own dict has remainders and moments of any dtype whole; 8-bit ones it refuses."""

    def build(options: dict[str, Any]) -> tuple[nn.Module, FusedAdamW]:
        torch.manual_seed(1)
        net = FullyShardedDataParallel(Net().bfloat16(), device_id=torch.device("cpu"))
        make: Any = FusedAdamW
        return net, make(net.parameters(), lr=0.01, master_weights=True, **options)

    get = FullyShardedDataParallel.optim_state_dict
    for options in ({}, {"state_dtype": torch.float32}):
        net, optimizer = build(options)
        for step in range(2):
            backward(net, step)
            optimizer.step()
        state = next(iter(optimizer.state.values()))
        bits = state["master_remainder"].view(torch.int16)
        bits.copy_(awkward(bits.shape).view(torch.int16))
        saved = get(net, optimizer)
        other, loaded = build(options)
        loaded.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(other, loaded, saved)
        )
        again = next(iter(loaded.state.values()))
        assert state.keys() == again.keys()
        for key, x in state.items():
            # 663 elements: the 332nd of rank 1 is padding
            assert same_bits(x.view(-1)[:331], again[key].view(-1)[:331]), key
    storage.FLAT_VECTOR = 1  # a short one will do
    net, optimizer = build({"state_dtype": "int8"})
    backward(net, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="invalid tensor size"):
        get(net, optimizer)


def zero1(options: dict[str, Any]) -> None:
    """ZeRO-1's consolidated state is loaded by another one, which goes on with the same bits."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns, which pytest refuses

    def build() -> tuple[nn.Module, ZeroRedundancyOptimizer]:
        torch.manual_seed(1)
        net = Net().bfloat16()
        return net, ZeroRedundancyOptimizer(net.parameters(), FusedAdamW, lr=0.01, **options)

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        torch.manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape).bfloat16()
        optimizer.step()

    net, optimizer = build()
    for step in range(2):
        train(net, optimizer, step)
    for state in optimizer.optim.state.values():
        bits = state["master_remainder"].view(torch.int16)
        bits.copy_(awkward(bits.shape).view(torch.int16))
    optimizer.consolidate_state_dict(to=0)
    sent = [optimizer.state_dict() if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(sent)
    other, loaded = build()
    other.load_state_dict(net.state_dict())
    loaded.load_state_dict(copy.deepcopy(sent[0]))  # ZeRO takes over the tensors themselves
    train(net, optimizer, 2)
    train(other, loaded, 2)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        state, again = optimizer.optim.state.get(p, {}), loaded.optim.state.get(q, {})
        assert state.keys() == again.keys()
        for key, x in state.items():
            assert same_bits(x, again[key]), key
