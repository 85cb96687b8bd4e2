"""Train the GPT of train.py under FSDP2, clipped, stop at half-time and resume; beside torch's.

    torchrun --nproc_per_node 2 bench/train_fsdp.py              # CPUs, or GPUs if there are some
    torchrun --nproc_per_node 2 bench/train_fsdp.py --size tiny  # seconds
    torchrun --nproc_per_node 1 bench/train_fsdp.py --resume     # its second half once more

torch.optim.AdamW behind clip_grad_norm_ is the reference, its fused=True the yardstick of rounding,
and FusedAdamW clips in its own step, by max_grad_norm. At half-time it saves a checkpoint, and when
it is through, a new model and optimizer go on from there. Writes OUT/fsdp.png, OUT/fsdp.json and
OUT/checkpoint. Exits with 1 if its curve, or the resumed one, parts from torch's further than
rounding explains, or a loss is not finite.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import checkpoint
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from train import (
    CLIP,
    GPT,
    OPTIMIZERS,
    OURS,
    SIZES,
    STYLES,
    TORCH,
    TORCH_FUSED,
    Run,
    Size,
    Text,
    Training,
    compare,
    draw,
    judge,
    machine,
    tabulate,
)

from fused_adamw import FusedAdamW

RESUMED = "resumed"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all trainings of a run share."""

    size: Size  # its batch is that of all ranks together
    steps: int
    seed: int
    device: torch.device
    folder: Path  # of checkpoints

    @property
    def half(self) -> int:
        """Steps before the checkpoint."""
        return self.steps // 2


def make(name: str, setting: Setting, seed: int) -> Training:
    """A sharded model, its weights drawn by the seed, and the optimizer of that name."""
    torch.manual_seed(seed)
    model = GPT(setting.size).to(setting.device)
    mesh = init_device_mesh(setting.device.type, (dist.get_world_size(),), mesh_dim_names=("dp",))
    policy = MixedPrecisionPolicy()
    if setting.size.bf16 and setting.device.type == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if name in (TORCH, TORCH_FUSED):
        return Training(model, OPTIMIZERS[name], setting.size, setting.steps, setting.device)
    ours = functools.partial(FusedAdamW, max_grad_norm=CLIP)
    return Training(model, ours, setting.size, setting.steps, setting.device, max_norm=None)


