"""The gradient norm, clipping and skipping over several ranks: who counts, and that all agree.

The scenarios are in ranks_norm.py; one start of processes runs several.
"""

from __future__ import annotations

import pytest
import ranks_norm as ranks
import torch
from ranks import in_turn, on_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed or gloo",
)


def test_meshes_of_two_dimensions() -> None:
    scenarios = (
        ranks.over_tensor_parallelism,
        ranks.one_collective_a_group,
        ranks.not_finite_on_one_of_four,
    )
    on_ranks(4, in_turn, [(scenario,) for scenario in scenarios])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on CUDA there")
def test_the_norm_is_one_launch() -> None:
    on_ranks(4, ranks.one_launch_for_all_meshes)


def test_given_group() -> None:
    scenarios = ranks.pipeline_stages, ranks.mesh_of_other_ranks, ranks.group_over_the_mesh_itself
    on_ranks(4, in_turn, [(scenario,) for scenario in scenarios])


def test_zero_redundancy_optimizer() -> None:
    on_ranks(2, in_turn, [(ranks.zero_redundancy, one_param) for one_param in (True, False)])


def test_fsdp1() -> None:
    scenarios = ranks.fsdp1, ranks.grad_scaler_of_fsdp1
    on_ranks(2, in_turn, [(scenario, flat) for scenario in scenarios for flat in (False, True)])


def test_overflow_on_one_rank() -> None:
    backends = ["reference"] if torch.cuda.is_available() else ["reference", "triton"]
    on_ranks(
        2,
        in_turn,
        [(ranks.found_inf_on_one_rank, backend, plain) for backend in backends for plain in (0, 1)]
        + [(ranks.sharded_grad_scaler, first) for first in (True, False)],
    )


def test_not_finite_on_one_rank() -> None:
    backends = ["reference"] if torch.cuda.is_available() else ["reference", "triton"]
    on_ranks(
        2,
        in_turn,
        [
            (ranks.not_finite_on_one_rank, backend, value, given)
            for backend in backends
            for value in (torch.nan, torch.inf)
            for given in (False, True)
        ],
    )


def test_not_finite_beside_copies() -> None:
    backends = ["reference"] if torch.cuda.is_available() else ["reference", "triton"]
    on_ranks(4, in_turn, [(ranks.not_finite_beside_copies, backend) for backend in backends])


def test_error_on_one_rank() -> None:
    on_ranks(2, ranks.error_on_one_rank)
