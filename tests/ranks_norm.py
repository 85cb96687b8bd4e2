"""What each rank of tests/test_norm_across_ranks.py runs: spawned processes import it by name."""

from __future__ import annotations

import copy
import functools
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import OPTIONS, Net, Whole, backward, fsdp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from fused_adamw import FusedAdamW
from fused_adamw.kernels.front import Front
from fused_adamw.shards import local


def over_tensor_parallelism() -> None:
    """FSDP2 over tensor parallelism: params are strided shards, which count over both meshes."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(net, mesh=mesh["dp"])
    optimizer = FusedAdamW(net.parameters(), max_grad_norm=0.05, **OPTIONS)
    oracle = Whole(list(net.parameters()), max_grad_norm=0.05)
    for step in range(3):
        torch.manual_seed(10 * step + mesh["dp"].get_local_rank())
        net.zero_grad()
        net(torch.randn(3, 6)).square().mean().backward()
        oracle.step(0.05)
        optimizer.step()
        oracle.check_closely(optimizer)
        assert 0 < optimizer.metrics()["clip_factor"] < 1


@contextmanager
def collectives() -> Iterator[list[tuple[list[int], int]]]:
    """The all-reduces made meanwhile: ranks of the group, and number of elements."""
    made: list[tuple[list[int], int]] = []
    real = dist.all_reduce

    def noted(x: Tensor, *arguments: Any, group: Any = None, **options: Any) -> Any:
        made.append((dist.get_process_group_ranks(group), x.numel()))
        return real(x, *arguments, group=group, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", noted)
        yield made


def one_collective_a_group() -> None:
    """However many layouts there are on a mesh, each of its groups is asked once a step."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts: list[list[Any]] = [
        [Shard(0), Shard(1)],
        [Shard(0), Replicate()],
        [Replicate(), Shard(0)],
        [Replicate(), Replicate()],
    ]
    params = [nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, x)) for x in layouts]
    optimizer = FusedAdamW(params, max_grad_norm=1.0)
    for p, x in zip(params, layouts, strict=True):
        p.grad = distribute_tensor(torch.ones(4, 4), mesh, x)
    with collectives() as made:
        optimizer.step()
    groups = [dist.get_process_group_ranks(mesh.get_group(i)) for i in range(2)]
    assert made == [(groups[0], 2), (groups[1], 2)]
    assert optimizer.metrics()["grad_norm"].item() == 8.0


def pipeline_stages() -> None:
    """Stages of two ranks each: DTensors count over their own mesh, then over the stages."""
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("pp", "dp"))
    stage = rank // 2
    # the first stage has an embedding besides, so that layouts and their order differ by stage
    layouts: list[Any] = [Shard(0)] if stage else [Replicate(), Shard(0)]
    params: list[Tensor] = [
        nn.Parameter(distribute_tensor(torch.ones(6), mesh["dp"], [x])) for x in layouts
    ]
    optimizer = FusedAdamW(params, max_grad_norm=1.0, grad_norm_group=mesh["pp"].get_group())
    for p, x in zip(params, layouts, strict=True):
        p.grad = distribute_tensor(torch.full((6,), stage + 1.0), mesh["dp"], [x])
    with collectives() as made:
        optimizer.step()
    exact = (6 * (1 + 1) + 6 * 4) ** 0.5
    assert optimizer.metrics()["grad_norm"].item() == exact
    across = dist.get_process_group_ranks(mesh["pp"].get_group())
    assert [ranks for ranks, _ in made].count(across) == 1
    assert made[-1][0] == across, "last, whatever the stage holds"

    optimizer.grad_norm_group = dist.group.WORLD  # a part of which are the ranks of the mesh
    with pytest.raises(ValueError, match="some of these hold parts of it"):
        optimizer.step()


def mesh_of_other_ranks() -> None:
    """A rank that a mesh does not have cannot know the part that lies there, but for a group."""
    world = init_device_mesh("cpu", (dist.get_world_size(),))
    first = DeviceMesh("cpu", [0])
    params = [
        nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)])) for mesh in (world, first)
    ]
    optimizer = FusedAdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.max_grad_norm = 1.0
    if dist.get_rank():
        with pytest.raises(ValueError, match="Pass a grad_norm_group that has this rank"):
            optimizer.step()
    optimizer.grad_norm_group = dist.group.WORLD
    optimizer.step()
    assert optimizer.metrics()["grad_norm"].item() == 4.0

    p = nn.Parameter(distribute_tensor(torch.ones(8), DeviceMesh("cpu", [0, 1]), [Shard(0)]))
    optimizer = FusedAdamW([p], max_grad_norm=1.0, grad_norm_group=dist.group.WORLD)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="some of these hold parts of it"):  # on all ranks
        optimizer.step()
    q = nn.Parameter(torch.ones(2))
    alone = FusedAdamW([q], max_grad_norm=1.0, grad_norm_group=dist.new_group([0]))
    q.grad = torch.ones(2)
    if dist.get_rank():
        with pytest.raises(ValueError, match="want a process group that has this rank"):
            alone.step()
    else:
        alone.step()


