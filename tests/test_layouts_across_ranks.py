"""DTensors that lie in another way than their param: laid out anew, or refused, never taken as is.

The scenarios are in ranks_layouts.py; one start of processes runs several.
"""

from __future__ import annotations

from typing import Any

import pytest
import ranks_layouts as ranks
import torch
from ranks import in_turn, on_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed or gloo",
)
BACKENDS = ["reference"] if torch.cuda.is_available() else ["reference", "triton"]


def test_loaded_from_another_mesh() -> None:
    kinds: list[tuple[dict[str, Any], tuple[int, ...]]] = [
        ({}, (5, 6)),
        ({"state_dtype": "int8", "master_weights": True}, (5, 128)),
    ]
    on_ranks(4, in_turn, [(ranks.loaded_from_another_mesh, *x) for x in kinds])


def test_loaded_in_another_shape_or_out_of_reach() -> None:
    on_ranks(4, in_turn, [(ranks.loaded_in_another_shape,), (ranks.loaded_out_of_reach,)])


def test_states_and_gradients() -> None:
    scenarios = ranks.states_by_hand, ranks.gradients
    on_ranks(4, in_turn, [(x, backend) for x in scenarios for backend in BACKENDS])


def test_places() -> None:
    on_ranks(4, in_turn, [(ranks.places,), (ranks.gathered_options,)])
