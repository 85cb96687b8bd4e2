"""Storage formats of DTensors, over gloo: the bits of the whole param in every sharding."""

from __future__ import annotations

from typing import Any

import pytest
import ranks_storage
import torch
from ranks import on_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed or gloo",
)
each = pytest.mark.parametrize


@each(
    ("options", "shape", "backend"),
    [
        ({"stochastic_rounding": True}, (5, 6), "reference"),
        ({"stochastic_rounding": True}, (7, 6, 3), "triton"),
        ({"state_dtype": "int8", "master_weights": True}, (5, 256), "reference"),
        ({"state_dtype": "int8", "amsgrad": True}, (6, 256), "triton"),
    ],
    ids=str,
)
def test_sharded_as_whole(options: dict[str, Any], shape: tuple[int, ...], backend: str) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("CPU tensors run on the kernels under the interpreter alone")
    on_ranks(4, ranks_storage.sharded_as_whole, options, shape, backend)


def test_rows_that_are_no_blocks() -> None:
    on_ranks(2, ranks_storage.rows_that_are_no_blocks)


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
