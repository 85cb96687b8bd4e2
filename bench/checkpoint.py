"""Checkpoints of a run on any number of ranks; a kill while saving leaves the last one whole.

torch.distributed.checkpoint writes the data of all ranks first, and then `.metadata`, by a rename:
a folder that has it is whole. But it writes over what is there: a kill while saving into a folder
once more leaves parts of both steps there, which load without a word (seen with torch 2.13). So
each step gets a folder of its own, and the newest whole one is what is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def save(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler
) -> None:
    """Save what continues after `step` steps; to be called by all ranks.

    Raises:
        CheckpointException: some rank could not write, or the step is there already.
    """
    writer = FileSystemWriter(folder / f"step-{step}", overwrite=False)
    save_parts(_everything(model, optimizer, schedule), storage_writer=writer)


def newest(folder: Path) -> int | None:
    """Step of the newest checkpoint that is whole; None if there is none."""
    whole = [int(x.parent.name.removeprefix("step-")) for x in folder.glob("step-*/.metadata")]
    return max(whole, default=None)


def load(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler
) -> None:
    """Continue from that step; called by all ranks, whatever the number that has saved."""
    everything = _everything(model, optimizer, schedule)
    load_parts(everything, storage_reader=FileSystemReader(folder / f"step-{step}"))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=everything["model"],
        optim_state_dict=everything["optimizer"],
    )
    schedule.load_state_dict(everything["schedule"])


def _everything(model: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "schedule": schedule.state_dict()}
