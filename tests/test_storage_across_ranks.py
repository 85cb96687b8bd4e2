"""Storage formats over gloo: the bits of the whole param in every sharding, and in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks_storage
import torch
from ranks import in_turn, need_interpreter, on_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed or gloo",
)
each = pytest.mark.parametrize
# the backends of CPU tensors besides the reference
INTERPRETED = () if torch.cuda.is_available() else ("triton",)


@each(
    ("options", "shape", "backend"),
    [
        ({"stochastic_rounding": True}, (5, 6), "reference"),
        ({"stochastic_rounding": True}, (7, 6, 3), "triton"),
        ({"state_dtype": "int8", "master_weights": True}, (5, 256), "reference"),
        ({"state_dtype": "int8", "amsgrad": True}, (6, 256), "triton"),
        ({"state_dtype": "int8"}, (5, 8, 32), "reference"),
    ],
    ids=str,
)
def test_sharded_as_whole(options: dict[str, Any], shape: tuple[int, ...], backend: str) -> None:
    need_interpreter(backend)
    on_ranks(4, ranks_storage.sharded_as_whole, options, shape, backend)


def test_shardings_of_rows() -> None:
    scenarios = (
        ranks_storage.same_keys_in_every_sharding,
        ranks_storage.fsdp2_over_tensor_parallelism,
        ranks_storage.loaded_in_another_sharding,
    )
    on_ranks(4, in_turn, [(x,) for x in scenarios])


def test_places_that_cannot_be_told() -> None:
    refused = ranks_storage.refused_before_anything_changes
    on_ranks(4, in_turn, [(refused, backend) for backend in ("reference", *INTERPRETED)])


@each(
    "options",
    [
        {"state_dtype": "int8", "master_weights": True},
        {"state_dtype": "int8"},
        {"stochastic_rounding": True},
    ],
    ids=str,
)
def test_checkpoint(options: dict[str, Any]) -> None:
    on_ranks(2, ranks_storage.checkpoint, options)


def test_whole_checkpoint_in_another_world(tmp_path: Path) -> None:
    """2 ranks of 3 and 2 rows save, 4 of 2, 2, 1 and no rows load."""
    kinds = {
        "master": {"state_dtype": "int8", "master_weights": True},
        "amsgrad": {"state_dtype": "int8", "amsgrad": True},
    }
    for name in kinds:
        (tmp_path / name).mkdir()
    given = [(tmp_path / name, options) for name, options in kinds.items()]
    on_ranks(2, in_turn, [(ranks_storage.save_whole, *x) for x in given])
    on_ranks(4, in_turn, [(ranks_storage.load_whole, *x) for x in given])


def test_fsdp1() -> None:
    on_ranks(2, ranks_storage.fsdp1)


def test_zero_redundancy_optimizer() -> None:
    kinds = ({"master_weights": True}, {"master_weights": True, "state_dtype": "int8"})
    on_ranks(2, in_turn, [(ranks_storage.zero1, options) for options in kinds])
