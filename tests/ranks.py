"""What each rank of tests/test_distributed.py runs: spawned processes import it by name."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from twins import TORCH_VERSION

from fused_adamw import FusedAdamW

OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}

OLDEST_LACKS = {  # what torch 2.6 says, and what it has not
    "'Stream' object has no attribute 'record_event'": "FSDP2 on a CPU",
    "unexpected keyword argument 'src_data_rank'": "distribute_tensor without a collective",
    "FSDP+TP sharding does not support uneven sharding": "uneven shards of shards",
}

# Ranks are forked from a process that has imported what takes long: seconds for each, otherwise.
multiprocessing.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "fused_adamw.kernels.adamw",
        "triton.runtime.interpreter",
    ]
)


def on_ranks(world: int, scenario: Callable[..., None], *arguments: object) -> None:
    """Run a scenario on ranks that talk through gloo; a failed one raises, or skips, here."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(  # type: ignore[no-untyped-call]
                _rank,
                (world, Path(folder, "store"), scenario, arguments),
                nprocs=world,
                start_method="forkserver",
            )
        except mp.ProcessRaisedException as error:
            lacks = OLDEST_LACKS if TORCH_VERSION < (2, 7) else {}
            for word, what in lacks.items():
                if word in str(error):
                    pytest.skip(f"torch {torch.__version__} has no {what}")
            raise


