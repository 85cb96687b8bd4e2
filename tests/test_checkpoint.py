"""Checkpoints of several ranks when something goes on meanwhile: a kill, or further steps.

The scenarios are in ranks_checkpoint.py; that checkpoints move between worlds and optimizers is
shown in test_distributed.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks_checkpoint as ranks
import torch
from ranks import on_ranks
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed or gloo",
)


def test_a_rank_killed_while_saving_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    # rank 1 exits by the signal; rank 0 then raises, and which of both is told first is chance
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        on_ranks(2, ranks.killed_while_saving, tmp_path)
    assert (tmp_path / "step-3").exists()
    assert not (tmp_path / "step-3" / ".metadata").exists()
    on_ranks(1, ranks.go_on_after_the_kill, tmp_path)


def test_steps_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    on_ranks(2, ranks.steps_while_it_is_saved, tmp_path)