def group_over_the_mesh_itself() -> None:
    """DTensors on the given group's ranks are whole by themselves; plain parts are added to them.

    The group may be set, and taken away, between steps; a copy keeps it.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    replica = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    params: list[Tensor] = [sharded, replica, nn.Parameter(torch.ones(4))]
    optimizer = FusedAdamW(params, max_grad_norm=1.0)
    for p in params:
        p.grad = torch.ones_like(p)
    seen = []
    for group in (None, dist.group.WORLD, None):
        optimizer.grad_norm_group = group
        optimizer.step()
        seen.append(optimizer.metrics()["grad_norm"].item() ** 2)
    parts = dist.get_world_size()
    assert seen == pytest.approx([12, 8 + 4 * parts, 12])

    optimizer.grad_norm_group = dist.group.WORLD
    twin = copy.deepcopy(optimizer)
    assert twin.grad_norm_group is dist.group.WORLD
    assert (twin.max_grad_norm, len(twin.state)) == (1.0, 3)
    assert twin.param_groups[0]["params"][0] is not sharded


def zero_redundancy(one_param: bool) -> None:
    """ZeRO-1 with the norm of all ranks, also where a rank has been given no param at all.

    The options go in by partial(): keywords would make ZeRO put them, a process group among them,
    into param_groups, and so into checkpoints, which cannot be saved then.
    """
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when imported

    wrapped = DistributedDataParallel(nn.Linear(6, 5, bias=False) if one_param else Net())
    clipped = functools.partial(FusedAdamW, max_grad_norm=0.05, grad_norm_group=dist.group.WORLD)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), optimizer_class=clipped, **OPTIONS)
    oracle = Whole(list(wrapped.parameters()), max_grad_norm=0.05)
    for step in range(3):
        backward(wrapped, step)
        oracle.step(0.05)
        optimizer.step()
        oracle.check_closely(optimizer)
    optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), io.BytesIO())


def fsdp1(use_orig_params: bool) -> None:
    """FSDP1's flat params, clipped in the step, against its own clip_grad_norm_."""
    nets = [Net() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours_net, their_net = (
        FullyShardedDataParallel(
            net, device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        for net in nets
    )
    ours = FusedAdamW(
        ours_net.parameters(), max_grad_norm=0.05, grad_norm_group=dist.group.WORLD, **OPTIONS
    )
    theirs = torch.optim.AdamW(their_net.parameters(), **OPTIONS)
    for step in range(3):
        backward(ours_net, step)
        backward(their_net, step)
        ours.step()
        norm = their_net.clip_grad_norm_(0.05)
        theirs.step()
        torch.testing.assert_close(ours.metrics()["grad_norm"], norm.double(), rtol=1e-6, atol=0)
        for p, q in zip(ours_net.parameters(), their_net.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def sharded_grad_scaler(unscale_first: bool) -> None:
    """An overflow on one rank: all skip and lower their scale.

    torch's ShardedGradScaler adds up what ranks have found in unscale_() alone: the user calls it,
    or step() does with fused=False.
    """
    scaler = ShardedGradScaler("cpu", init_scale=8.0)
    p = nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([p], fused=None if unscale_first else False)
    for overflow in (True, False):
        p.grad = torch.full((3,), 8.0)
        if overflow and dist.get_rank() == 1:
            p.grad[0] = torch.inf
        scaler.scale(torch.ones(()))
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4.0
        assert torch.equal(p, torch.ones(3)) == overflow


def grad_scaler_of_fsdp1(use_orig_params: bool) -> None:
    """Its scaler unscales by itself, so that all learn of an overflow; beside torch's default.

    Params that stay what they are may be wrapped when the optimizer is there.
    """
    nets = [Net() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    options: dict[str, Any] = {"max_grad_norm": 1e9, "grad_norm_group": dist.group.WORLD}
    early = FusedAdamW(nets[0].parameters(), **OPTIONS, **options)
    wrapped = [
        FullyShardedDataParallel(
            net, device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        for net in nets
    ]
    late = FusedAdamW(wrapped[0].parameters(), **OPTIONS, **options)
    optimizers = [
        early if use_orig_params else late,
        torch.optim.AdamW(wrapped[1].parameters(), **OPTIONS),
    ]
    scalers = [ShardedGradScaler("cpu", init_scale=8.0) for _ in wrapped]
    for step in range(4):
        for net, optimizer, scaler in zip(wrapped, optimizers, scalers, strict=True):
            torch.manual_seed(10 * step + dist.get_rank())
            optimizer.zero_grad()
            scaler.scale(net(torch.randn(3, 6)).square().mean()).backward()
            if step == 1 and dist.get_rank() == 1:
                grads = [p.grad for p in net.parameters() if p.grad is not None]
                next(g for g in grads if g.numel()).view(-1)[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        assert [scaler.get_scale() for scaler in scalers] == [8.0 if step < 1 else 4.0] * 2
        for p, q in zip(*(net.parameters() for net in wrapped), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def one_launch_for_all_meshes() -> None:
    """Of the norm, on four ranks: over both dimensions, over one, over none, and plain."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts = [[Shard(0), Shard(1)], [Shard(0), Replicate()], [Replicate(), Shard(0)]]
    params: list[Tensor] = [
        nn.Parameter(distribute_tensor(torch.ones(4, 4), grid, layout)) for layout in layouts
    ]
    params.append(nn.Parameter(torch.ones(3)))
    optimizer = FusedAdamW(params, max_grad_norm=1.0, backend="triton")
    launched = []
    launch = Front.launch

    def noted(self: Front, kernel: Any, *rest: Any) -> Any:
        launched.append(kernel.fn.__name__)
        return launch(self, kernel, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Front, "launch", noted)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, i + 1.0)
            optimizer.step()
            assert launched == ["_sum_squares", "_schedule", "_adamw"] * (step + 1)
            squares = 16 * (1 + 4 + 9) + 3 * 16.0
            norm = optimizer.metrics()["grad_norm"]
            torch.testing.assert_close(norm, torch.tensor(squares).double().sqrt())


def found_inf_on_one_rank(backend: str, plain: bool) -> None:
    """What one rank's scaler has found skips the step on all that share the norm."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = torch.ones(8)
    p = nn.Parameter(values if plain else distribute_tensor(values, mesh, [Shard(0)]))
    group = dist.group.WORLD if plain else None
    optimizer: Any = FusedAdamW([p], backend=backend, max_grad_norm=1.0, grad_norm_group=group)  # type: ignore[arg-type]
    optimizer.grad_scale = torch.tensor(8.0)
    for found in (0.0, 1.0, 0.0):
        p.grad = torch.ones_like(p)
        before = local(p.detach()).clone()
        optimizer.found_inf = torch.tensor(found * dist.get_rank())
        optimizer.step()
        assert torch.equal(local(p.detach()), before) == (found > 0)
    assert optimizer.metrics()["skipped_steps"].item() == 1
    assert optimizer.state[p]["step"].item() == 2


def not_finite_on_one_rank(backend: str, value: float, given: bool) -> None:
    """Beside DTensors, a plain gradient that only one rank finds not finite is news to all.

    Without skip_nonfinite all clip by the same factor: by NaN, or by 0 for infinity.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
    plain = nn.Parameter(torch.ones(4))
    optimizer = FusedAdamW([sharded, plain], backend=backend, max_grad_norm=1.0)  # type: ignore[arg-type]
    optimizer.grad_norm_group = dist.group.WORLD if given else None
    for skip in (True, False):
        optimizer.skip_nonfinite = skip
        sharded.grad = torch.ones_like(sharded)
        plain.grad = torch.full((4,), 1.0 if dist.get_rank() else value)
        optimizer.step()
        assert torch.equal(local(sharded.detach()), torch.ones(4)) == skip
        assert torch.equal(plain, torch.ones(4)) == skip
        metrics = optimizer.metrics()
        assert metrics["skipped_steps"].item() == 1
        factor = metrics["clip_factor"].item()
        assert math.isnan(factor) if math.isnan(value) else factor == 0


def not_finite_on_one_of_four() -> None:
    """The same where no process group has all ranks: the news goes from one mesh to the next."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts: list[list[Any]] = [[Shard(0), Replicate()], [Replicate(), Shard(0)]]
    for bad in range(2):
        params = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, x)) for x in layouts]
        optimizer: Any = FusedAdamW(params, skip_nonfinite=True)
        for found in (False, True):  # in a gradient, then by the scaler
            for i, p in enumerate(params):
                p.grad = torch.ones_like(p)
                if i == bad and dist.get_rank() == 1 and not found:
                    local(p.grad).fill_(math.nan)
            optimizer.found_inf = torch.tensor(float(found and dist.get_rank() == 1))
            optimizer.step()
            assert all(torch.equal(local(p.detach()), torch.ones_like(local(p))) for p in params)
        assert optimizer.metrics()["skipped_steps"].item() == 2


def not_finite_beside_copies(backend: str) -> None:
    """HSDP's other copies are told what a plain gradient or a scaler has found."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    layout = [Replicate(), Shard(0)]
    sharded = nn.Parameter(distribute_tensor(torch.ones(8), mesh, layout))
    plain = nn.Parameter(torch.ones(4))
    bad = dist.get_rank() == 0
    for params, found, collectives_made in (
        ([sharded, plain], None, 2),
        ([sharded, plain], 0.0, 2),
        ([sharded], 2.0, 2),
        ([sharded], None, 2),
    ):
        optimizer: Any = FusedAdamW(params, backend=backend, skip_nonfinite=True)  # type: ignore[arg-type]
        sharded.grad, plain.grad = torch.ones_like(sharded), torch.ones(4)
        skips = found is None and len(params) == 2
        if skips and bad:
            plain.grad[0] = torch.nan
        if found is not None:
            optimizer.found_inf = torch.tensor(found * bad)
            skips = found > 0
        before = local(sharded.detach()).clone()
        with collectives() as made:
            optimizer.step()
        assert len(made) == collectives_made
        assert torch.equal(local(sharded.detach()), before) == skips
        assert optimizer.metrics()["skipped_steps"].item() == skips
    # what else a rank holds, others need not: none waits
    own: list[Tensor] = [sharded, plain] if bad else [sharded]
    for group in (None, dist.group.WORLD):
        optimizer = FusedAdamW(own, backend=backend, max_grad_norm=1.0, grad_norm_group=group)  # type: ignore[arg-type]
        sharded.grad, plain.grad = torch.ones_like(sharded), torch.ones(4)
        optimizer.step()
    # each copy's own experts are on another mesh; params that are nothing but copies
    expert = nn.Parameter(distribute_tensor(torch.ones(4), mesh["shards"], [Shard(0)]))
    replica = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate(), Replicate()]))
    for params, odd in (([sharded, expert], expert), ([replica], replica)):
        optimizer = FusedAdamW(params, backend=backend, skip_nonfinite=True)  # type: ignore[arg-type]
        for p in params:
            p.grad = torch.ones_like(p)
        assert odd.grad is not None
        local(odd.grad).fill_(math.nan if bad else 1.0)
        optimizer.step()
        assert optimizer.metrics()["skipped_steps"].item() == 1
    # a mesh without this rank has no groups here
    first = DeviceMesh("cpu", [0, 1])
    alone = nn.Parameter(distribute_tensor(torch.ones(4), first, [Replicate()]))
    optimizer = FusedAdamW([alone, plain], max_grad_norm=1.0)
    optimizer.grad_norm_group = mesh["copies"].get_group()
    plain.grad = torch.ones(4)
    optimizer.step()
    # a group is told what one copy has found
    optimizer = FusedAdamW([sharded], skip_nonfinite=True, grad_norm_group=dist.group.WORLD)
    sharded.grad = torch.ones_like(sharded)
    local(sharded.grad).fill_(math.nan if bad else 1.0)
    optimizer.step()
    assert optimizer.metrics()["skipped_steps"].item() == 1


def error_on_one_rank() -> None:
    """What raises on one rank before its step has changed nothing, and it can step again.

    The other waits in its step for this one's part of the norm, and goes on with it.
    """
    net = fsdp()
    optimizer = FusedAdamW(net.parameters(), max_grad_norm=0.05, **OPTIONS)
    oracle = Whole(list(net.parameters()), max_grad_norm=0.05)
    p = next(net.parameters())
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()))

    def broken(*_: object) -> None:
        raise OSError("the disk is full")

    def values() -> list[Tensor]:
        states = [x for s in optimizer.state.values() for x in s.values()]
        return [local(x.detach()).clone() for x in (*net.parameters(), *states)]

    for step in range(3):
        backward(net, step)
        oracle.step(0.05)
        if dist.get_rank() == 1:
            before = values()
            hook = optimizer.register_step_pre_hook(broken)
            with pytest.raises(OSError, match="the disk is full"):
                optimizer.step()
            hook.remove()
            grad = p.grad
            assert isinstance(grad, DTensor)
            p.grad = DTensor.from_local(
                local(grad),
                mesh,
                [Replicate(), Shard(0)],
                run_check=False,
                shape=p.shape,
                stride=p.stride(),
            )
            with pytest.raises(TypeError, match="Assign a DTensor of the param's mesh"):
                optimizer.step()
            p.grad = grad
            assert all(torch.equal(a, b) for a, b in zip(values(), before, strict=True))
        optimizer.step()
        oracle.check_closely(optimizer)