def need_interpreter(backend: str) -> None:
    """Skip a test whose ranks would run the kernels as compiled: theirs are CPU tensors."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("CPU tensors run on the kernels under the interpreter alone")


def in_turn(scenarios: Sequence[tuple[Any, ...]]) -> None:
    """Several scenarios, each with its arguments, by the same processes."""
    for scenario, *arguments in scenarios:
        torch.manual_seed(0)
        scenario(*arguments)


def _rank(
    rank: int, world: int, store: Path, scenario: Callable[..., None], arguments: Sequence[object]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Ranks have CPU tensors. Beside a GPU torch 2.11 takes it for theirs, and crashes when it
    # gathers a state dict.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if architecture := os.environ.get("FUSED_ADAMW_PTX"):  # left by conftest.py, for us
        import ptx_device

        ptx_device.Device(pytest.MonkeyPatch(), architecture)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=2),  # of a collective that another rank never comes to
    )
    scenario(*arguments)
    dist.barrier()
    dist.destroy_process_group()
    # Not by way of Python's end: a thread of gloo may still wait for the GIL to drop the tensor of
    # the last collective. Python, up to 3.13, then ends the thread, through a destructor that must
    # not throw, and the process aborts: one in 7 to 25 (torch 2.13, "terminate called without an
    # active exception"). destroy_process_group() does not join that thread.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def whole(x: Tensor) -> Tensor:
    """All of a DTensor, on every rank."""
    return x.full_tensor() if isinstance(x, DTensor) else x


class Whole:
    """FusedAdamW on whole copies of the params: AdamW goes by elements, so bits must agree."""

    def __init__(self, params: Sequence[Tensor], **options: object) -> None:
        self.sources = list(params)
        self.params = [nn.Parameter(whole(p.detach()).clone()) for p in params]
        self.optimizer = FusedAdamW(self.params, **{**OPTIONS, **options})
        self.torchs = [nn.Parameter(p.detach().clone()) for p in self.params]
        self.torch = torch.optim.AdamW(self.torchs, **OPTIONS)

    def step(self, max_norm: float | None = None) -> None:
        """A step with the whole gradients of the sources, clipped in torch's if asked for."""
        for source, p, q in zip(self.sources, self.params, self.torchs, strict=True):
            p.grad = None if source.grad is None else whole(source.grad).clone()
            q.grad = None if p.grad is None else p.grad.clone()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(self.torchs, max_norm)
        self.optimizer.step()
        self.torch.step()

    def check_closely(self, optimizer: torch.optim.Optimizer) -> None:
        """Params are those of the whole one and of torch's, but for the order of a sum."""
        for source, p, q in zip(self.sources, self.params, self.torchs, strict=True):
            torch.testing.assert_close(whole(source.detach()), p.detach(), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Params and states of the sharded optimizer are those of the whole one, to the bit."""
        for source, p, q in zip(self.sources, self.params, self.torchs, strict=True):
            assert torch.equal(whole(source.detach()), p.detach())
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            own, state = optimizer.state.get(source, {}), self.optimizer.state.get(p, {})
            assert own.keys() == state.keys()
            for key, x in own.items():
                assert torch.equal(whole(x), state[key]), key
                if key != "step" and isinstance(source, DTensor):
                    assert isinstance(x, DTensor)
                    assert x.placements == source.placements


def clip_across_ranks(shape: tuple[int, ...], backend: str) -> None:
    """FSDP2 or HSDP with max_grad_norm: the norm is that of the whole, replicas counted once."""
    net = fsdp(shape)
    optimizer = FusedAdamW(net.parameters(), max_grad_norm=0.05, backend=backend, **OPTIONS)  # type: ignore[arg-type]
    oracle = Whole(list(net.parameters()), max_grad_norm=0.05)
    for step in range(3):
        backward(net, step)
        oracle.step(0.05)
        optimizer.step()
        oracle.check_closely(optimizer)
        assert 0 < optimizer.metrics()["clip_factor"] < 1
        both = [x.metrics()["grad_norm"] for x in (optimizer, oracle.optimizer)]
        torch.testing.assert_close(*both, rtol=1e-12, atol=0)


def clip_mixed_placements() -> None:
    """Each mesh and placement is added over its own ranks, plain tensors over none."""
    world = dist.get_world_size()
    flat = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    layouts = [
        (flat, [Shard(0)]),
        (flat, [Replicate()]),
        (grid, [Replicate(), Shard(1)]),
        (grid, [Shard(0), Shard(1)]),
    ]
    params: list[Tensor] = [
        nn.Parameter(distribute_tensor(torch.randn(5, 6), mesh, layout)) for mesh, layout in layouts
    ]
    params.append(nn.Parameter(torch.randn(3)))
    optimizer = FusedAdamW(params, max_grad_norm=0.5, **OPTIONS)
    oracle = Whole(params, max_grad_norm=0.5)
    for step in range(2):
        torch.manual_seed(step)
        for p, layout in zip(params, layouts, strict=False):
            p.grad = distribute_tensor(torch.randn(5, 6), *layout)
        params[-1].grad = torch.randn(3)
        oracle.step(0.5)
        optimizer.step()
        oracle.check_closely(optimizer)


def skip_on_all_ranks() -> None:
    """NaN in a shard of one rank: no rank updates, and all count it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Shard(0)]))
    optimizer = FusedAdamW([p], skip_nonfinite=True)
    for bad in (False, True, False):
        local = torch.ones(8 // dist.get_world_size())
        if bad and dist.get_rank() == 1:
            local[0] = torch.nan
        p.grad = DTensor.from_local(local, mesh, [Shard(0)])
        optimizer.step()
    assert optimizer.metrics()["skipped_steps"].item() == 1
    assert optimizer.state[p]["step"].item() == 2
    assert p.full_tensor().isfinite().all()


def plain_parts_need_a_group() -> None:
    """Plain tensors of which each rank has a part are clipped by the norm of all with a group."""
    whole_grad = torch.arange(1.0, 9.0)
    part = whole_grad.chunk(dist.get_world_size())[dist.get_rank()]
    norms = []
    for group in (None, dist.group.WORLD):
        p = nn.Parameter(torch.ones_like(part))
        p.grad = part.clone()
        optimizer = FusedAdamW([p], max_grad_norm=1.0, grad_norm_group=group)
        optimizer.step()
        norms.append(optimizer.metrics()["grad_norm"])
    torch.testing.assert_close(norms[0], part.double().norm())
    torch.testing.assert_close(norms[1], whole_grad.double().norm())


def nothing_to_update_on_one_rank() -> None:
    """A rank without any gradient takes part in the norm all the same."""
    mesh, first = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank() == 0
    backends = ("reference",) if torch.cuda.is_available() else ("reference", "triton")
    for backend, scale in itertools.product(backends, (None, 8.0)):
        p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        skip = scale is None  # else GradScaler says so, where it finds something
        optimizer: Any = FusedAdamW([p], max_grad_norm=1.0, skip_nonfinite=skip, backend=backend)
        for step, value in enumerate((1.0, math.nan, 1.0, 0.25, math.inf, 1.0)):
            p.grad = None
            if first or step == 3:  # the other has its first one late
                full = torch.full((4,), value)
                p.grad = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)
            if scale is not None:
                optimizer.grad_scale = torch.tensor(scale)
                bad = step == 2 or not math.isfinite(value)
                found_inf = torch.tensor(float(first and bad))
                optimizer.found_inf = 0 if p.grad is None else found_inf  # as GradScaler has it
            optimizer.step()
            # what both know, whoever had something to update
            elements = 4 if step == 3 else 2
            norm = (elements * value**2) ** 0.5 / (scale or 1.0)
            factor = norm if math.isnan(norm) else min(1.0, 1 / (norm + 1e-6))
            if scale is not None and step == 2:
                norm, factor = math.inf, 0.0
            found = optimizer.metrics()
            wanted = {"grad_norm": norm, "clip_factor": factor}
            wanted["skipped_steps"] = [0, 1, 1 + bool(scale)][min(step, 2)] + (step > 3)
            for key, x in wanted.items():
                torch.testing.assert_close(
                    found[key], torch.tensor(x).double(), rtol=1e-6, atol=0, equal_nan=True
                )
        assert optimizer.state[p]["step"].item() == (4 - bool(scale) if first else 1)


