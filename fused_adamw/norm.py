"""The global gradient norm: sums of squares of devices, meshes and ranks, added without a wait.

A DTensor's squares are added over the mesh dimensions that shard it, so that replicas count once.
Plain tensors count as they lie. What lies on the ranks of a given process group, but not on those
of a tensor's own mesh, are other parts of the model, and added to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import NO_NUMBERS
from .kernels import table as t
from .shards import is_sharded


class Ranks(NamedTuple):
    """The ranks over which a param's squares are added."""

    mesh: tuple[Any, ...]  # process groups: one after the other, they join all parts
    given: bool  # whether the ranks of grad_norm_group hold others, to be added, too


class Clipping(NamedTuple):
    """What is done with the norm; equal on all devices and ranks."""

    max_norm: float | None
    skip_nonfinite: bool

    @property
    def wanted(self) -> bool:
        """Whether the norm is needed at all."""
        return self.max_norm is not None or self.skip_nonfinite


_NONE = Clipping(None, skip_nonfinite=False)  # one for all steps: to make it is two calls


def check_clipping(max_grad_norm: object, skip_nonfinite: object) -> Clipping:
    """The options as numbers; ValueError where they are none."""
    if max_grad_norm is None:
        return Clipping(None, True) if skip_nonfinite else _NONE
    on_device = isinstance(max_grad_norm, Tensor) and max_grad_norm.device.type != "cpu"
    unwanted = on_device or isinstance(max_grad_norm, NO_NUMBERS)
    try:
        number = math.nan if unwanted else float(max_grad_norm)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not number > 0:
        raise ValueError(
            f"Invalid max_grad_norm: {max_grad_norm!r} (want a number > 0 on the host, or None for "
            "no clipping)"
        )
    return Clipping(number, bool(skip_nonfinite))


def ranks_of(params: Iterable[Tensor], given: Any) -> list[Ranks]:
    """For each param the ranks over which its squares are added. given: grad_norm_group.

    Raises:
        ValueError: a DTensor whose mesh has some ranks of the given group, but neither all nor one,
            or does not have this rank, and no group is given.
    """
    known: dict[tuple[Any, ...], Ranks] = {}
    result = []
    for p in params:
        if not is_sharded(p):
            result.append(Ranks((), given is not None))
            continue
        key = p.device_mesh, p.placements
        if key not in known:
            known[key] = _ranks_of_sharded(*key, given)
        result.append(known[key])
    return result


def _ranks_of_sharded(mesh: Any, placements: Sequence[Any], given: Any) -> Ranks:
    own = set(mesh.mesh.flatten().tolist())
    all_given = set() if given is None else set(torch.distributed.get_process_group_ranks(given))
    if 1 < len(own & all_given) < len(all_given):  # on all ranks that have this, none waits
        raise ValueError(
            f"A DTensor lies on ranks {sorted(own)}, and grad_norm_group has {sorted(all_given)}: "
            "some of these hold parts of it, some other params. Pass a group that has one rank of "
            "each mesh (a pipeline's), or only ranks of the mesh."
        )
    if mesh.get_coordinate() is None:
        if given is None:
            raise ValueError(
                f"A DTensor lies on ranks {sorted(own)}, of which this is none: it cannot know "
                "that one's part of the gradient norm. Pass a grad_norm_group that has this rank "
                "and one of those."
            )
        return Ranks((), False)
    groups = tuple(
        mesh.get_group(dimension)
        for dimension, placement in enumerate(placements)
        # not is_shard(), which FSDP2 over tensor parallelism (_StridedShard) denies
        if not placement.is_replicate() and mesh.size(dimension) > 1
    )
    if given is None:
        return Ranks(groups, False)
    return Ranks(groups, not all_given <= own)


def numbered(
    params: Sequence[Tensor], wanted: bool, given: Any
) -> tuple[dict[Ranks, int], list[int]]:
    """Numbers for the sets of ranks, as the params have them first, and for each param its own.

    Raises:
        ValueError: as `ranks_of`, or what is given is no process group.
    """
    if wanted and given is not None and not isinstance(given, torch.distributed.ProcessGroup):
        raise ValueError(
            f"Invalid grad_norm_group: {given!r} (want a process group that has this rank, or "
            "None; new_group returns something else to ranks that are not in it)"
        )
    nowhere = Ranks((), False)
    ranks = ranks_of(params, given) if wanted else [nowhere] * len(params)
    numbers: dict[Ranks, int] = {}
    return numbers, [numbers.setdefault(one, len(numbers)) for one in ranks]


def copies_of(params: Iterable[Tensor]) -> tuple[Any, ...]:
    """Process groups whose ranks hold copies of DTensors, as the params have them."""
    layouts = dict.fromkeys((p.device_mesh, p.placements) for p in params if is_sharded(p))
    return tuple(
        dict.fromkeys(
            mesh.get_group(dimension)
            for mesh, placements in layouts
            for dimension, placement in enumerate(placements)
            if placement.is_replicate()
            and mesh.size(dimension) > 1
            and mesh.get_coordinate() is not None
        )
    )


