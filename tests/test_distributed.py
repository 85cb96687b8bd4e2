"""Several ranks on torch's own engine, over gloo: DTensors, FSDP1 and 2, HSDP, ZeRO-1, checkpoints.

The scenarios are in ranks.py; each is run by processes of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch
from ranks import need_interpreter, on_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed or gloo",
)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_fsdp2(backend: str) -> None:
    need_interpreter(backend)
    on_ranks(2, ranks.train_fsdp, (), backend)


def test_hsdp() -> None:
    on_ranks(4, ranks.train_fsdp, (2, 2), "reference")


def test_meshes_and_placements_side_by_side() -> None:
    on_ranks(4, ranks.mixed_placements)


@pytest.mark.parametrize("scaled", [False, True])
def test_partial_gradients_are_summed_first(scaled: bool) -> None:
    on_ranks(2, ranks.partial_gradients, scaled)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_hyper_parameters_on_a_mesh(backend: str) -> None:
    need_interpreter(backend)
    on_ranks(2, ranks.hypers_on_a_mesh, backend)


def test_load_what_is_on_a_mesh() -> None:
    on_ranks(2, ranks.load_what_is_on_a_mesh)


def test_gradient_missing_on_one_rank() -> None:
    on_ranks(2, ranks.missing_on_one_rank)


def test_gradient_on_another_mesh_is_refused() -> None:
    on_ranks(2, ranks.foreign_gradient)


def test_resume_and_exchange_with_torch() -> None:
    on_ranks(2, ranks.resume_by_state_dict)


@pytest.mark.parametrize(
    ("saver", "loader", "asynchronous"),
    [("ours", "ours", True), ("ours", "torch", False), ("torch", "ours", False)],
)
def test_checkpoint_across_world_sizes(
    tmp_path: Path, saver: str, loader: str, asynchronous: bool
) -> None:
    on_ranks(4, ranks.save_checkpoint, str(tmp_path), saver, asynchronous)
    on_ranks(2, ranks.load_checkpoint, str(tmp_path), loader)
    if saver == loader:
        on_ranks(1, ranks.load_checkpoint, str(tmp_path), loader)


def test_zero_redundancy_optimizer() -> None:
    on_ranks(2, ranks.zero_redundancy)


def test_fsdp1() -> None:
    on_ranks(2, ranks.fsdp1)


@pytest.mark.parametrize(
    ("world", "shape", "backend"),
    [(2, (), "reference"), (2, (), "triton"), (4, (2, 2), "reference")],
    ids=str,
)
def test_clipping_under_fsdp2(world: int, shape: tuple[int, ...], backend: str) -> None:
    need_interpreter(backend)
    on_ranks(world, ranks.clip_across_ranks, shape, backend)


def test_clipping_over_several_meshes() -> None:
    on_ranks(4, ranks.clip_mixed_placements)


def test_all_ranks_skip_together() -> None:
    on_ranks(2, ranks.skip_on_all_ranks)


def test_plain_parts_are_clipped_by_a_group() -> None:
    on_ranks(2, ranks.plain_parts_need_a_group)


def test_a_stale_graph_raises(backend: str) -> None:
    need_interpreter(backend)
    on_ranks(2, ranks.stale_graph, backend)


def test_norm_with_nothing_to_update_on_one_rank() -> None:
    on_ranks(2, ranks.nothing_to_update_on_one_rank)


@pytest.mark.parametrize(
    ("world", "shape", "backend"),
    [(2, (), "reference"), (2, (), "triton"), (4, (2, 2), "reference")],
    ids=str,
)
def test_metrics_under_fsdp2(world: int, shape: tuple[int, ...], backend: str) -> None:
    need_interpreter(backend)
    on_ranks(world, ranks.measure_across_ranks, shape, backend)


def test_metrics_over_several_meshes() -> None:
    on_ranks(4, ranks.measure_mixed_placements)


def test_metrics_of_parts() -> None:
    on_ranks(2, ranks.measure_parts)