def stale_graph(backend: str) -> None:
    """Of DTensors, too: what a step has changed is no longer there for a backward of before it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layout in Replicate(), Shard(0):
        p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [layout]))
        idle = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [layout]))
        optimizer: Any = FusedAdamW([p, idle], backend=backend)  # type: ignore[arg-type]
        loss = (p * p).sum()
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        before = idle._version
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()  # type: ignore[no-untyped-call]
        assert idle._version == before


def measure_across_ranks(shape: tuple[int, ...], backend: str) -> None:
    """FSDP2 or HSDP with group_metrics: on every rank those of the whole, replicas counted once."""
    params: list[Tensor] = list(fsdp(shape).parameters())
    for step in _measured_steps(params, backend):
        for i, p in enumerate(params):
            torch.manual_seed(10 * step + i)
            p.grad = distribute_tensor(torch.randn(p.shape), p.device_mesh, p.placements)  # type: ignore[attr-defined]
        if step == 1:
            params[0].grad = None


def measure_mixed_placements() -> None:
    """Several meshes and placements in a group, plain tensors; bfloat16, of which much is lost."""
    world = dist.get_world_size()
    flat = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    layouts = [
        (flat, [Replicate()]),
        (flat, [Shard(0)]),
        (grid, [Replicate(), Shard(1)]),
        (grid, [Shard(0), Shard(1)]),
    ]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    params: list[Tensor] = [
        nn.Parameter(distribute_tensor(random(5, 6), mesh, layout)) for mesh, layout in layouts
    ]
    params.append(nn.Parameter(random(3)))
    for step in _measured_steps(params, "reference", lr=1e-3):
        torch.manual_seed(step)
        for p, layout in zip(params, layouts, strict=False):
            p.grad = distribute_tensor(random(5, 6), *layout)
        params[-1].grad = random(3)


def _measured_steps(params: list[Tensor], backend: str, **options: object) -> Iterator[int]:
    """Steps for which the caller sets gradients; their metrics have to be those of whole copies."""

    def make(own: Sequence[Tensor]) -> FusedAdamW:
        groups = [{"params": own[:2]}, {"params": own[2:], "weight_decay": 0.0}]
        given: Any = {**OPTIONS, "group_metrics": True, "backend": backend, **options}
        return FusedAdamW(groups, **given)

    copies = [nn.Parameter(whole(p.detach()).clone()) for p in params]
    optimizer, oracle = make(params), make(copies)
    for step in range(3):
        yield step
        for p, q in zip(params, copies, strict=True):
            q.grad = None if p.grad is None else whole(p.grad).clone()
        optimizer.step()
        oracle.step()
        ours, expected = optimizer.metrics(), oracle.metrics()
        for name in ("update_rms", "param_rms", "lost_updates"):
            # sums of float32 squares over other blocks
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-6, atol=0)
        assert (ours["update_rms"] > 0).all()
        if params[0].dtype == torch.bfloat16:
            assert ((ours["lost_updates"] > 0) & (ours["lost_updates"] < 1)).all()


def measure_parts() -> None:
    """Plain parts are added over grad_norm_group; a rank that updates nothing takes part, too."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    q = nn.Parameter(torch.full((3,), 1.0 + rank))
    optimizer = FusedAdamW(
        [{"params": [p]}, {"params": [q]}],
        grad_norm_group=dist.group.WORLD,
        group_metrics=True,
        lr=1e-3,
        weight_decay=0.0,
        eps=0.0,
    )
    assert optimizer.metrics()["param_rms"].tolist() == [0, 0]
    if rank == 0:
        p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None)
    optimizer.step()
    metrics = optimizer.metrics()
    expected = torch.tensor([1e-3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(metrics["update_rms"], expected, rtol=1e-6, atol=0)
    q.grad = torch.ones(3)
    optimizer.step()
    metrics = optimizer.metrics()
    expected = torch.tensor([1e-3, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(metrics["update_rms"], expected, rtol=1e-6, atol=0)
    rms = torch.tensor((0.999**2 + 1.999**2) / 2, dtype=torch.float64).sqrt()
    torch.testing.assert_close(metrics["param_rms"][1], rms, rtol=1e-6, atol=0)

    # in one group: the DTensor is whole by itself, the plain parts are added to it
    mixed = FusedAdamW([{"params": [p, q]}], group_metrics=True, weight_decay=0.0)
    mixed.grad_norm_group = dist.group.WORLD
    p.grad = torch.ones_like(p)
    mixed.step()
    world = dist.get_world_size()
    values = [p.full_tensor(), *(torch.full((3,), q[0].item() + i - rank) for i in range(world))]
    rms = torch.cat(values).detach().double().square().mean().sqrt()
    torch.testing.assert_close(mixed.metrics()["param_rms"][0], rms, rtol=1e-6, atol=0)


class Net(nn.Module):
    """Sizes that no number of ranks divides, and params smaller than the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.last = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] -> [batch, 1]."""
        y: Tensor = self.last(self.norm(torch.relu(self.first(x))))
        return y


def fsdp(shape: tuple[int, ...] = ()) -> Net:
    """A model under FSDP2, or HSDP on a mesh of two dimensions."""
    torch.manual_seed(1)
    names = ("replicate", "shard")[-len(shape) :] if shape else ("shard",)
    mesh = init_device_mesh("cpu", shape or (dist.get_world_size(),), mesh_dim_names=names)
    net = Net()
    fully_shard(net.first, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def backward(net: nn.Module, step: int) -> None:
    """Gradients of another batch on every rank."""
    torch.manual_seed(100 * step + dist.get_rank())
    net.zero_grad()
    net(torch.randn(3, 6)).square().mean().backward()


def train_fsdp(shape: tuple[int, ...], backend: str) -> None:
    """Steps of FSDP2 or HSDP equal those on the whole model."""
    net = fsdp(shape)
    optimizer = FusedAdamW(net.parameters(), backend=backend, **OPTIONS)  # type: ignore[arg-type]
    oracle = Whole(list(net.parameters()), backend=backend)
    for step in range(4):
        backward(net, step)
        oracle.step()
        optimizer.step()
        oracle.check(optimizer)


def mixed_placements() -> None:
    """Params on two meshes, in several placements, and plain ones, in one optimizer."""
    world = dist.get_world_size()
    flat = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    layouts = [
        (flat, [Shard(0)]),
        (flat, [Replicate()]),
        (grid, [Replicate(), Shard(1)]),
        (grid, [Shard(0), Shard(1)]),
        (grid, [Shard(0), Replicate()]),
    ]
    params: list[Tensor] = [
        nn.Parameter(distribute_tensor(torch.randn(5, 6), mesh, layout)) for mesh, layout in layouts
    ]
    params.append(nn.Parameter(torch.randn(3)))
    optimizer = FusedAdamW([{"params": params[:3]}, {"params": params[3:]}], **OPTIONS)
    oracle = Whole(params)
    for step in range(3):
        for i, p in enumerate(params):
            torch.manual_seed(10 * step + i)
            g = torch.randn(p.shape)
            p.grad = g if i == 5 else distribute_tensor(g, *layouts[i])
        if step == 1:
            params[0].grad = None
        oracle.step()
        optimizer.step()
        oracle.check(optimizer)


def partial_gradients(scaled: bool) -> None:
    """A replicated param whose gradient is a partial sum on each rank, as a norm layer's is."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.randn(5), mesh, [Replicate()]))
    q = nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(1)]))
    optimizer = FusedAdamW([p, q], **OPTIONS)
    oracle = Whole([p, q])
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        p.grad = DTensor.from_local(torch.randn(5), mesh, [Partial()])
        torch.manual_seed(10 * step)
        q.grad = distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])
        before = whole(p.grad).clone()
        oracle.step()
        if scaled:
            p.grad, q.grad = p.grad * 8, q.grad * 8
            optimizer.grad_scale = torch.tensor(8.0)  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
        optimizer.step()
        oracle.check(optimizer)
        if scaled:
            assert torch.equal(whole(p.grad), before), "gradients are left unscaled"


def hypers_on_a_mesh(backend: str) -> None:
    """lr and betas as replicated DTensors, which have no address; a partial sum is refused."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    everywhere = functools.partial(distribute_tensor, device_mesh=mesh, placements=[Replicate()])
    p = nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)]))
    lr, beta1, beta2 = (everywhere(torch.tensor(x)) for x in (0.03, 0.8, 0.9))
    optimizer = FusedAdamW([p], lr=lr, betas=(beta1, beta2), backend=backend)
    twin = nn.Parameter(whole(p.detach()).clone())
    theirs = torch.optim.AdamW([twin], lr=0.03, betas=(0.8, 0.9))
    for _ in range(2):
        twin.grad = torch.ones_like(twin)
        p.grad = distribute_tensor(twin.grad, mesh, [Shard(0)])
        optimizer.step()
        theirs.step()
        torch.testing.assert_close(whole(p.detach()), twin.detach())
    partial = DTensor.from_local(torch.tensor(0.03), mesh, [Partial()])
    optimizer.param_groups[0]["lr"] = partial
    with pytest.raises(TypeError, match=r"Invalid lr: a DTensor .*replicated"):
        optimizer.step()
    torch.testing.assert_close(whole(p.detach()), twin.detach())


def load_what_is_on_a_mesh() -> None:
    """A checkpoint whose step is a replicated DTensor, and a moment a collective's result."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    pair = FusedAdamW(params[:1], **OPTIONS), torch.optim.AdamW(params[1:], **OPTIONS)
    for optimizer, p in zip(pair, params, strict=True):
        p.grad = torch.ones_like(p)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        state = saved["state"][0]
        state["step"] = distribute_tensor(state["step"], mesh, [Replicate()])
        state["exp_avg"] = all_reduce(state["exp_avg"], "max", dist.group.WORLD)
        optimizer.load_state_dict(saved)
        optimizer.step()
    torch.testing.assert_close(*params)
    assert float(pair[0].state[params[0]]["step"]) == 2


def missing_on_one_rank() -> None:
    """A rank whose part of a param has no gradient goes on alone; no rank waits for it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    optimizer = FusedAdamW([p], lr=0.1, weight_decay=0.0)
    if dist.get_rank() == 0:
        p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None)
    optimizer.step()
    expected = 0.9 if dist.get_rank() == 0 else 1.0
    torch.testing.assert_close(p.to_local(), torch.full((2,), expected))