def add_up(
    parts: Mapping[Ranks, Sequence[Tensor]],
    devices: Sequence[torch.device],
    given: Any,
    found_inf: Tensor | None,
    copies: Sequence[Any] = (),
) -> dict[torch.device, Tensor]:
    """Sums of squares of all gradients everywhere, float64, to be added up, on each device.

    One collective a process group: those of the meshes in the order in which the params have them,
    then those of their copies, and, on every rank whatever it holds, the given one's.

    A sum that is not finite goes into those of all others, too. NaN in a plain gradient on one rank
    would else skip the step there alone, and shards of its DTensors would part, or their copies.

    parts: for each set of ranks the sums of this one's devices. found_inf: where it is not 0, the
    sum of all ranks is infinite. copies: `copies_of` all params.
    """
    home = devices[0]
    groups = list(dict.fromkeys(group for ranks in parts for group in ranks.mesh))
    # whatever is in them: what this rank holds besides, others may not, and would not be there
    told = [group for group in copies if group not in groups]
    alone = not groups and not told and given is None
    if alone and len(devices) == 1 and [len(sums) for sums in parts.values()] == [1]:
        return {home: next(iter(parts.values()))[0]}  # no operation: the schedule adds them up
    nothing = torch.zeros(1, dtype=torch.float64, device=home)
    if found_inf is not None and not alone:
        overflow = _to(found_inf, home).reshape(1) != 0
        nothing = torch.where(overflow, math.inf, nothing)
    totals: dict[Ranks, Tensor] = {}
    for ranks, sums in parts.items():
        totals[ranks] = _added([*(_to(x.sum(0, keepdim=True), home) for x in sums), nothing])
    for group in groups:
        joint = [ranks for ranks in parts if group in ranks.mesh]
        others = [total for ranks, total in totals.items() if ranks not in joint]
        joined = torch.cat([totals[ranks] for ranks in joint]) + _not_finite(others)
        torch.distributed.all_reduce(joined, group=group)
        totals.update(zip(joint, joined.chunk(len(joint)), strict=True))
    for group in told:
        bad = _not_finite(list(totals.values())) + nothing
        torch.distributed.all_reduce(bad, group=group)
        totals = {ranks: total + bad for ranks, total in totals.items()}
    here = [total for ranks, total in totals.items() if not ranks.given]
    if given is not None:
        there = _added([nothing, *(total for ranks, total in totals.items() if ranks.given)])
        there = there + _not_finite(here)
        torch.distributed.all_reduce(there, group=given)
        here.append(there)
    whole = _added(here or [nothing])
    return {device: _to(whole, device) for device in devices}


def device_of(given: Any) -> torch.device:
    """Where a rank without any param takes part in the norm: as the others, on an accelerator."""
    # asked for only where one is: a CUDA wheel names its own without a GPU, too, or raises (2.6)
    there = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if there else None
    if given is None or accelerator is None:
        return torch.device("cpu")
    served = torch.distributed.get_backend_config(given)  # "cpu:gloo,cuda:nccl"
    return accelerator if f"{accelerator.type}:" in served else torch.device("cpu")


def _added(sums: Sequence[Tensor]) -> Tensor:
    return sums[0] if len(sums) == 1 else torch.cat(list(sums)).sum(0, keepdim=True)


def _not_finite(sums: Sequence[Tensor]) -> Tensor | float:
    """Their sum where that is NaN or infinity, else 0."""
    if not sums:
        return 0.0
    whole = _added(sums)
    return torch.where(whole.isfinite(), 0.0, whole)


def _to(x: Tensor, device: torch.device) -> Tensor:
    # on the way to the CPU the host has to wait: it reads there
    return x.to(device, non_blocking=device.type != "cpu")


def note(
    total: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clipping: Clipping,
    metrics: Tensor,
) -> Tensor:
    """Note a step's metrics, and return whether it is to be skipped: the schedule's twin in torch.

    Without a wait, unless the metrics are on the CPU and the scalars are not. total: sums of
    squares of all gradients, to be added up, where the metrics are.
    """
    x = total.sum()
    norm, skip = x.sqrt(), torch.zeros_like(x, dtype=torch.bool)
    if grad_scale is not None:
        norm = norm * (1 / _to(grad_scale, x.device).reshape(()).double()).abs()
    if found_inf is not None:
        skip = _to(found_inf, x.device).reshape(()) != 0
    if clipping.skip_nonfinite:
        skip = skip | ~(x < math.inf)
    metrics[t.NORM], metrics[t.CLIP_FACTOR] = norm, 1.0
    if clipping.max_norm is not None and clipping.max_norm < math.inf:
        metrics[t.CLIP_FACTOR] = (clipping.max_norm / (norm + 1e-6)).clamp(max=1.0)
    metrics[t.SKIPPED] += skip
    return skip


def decide(
    total: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    clipping: Clipping,
    metrics: Tensor,
) -> float | None:
    """What gradients are multiplied by, or None to skip the step; notes the metrics.

    Reads them, which waits where they lie on a GPU.
    """
    skip = note(total, grad_scale, found_inf, clipping, metrics)
    return None if bool(skip) else float(metrics[t.CLIP_FACTOR])
