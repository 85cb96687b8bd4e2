"""What each rank of tests/test_layouts_across_ranks.py runs: processes import it by name."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import whole
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from truth import same_bits

from fused_adamw import FusedAdamW
from fused_adamw.shards import local, place_of, row_of_shard


def stepped(p: Tensor, grad: Tensor, **options: Any) -> FusedAdamW:
    """An optimizer of one param after a step."""
    optimizer = FusedAdamW([p], lr=0.1, **options)
    p.grad = grad
    optimizer.step()
    return optimizer


def loaded_from_another_mesh(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """A checkpoint of a param on other meshes is gathered there, and laid out as the param is."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts: list[tuple[DeviceMesh, list[Any]]] = [
        (init_device_mesh("cpu", (4,)), [Shard(0)]),
        (grid, [Shard(0), Replicate()]),
        (grid, [Replicate(), Replicate()]),
    ]
    parts: list[tuple[DeviceMesh, list[Any]]] = [(grid["dp"], [Shard(0)]), (grid, [Shard(0)] * 2)]
    torch.manual_seed(0)
    value, grad = torch.randn(2, *shape).bfloat16()
    oracle = stepped(nn.Parameter(value.clone()), grad.clone(), **options)
    (expected,) = oracle.state.values()
    targets = [nn.Parameter(distribute_tensor(value.clone(), *x)) for x in (*layouts, parts[0])]
    targets.append(nn.Parameter(value.clone()))
    for mesh, placements in layouts:
        source = nn.Parameter(distribute_tensor(value.clone(), mesh, placements))
        saved = stepped(source, distribute_tensor(grad, mesh, placements), **options).state_dict()
        for target in targets:
            optimizer = FusedAdamW([target], lr=0.1, **options)
            optimizer.load_state_dict(copy.deepcopy(saved))
            for key, x in optimizer.state[target].items():
                assert same_bits(whole(x), expected[key]), key
                if isinstance(target, DTensor) and key != "step":
                    assert (x.device_mesh, x.placements) == (target.device_mesh, target.placements)


def loaded_out_of_reach() -> None:
    """Where some rank of the param cannot have all of a state, none waits for those that raise."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (4,))

    def build(mesh: DeviceMesh | None, cut: int) -> FusedAdamW:
        values = torch.ones(8, 8), torch.ones(8, 8)
        layout = [Replicate() if mesh is grid else Shard(0)] * (1 if mesh is None else mesh.ndim)
        first = values[0] if mesh is None else distribute_tensor(values[0], mesh, layout)
        # laying this one out anew is a collective
        second = distribute_tensor(values[1], line, [Shard(cut)])
        return FusedAdamW([nn.Parameter(first), nn.Parameter(second)])

    for source, target in (
        (DeviceMesh("cpu", [0, 1]), line),
        (DeviceMesh("cpu", [0, 1]), grid),
        (DeviceMesh("cpu", [0, 1]), None),
        (grid["dp"], grid["tp"]),
        (grid["dp"], None),
    ):
        saver, loader = build(source, 1), build(target, 0)
        for p in saver.param_groups[0]["params"]:
            moments = {key: torch.ones_like(p) for key in ("exp_avg", "exp_avg_sq")}
            saver.state[p] = {"step": torch.ones(()), **moments}
        with pytest.raises(RuntimeError, match="which does not have all ranks"):
            loader.load_state_dict(saver.state_dict())
        assert not loader.state


def loaded_in_another_shape() -> None:
    """It is refused by all ranks, though it fits on some, and before one waits for another."""
    mesh = init_device_mesh("cpu", (4,))

    def build(rows: int, cut: int) -> FusedAdamW:
        params = [
            nn.Parameter(distribute_tensor(torch.ones(x), mesh, [Shard(d)]))
            for x, d in (((8, 8), cut), ((rows, 4), 0))
        ]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = FusedAdamW(params)
        optimizer.step()
        return optimizer

    optimizer = build(6, 0)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"shape \(5, 4\) but the param has \(6, 4\)"):
        optimizer.load_state_dict(build(5, 1).state_dict())
    for state, old in zip(optimizer.state.values(), before["state"].values(), strict=True):
        assert all(same_bits(whole(x), whole(old[key])) for key, x in state.items())


def states_by_hand(backend: Any) -> None:
    """DTensors that are cut in another way than their param, or belong to none, are refused."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    own: list[Any] = [Shard(1), Shard(0)]
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), grid, own))
    q = nn.Parameter(torch.ones(4, 4))
    optimizer = FusedAdamW([p, q], lr=0.1, backend=backend)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()

    def lying(mesh: DeviceMesh, *placements: Any, rows: int = 4) -> Tensor:
        return DTensor.from_local(
            torch.ones(2, 2), mesh, placements, shape=torch.Size((rows, 4)), stride=(4, 1)
        )

    twin = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    everywhere = distribute_tensor(torch.ones(4, 4), grid, [Replicate(), Replicate()])
    partial = DTensor.from_local(torch.ones(()), grid, [Partial(), Replicate()])
    for param, key, wrong in (
        (p, "exp_avg", lying(grid, Shard(0), Shard(1))),
        (p, "exp_avg_sq", lying(twin, *own)),
        (p, "exp_avg_sq", lying(grid, *own, rows=3)),
        (p, "step", partial),
        (q, "exp_avg", everywhere),
        (q, "step", partial),
    ):
        right = optimizer.state[param][key]
        before = [local(x.detach()).clone() for x in (p, q)]
        steps = [float(optimizer.state[x]["step"]) for x in (p, q) if x is not param]
        optimizer.state[param][key] = wrong
        for _ in range(2):
            with pytest.raises(TypeError, match=f"{key} of .* is a DTensor of shape"):
                optimizer.step()
        optimizer.state[param][key] = right
        assert all(torch.equal(local(x), old) for x, old in zip((p, q), before, strict=True))
        assert steps == [float(optimizer.state[x]["step"]) for x in (p, q) if x is not param]
        optimizer.step()
    optimizer.state[p]["own"] = everywhere  # the user's: none of ours
    optimizer.state[p]["step"] = distribute_tensor(
        torch.tensor(3.0), grid, [Replicate(), Replicate()]
    )
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 4