def foreign_gradient() -> None:
    """A DTensor's gradient on another mesh, or on none, is refused, and nothing has changed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p, q = (nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])) for _ in range(2))
    other = init_device_mesh("cpu", (1, dist.get_world_size()))
    foreign = distribute_tensor(torch.ones(4), other, [Replicate(), Shard(0)])
    for grad, where in ((foreign, r"DTensor on another, .*"), (torch.ones(4), "Tensor on no mesh")):
        for named, name in ((True, "weight"), (False, r"param_groups\[1\]\['params'\]\[0\]")):
            params: list[Any] = [("bias", q), ("weight", p)] if named else [q, p]
            optimizer = FusedAdamW([{"params": [x]} for x in params])
            p.grad = grad
            with pytest.raises(
                TypeError, match=rf"^{name} is a DTensor on .* is a {where}\. Assign"
            ):
                optimizer.step()
            assert not optimizer.state
            assert torch.equal(p.full_tensor(), torch.ones(4))


def resume_by_state_dict() -> None:
    """deepcopy and load_state_dict go on with the same bits; nothing is aliased."""
    net = fsdp()
    optimizer = FusedAdamW(net.parameters(), **OPTIONS)
    backward(net, 0)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    params = [whole(p.detach()).clone() for p in net.parameters()]
    backward(net, 1)
    optimizer.step()
    expected = [whole(p.detach()).clone() for p in net.parameters()]

    for p, old in zip(net.parameters(), params, strict=True):
        with torch.no_grad():
            p.copy_(distribute_tensor(old, p.device_mesh, p.placements))
    again = FusedAdamW(net.parameters(), **OPTIONS)
    again.load_state_dict(saved)
    backward(net, 1)
    again.step()
    for p, x in zip(net.parameters(), expected, strict=True):
        assert torch.equal(whole(p.detach()), x)
    # torch's own goes on from it, and we from torch's
    torchs = torch.optim.AdamW(net.parameters(), **OPTIONS)
    torchs.load_state_dict(copy.deepcopy(again.state_dict()))
    backward(net, 2)
    torchs.step()
    again.load_state_dict(torchs.state_dict())
    backward(net, 3)
    again.step()
    assert all(s["step"] == 4 for s in again.state.values())


def _optimizer(kind: str, net: nn.Module) -> torch.optim.Optimizer:
    make: Any = FusedAdamW if kind == "ours" else torch.optim.AdamW
    made: torch.optim.Optimizer = make(net.parameters(), **OPTIONS)
    return made


def save_checkpoint(folder: str, kind: str, asynchronous: bool) -> None:
    """Train two steps, save with torch.distributed.checkpoint, then train a third for the truth."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    net = fsdp()
    optimizer = _optimizer(kind, net)
    for step in range(2):
        backward_alike(net, step)
        optimizer.step()
    model, state = get_state_dict(net, optimizer)
    everything = {"model": model, "optimizer": state}
    if asynchronous:
        dcp.async_save(everything, checkpoint_id=folder).result()
    else:
        dcp.save(everything, checkpoint_id=folder)
    backward_alike(net, 2)
    optimizer.step()
    params = [whole(p.detach()) for p in net.parameters()]
    if dist.get_rank() == 0:
        torch.save(params, Path(folder, "expected.pt"))


