"""The global gradient norm: sums of squares of devices, meshes and ranks, added without a wait.

A DTensor's squares are added over the mesh dimensions that shard it, so that replicas count once.
Plain tensors count as they lie, unless a process group is given whose ranks each hold a part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .kernels import table as t
from .shards import is_sharded

Ranks: TypeAlias = tuple[Any, ...]  # process groups: one after the other, they join all parts


class Clipping(NamedTuple):
    """What is done with the norm; equal on all devices and ranks."""

    max_norm: float | None
    skip_nonfinite: bool

    @property
    def wanted(self) -> bool:
        """Whether the norm is needed at all."""
        return self.max_norm is not None or self.skip_nonfinite


def check_clipping(max_grad_norm: object, skip_nonfinite: object) -> Clipping:
    """The options as numbers; ValueError where they are none."""
    if max_grad_norm is None:
        return Clipping(None, bool(skip_nonfinite))
    on_device = isinstance(max_grad_norm, Tensor) and max_grad_norm.device.type != "cpu"
    try:
        number = math.nan if on_device else float(max_grad_norm)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not number > 0:
        raise ValueError(
            f"Invalid max_grad_norm: {max_grad_norm!r} (want a number > 0 on the host, or None for "
            "no clipping)"
        )
    return Clipping(number, bool(skip_nonfinite))


def ranks_of(param: Tensor, plain: Any) -> Ranks:
    """Process groups over which a param's squares are added. plain: where it is no DTensor."""
    if not is_sharded(param):
        return () if plain is None else (plain,)
    mesh = param.device_mesh
    return tuple(
        mesh.get_group(dimension)
        for dimension, placement in enumerate(param.placements)
        if placement.is_shard() and mesh.size(dimension) > 1
    )


def distinct(ranks: Iterable[Ranks]) -> dict[Ranks, int]:
    """Numbers for sets of ranks, in the order in which the params have them: alike on each rank."""
    numbers: dict[Ranks, int] = {}
    for one in ranks:
        numbers.setdefault(one, len(numbers))
    return numbers


def add_up(
    parts: Mapping[Ranks, Sequence[Tensor]], devices: Sequence[torch.device]
) -> dict[torch.device, Tensor]:
    """Sums of squares of all gradients everywhere, float64, to be added up, on each device.

    parts: for each set of ranks the sums of this one's devices. One collective a process group.
    """
    single = len(parts) == 1 and len(devices) == 1
    for ranks, sums in parts.items():
        if single and not ranks and len(sums) == 1:
            return {devices[0]: sums[0]}
    totals = []
    for ranks, sums in parts.items():
        total = torch.zeros((), dtype=torch.float64, device=devices[0])
        for x in sums:
            total += _to(x.sum(), total.device)
        for group in ranks:
            torch.distributed.all_reduce(total, group=group)
        totals.append(total)
    whole = torch.stack(totals).sum(0, keepdim=True)
    return {device: _to(whole, device) for device in devices}


def _to(x: Tensor, device: torch.device) -> Tensor:
    # on the way to the CPU the host has to wait: it reads there
    return x.to(device, non_blocking=device.type != "cpu")


def decide(
    total: Tensor, unscale: float, found_inf: bool, clipping: Clipping, metrics: Tensor
) -> float | None:
    """What gradients are multiplied by, or None to skip the step: the schedule's twin on the host.

    Reads the total, which waits where it lies on a GPU, and notes the metrics.
    """
    norm = math.sqrt(x) if (x := float(total.sum())) >= 0 else x  # NaN
    norm *= abs(unscale)
    factor = 1.0
    if clipping.max_norm is not None and clipping.max_norm < math.inf:
        factor = clipping.max_norm / (norm + 1e-6)
        factor = 1.0 if factor > 1 else factor
    skip = found_inf or (clipping.skip_nonfinite and not x < math.inf)
    metrics[t.NORM], metrics[t.CLIP_FACTOR] = norm, factor
    metrics[t.SKIPPED] += skip
    return None if skip else factor
