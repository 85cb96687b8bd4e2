"""What each rank of tests/test_checkpoint.py runs: spawned processes import it by name."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import OPTIONS, Net, backward_alike, fsdp, whole
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import ExponentialLR

from fused_adamw import FusedAdamW
from fused_adamw.shards import local


def bench_checkpoint() -> ModuleType:
    """bench/checkpoint.py, the recipe that is shown to users."""
    path = Path(__file__).parents[1] / "bench" / "checkpoint.py"
    spec = importlib.util.spec_from_file_location("bench_checkpoint", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make() -> tuple[Net, FusedAdamW, ExponentialLR]:
    """A sharded model with a clipped optimizer and a schedule."""
    net = fsdp()
    optimizer = FusedAdamW(net.parameters(), max_grad_norm=0.05, **OPTIONS)
    return net, optimizer, ExponentialLR(optimizer, 0.5)


def train(net: Net, optimizer: FusedAdamW, schedule: ExponentialLR, step: int) -> None:
    """One step, the same for any number of ranks."""
    backward_alike(net, step)
    optimizer.step()
    schedule.step()


def killed_while_saving(folder: Path) -> None:
    """Save two steps, then a third, in which rank 1 is killed before its data is on the disk."""
    checkpoint, states = bench_checkpoint(), make()
    for step in range(2):
        train(*states, step)
    checkpoint.save(folder, 2, *states)
    train(*states, 2)
    expected = [whole(p.detach()) for p in states[0].parameters()]
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")
    else:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save(folder, 3, *states)


def go_on_after_the_kill(folder: Path) -> None:
    """The checkpoint before is whole, and the step that was lost is made and saved again."""
    checkpoint = bench_checkpoint()
    expected = torch.load(folder / "expected.pt")
    for newest in (2, 3):
        torch.manual_seed(7)
        states = make()
        assert checkpoint.newest(folder) == newest
        checkpoint.load(folder, newest, *states)
        if newest == 2:
            train(*states, 2)
            checkpoint.save(folder, 3, *states)
        for p, x in zip(states[0].parameters(), expected, strict=True):
            torch.testing.assert_close(whole(p.detach()), x, rtol=1e-5, atol=1e-6)
    with pytest.raises(dcp.api.CheckpointException, match="already exists"):
        checkpoint.save(folder, 3, *states)
    dist.barrier()


class Late(dcp.FileSystemWriter):
    """Writes only when it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.now = threading.Event()

    def write_data(self, *arguments: Any) -> Any:
        assert self.now.wait(60)
        return super().write_data(*arguments)


def steps_while_it_is_saved(folder: Path) -> None:
    """An asynchronous save holds the values of its moment, whatever is stepped until it writes.

    It needs a group of its own: its messages would be taken for those of the steps.
    """
    own_group = dist.new_group(backend="gloo")

    def values() -> list[Tensor]:
        states = [x for p in net.parameters() for _, x in sorted(optimizer.state[p].items())]
        return [local(x.detach()).clone() for x in (*net.parameters(), *states)]

    net, optimizer, schedule = make()
    train(net, optimizer, schedule, 0)
    expected, writer = values(), Late(folder)
    model, state = get_state_dict(net, optimizer)
    saving = dcp.async_save(
        {"model": model, "optimizer": state}, storage_writer=writer, process_group=own_group
    )
    for step in range(1, 4):
        train(net, optimizer, schedule, step)
    assert not any(torch.equal(a, b) for a, b in zip(values(), expected, strict=True) if a.numel())
    writer.now.set()
    saving.result()
    saved_model, saved_state = get_state_dict(net, optimizer)
    everything = {"model": saved_model, "optimizer": saved_state}
    dcp.load(everything, checkpoint_id=folder)
    set_state_dict(
        net, optimizer, model_state_dict=saved_model, optim_state_dict=everything["optimizer"]
    )
    assert all(torch.equal(a, b) for a, b in zip(values(), expected, strict=True))