def train(name: str, setting: Setting, progress: Progress) -> Run:
    """Train to the end: from the start, where ours saves at half-time, or from its checkpoint."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(setting.seed)
    text = Text(setting.size, setting.steps, setting.device)
    first = 0
    # other weights than the saved ones: what is not loaded shows
    training = make(name, setting, setting.seed + (name == RESUMED))
    states = training.model, training.optimizer, training.schedule
    if name == RESUMED:
        first = checkpoint.newest(setting.folder) or 0
        checkpoint.load(setting.folder, first, *states)
    task = progress.add_task(name, total=setting.steps)
    for step in range(first, setting.steps):
        if name == OURS and step == setting.half:
            checkpoint.save(setting.folder, step, *states)
        training.step(text.batch(step)[rank::world])
        training.show(progress, task, name, step, setting.steps)
    validation = training.validate(tokens[rank::world] for tokens in text.validation())
    losses = torch.stack([*training.losses, validation])
    dist.all_reduce(losses)
    *own, last = (losses / world).tolist()
    return Run(
        losses=own,
        validation=last,
        optimizer_ms=training.optimizer_ms(with_clipping=True),
        iteration_ms=training.iteration_ms(),
        first=first + 1,
    )


def judge_resumed(
    ours: Sequence[float], resumed: Run, limits: Sequence[float]
) -> tuple[list[float], bool, str]:
    """Its distances from the run that did not stop, whether all are within limits, a sentence."""
    past = resumed.first - 1
    distances = [abs(x - y) for x, y in zip(resumed.losses, ours[past:], strict=True)]
    within = [x <= limit for x, limit in zip(distances, limits[past:], strict=True)]  # NaN is not
    said = f"resumed after step {past}: largest difference {max(distances):.2e}"
    if not all(within):
        said += f", beyond its limit at step {past + 1 + within.index(False)}"
    return distances, all(within), said


def run_both(setting: Setting, title: str, out: Path, progress: Progress) -> tuple[bool, list[Any]]:
    """All trainings, side by side; whether all is well, and what to print."""
    with progress:
        runs = {
            name: train(name, setting, progress) for name in (TORCH, TORCH_FUSED, OURS, RESUMED)
        }
    verdict = compare(*(runs[name].losses for name in (TORCH, OURS, TORCH_FUSED)))
    fine, said = judge(runs, verdict)
    distances, as_before, said_too = judge_resumed(runs[OURS].losses, runs[RESUMED], verdict.limits)
    printed = [*tabulate(runs, verdict, "clip and step"), f"{said}; {said_too}"]
    if dist.get_rank() == 0:
        styles = {**STYLES, RESUMED: ("black", 1.5, 0.6)}
        draw(runs, verdict, title, out / "fsdp.png", styles, {RESUMED: distances})
        numbers = {
            "setting": _described(setting),
            "ranks": dist.get_world_size(),
            "machine": machine(setting.device),
            "runs": {name: dataclasses.asdict(run) for name, run in runs.items()},
            "verdict": dataclasses.asdict(verdict),
            "resumed": distances,
            "fine": fine and as_before,
        }
        (out / "fsdp.json").write_text(json.dumps(numbers, indent=1))
    return fine and as_before, printed


def run_resumed(setting: Setting, out: Path, progress: Progress) -> tuple[bool, list[Any]]:
    """The second half alone, beside that of the run that saved it, if it came to its end."""
    with progress:
        runs = {RESUMED: train(RESUMED, setting, progress)}
    fine, said = judge(runs, None)
    printed = [*tabulate(runs, None, "clip and step")]
    before = json.loads((out / "fsdp.json").read_text()) if (out / "fsdp.json").exists() else {}
    if fine and before.get("setting") == _described(setting):
        limits = before["verdict"]["limits"]
        _, fine, said = judge_resumed(before["runs"][OURS]["losses"], runs[RESUMED], limits)
    return fine, [*printed, said]


def _described(setting: Setting) -> dict[str, Any]:
    """What two runs have in common whose losses can be compared."""
    return {"size": dataclasses.asdict(setting.size), "steps": setting.steps, "seed": setting.seed}


def main(argv: Sequence[str] | None = None) -> int:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default_size = "gpt2" if on_gpu else "small"
    parser.add_argument("--size", choices=SIZES, default=default_size, help="here: %(default)s")
    parser.add_argument("--steps", type=int, help="at least 4; default: by the size")
    parser.add_argument("--out", type=Path, default=Path("out/fsdp"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="from OUT/checkpoint to the end")
    args = parser.parse_args(argv)
    if "LOCAL_RANK" not in os.environ:
        parser.error("run it with torchrun: torchrun --nproc_per_node 2 bench/train_fsdp.py")
    steps = SIZES[args.size].steps if args.steps is None else args.steps
    if steps < 4:
        parser.error(f"--steps is {steps}: an iteration of a half is timed from one to the next")

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    rank, world = dist.get_rank(), dist.get_world_size()
    size = SIZES[args.size]
    size = dataclasses.replace(size, batch=-(-size.batch // world) * world)  # a share for each rank
    setting = Setting(size, steps, args.seed, device, args.out / "checkpoint")

    if rank == 0 and not args.resume:
        shutil.rmtree(setting.folder, ignore_errors=True)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "fsdp.json").unlink(missing_ok=True)
    dist.barrier()
    if args.resume and not 0 < (checkpoint.newest(setting.folder) or 0) < steps - 1:
        parser.error(
            f"{setting.folder} holds no whole checkpoint to continue from to step {steps}: run it "
            "without --resume first"
        )
    title = " | ".join(f"{fact} {value}" for fact, value in machine(device).items())
    title += f" | {args.size} under FSDP2 | ranks {world}, {dist.get_backend()}"
    width = max(100, shutil.get_terminal_size().columns)  # of the table
    console = Console(highlight=False, quiet=rank != 0, width=width)
    console.print(title, soft_wrap=True)
    columns = *Progress.get_default_columns()[:3], TimeRemainingColumn(elapsed_when_finished=True)
    progress = Progress(*columns, console=console, disable=rank != 0)
    if args.resume:
        fine, printed = run_resumed(setting, args.out, progress)
    else:
        fine, printed = run_both(setting, title, args.out, progress)
        console.print(f"{args.out / 'fsdp.png'} and fsdp.json")
    console.print(*printed[:-1], sep="\n")
    console.print("[bold green]OK[/]" if fine else "[bold red]FAIL[/]", printed[-1], soft_wrap=True)
    dist.barrier()
    return 0 if fine else 1


def leave(code: int) -> NoReturn:
    """End this rank without Python's own end, which aborts now and then after gloo has been used.

    One of its threads may still wait for the GIL to drop the tensor of the last collective. Python,
    up to 3.13, ends such a thread through a destructor that must not throw ("terminate called
    without an active exception", torch 2.13); destroy_process_group() does not join it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