def gradients(backend: Any) -> None:
    """A plain param's DTensor is refused beside DTensors, too; a collective is waited for."""
    mesh = init_device_mesh("cpu", (4,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    q = nn.Parameter(torch.ones(4))
    optimizer = FusedAdamW([p, q], lr=0.1, weight_decay=0.0, backend=backend)
    for step in range(3):
        pending = all_reduce(torch.ones(1), "sum", dist.group.WORLD)
        p.grad = DTensor.from_local(pending, mesh, [Shard(0)], run_check=False)
        q.grad = all_reduce(torch.ones(4), "sum", dist.group.WORLD)
        optimizer.step()
        torch.testing.assert_close(local(p.detach()), torch.full((1,), 0.9 - 0.1 * step))
        torch.testing.assert_close(q.detach(), torch.full((4,), 0.9 - 0.1 * step))
        kept = q.grad
        q.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
        with pytest.raises(TypeError, match="is a DTensor while the param is a plain tensor"):
            optimizer.step()
        q.grad = kept
        assert optimizer.state[p]["step"] == step + 1


def places() -> None:
    """Where the elements of shards of two dimensions lie, and what of a row each rank has."""
    grid = init_device_mesh("cpu", (2, 2))
    line = init_device_mesh("cpu", (4,))
    index = torch.arange(3 * 4 * 6).view(3, 4, 6)
    for mesh, placements in (
        (grid, [Shard(0), Shard(2)]),
        (grid, [Shard(2), Shard(0)]),
        (grid, [Shard(1), Replicate()]),
        (line, [Shard(2)]),
    ):
        x = distribute_tensor(index, mesh, placements)
        place, here = place_of("x", x), local(x).flatten()
        i = torch.arange(len(here))
        if place.inner:
            i = i // place.inner * place.inner_whole + i % place.inner
        assert torch.equal(place.first + i, here), placements

    def row(shape: Sequence[int], mesh: DeviceMesh, *placements: Any) -> int:
        return row_of_shard(distribute_tensor(torch.zeros(*shape), mesh, placements))

    assert row((2, 8, 128), line, Shard(1)) == 2 * 128
    assert row((2, 6, 128), line, Shard(1)) == 0
    assert row((2, 6, 128), grid, Shard(1), Replicate()) == 3 * 128
    assert row((2, 6, 128), grid, Shard(1), Shard(1)) == 0


def gathered_options() -> None:
    """Options of groups are of kinds that torch gathers and offloads."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for given in (torch.float32, (torch.bfloat16, "int8"), "int8"):
        layer = nn.Linear(64, 4, bias=False).bfloat16()
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
        group = {"params": layer.parameters(), "state_dtype": given}
        assigned = FusedAdamW(layer.parameters(), state_dtype="int8")
        assigned.param_groups[0]["state_dtype"] = given
        for optimizer in (
            FusedAdamW(layer.parameters(), state_dtype=given),  # type: ignore[arg-type]
            FusedAdamW([group]),
            copy.deepcopy(assigned),
        ):
            (p,) = optimizer.param_groups[0]["params"]
            layer.weight = p  # the copy's is another
            p.grad = torch.ones_like(p)
            optimizer.step()
            for full, offload in ((True, False), (False, True), (True, True)):
                options = StateDictOptions(full_state_dict=full, cpu_offload=offload)
                saved = get_optimizer_state_dict(layer, optimizer, options=options)
                if dist.get_rank() == 0 or not (full and offload):  # it is the first rank's alone
                    assert saved["state"]