def load_checkpoint(folder: str, kind: str) -> None:
    """Load what another number of ranks has saved; the third step is theirs."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    torch.manual_seed(7)
    net = fsdp()
    optimizer = _optimizer(kind, net)
    model, state = get_state_dict(net, optimizer)
    everything = {"model": model, "optimizer": state}
    dcp.load(everything, checkpoint_id=folder)
    set_state_dict(
        net,
        optimizer,
        model_state_dict=everything["model"],
        optim_state_dict=everything["optimizer"],
    )
    assert all(s["step"] == 2 for s in optimizer.state.values())
    backward_alike(net, 2)
    optimizer.step()
    for p, x in zip(net.parameters(), torch.load(Path(folder, "expected.pt")), strict=True):
        torch.testing.assert_close(whole(p.detach()), x, rtol=1e-5, atol=1e-6)


def backward_alike(net: nn.Module, step: int) -> None:
    """The same batch on every rank, so that their number does not matter."""
    torch.manual_seed(step)
    net.zero_grad()
    net(torch.randn(4, 6)).square().mean().backward()


def zero_redundancy() -> None:
    """ZeRO-1: each rank updates some of the params, and all have them."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(1)
    net = DistributedDataParallel(Net())
    oracle = Whole(list(net.parameters()))
    optimizer = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=FusedAdamW, **OPTIONS)
    for step in range(3):
        backward(net, step)
        oracle.step()
        optimizer.step()
        for p, x in zip(net.parameters(), oracle.params, strict=True):
            assert torch.equal(p, x)


def fsdp1() -> None:
    """FSDP1: one flat param, of which a rank holds a plain part."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.manual_seed(1)
    nets = [Net() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    wrapped = [FullyShardedDataParallel(n, device_id=torch.device("cpu")) for n in nets]
    ours = FusedAdamW(wrapped[0].parameters(), **OPTIONS)
    torchs = torch.optim.AdamW(wrapped[1].parameters(), **OPTIONS)
    for step in range(3):
        for net, optimizer in zip(wrapped, (ours, torchs), strict=True):
            backward(net, step)
            optimizer.step()
        for p, q in zip(*(n.parameters() for n in wrapped), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
