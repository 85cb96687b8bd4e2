"""Measures of the last step by group, from sums that the update leaves; no one waits for them.

The update keeps a row of sums for each program of its launch (on the reference for each tensor),
the schedule how many elements of each tensor were updated. Both lie in memory that captured steps
share with eager ones of the same layout, so that replays are seen, and a skipped step touches
neither. Only `read` adds them up, in a fixed order: rows to tensors, tensors to groups, groups over
devices and ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .entries import Entry
from .kernels import table as t
from .launch import is_capturing
from .norm import Ranks
from .plan import Plan

NAMES = ("update_rms", "param_rms", "lost_updates")


class Measures(NamedTuple):
    """What the steps of one device write."""

    rows: Tensor  # [n_rows, MEASURES]
    counted: Tensor  # float64 [n_tensors]: elements updated by the last step that was carried out


class Layout(NamedTuple):
    """What the rows of one device belong to, a list item for each tensor. Host only."""

    first_chunk: list[int]
    numels: list[int]  # of reals
    places: list[int]  # in the list of all params
    meshes: list[int]
    n_rows: int
    rows_per_chunk: int
    dtype: torch.dtype  # float32 from a kernel, float64 from the reference


@dataclasses.dataclass(frozen=True)
class Telemetry:
    """The measures of all devices, and how they are added."""

    params: list[Tensor]  # the plan's own list: the same object as long as the plan holds
    meshes: Mapping[Ranks, int]
    layouts: dict[torch.device, Layout]
    measures: dict[torch.device, Measures]


def follow(before: Telemetry | None, plan: Plan) -> Telemetry:
    """The telemetry for a plan: as it was, or with new memory where the layout has changed.

    Raises:
        RuntimeError: a stream is captured, and no step before it has made the memory.
    """
    if before is not None and before.params is plan.params:
        return before
    layouts = {
        device: _layout(entries, plan.tables.get(device))
        for device, entries in plan.by_device.items()
    }
    measures = {}
    for device, layout in layouts.items():
        if before is not None and before.layouts.get(device) == layout:
            pairs = ((before.params[place], plan.params[place]) for place in layout.places)
            if all(one is other for one, other in pairs):
                measures[device] = before.measures[device]
                continue
        if is_capturing(device):
            raise RuntimeError(
                "FusedAdamW.step() with group_metrics cannot be captured in a CUDA graph yet: its "
                "measures have no memory. Run one step() with group_metrics outside the capture."
            )
        measures[device] = Measures(  # zeros: programs past a tensor's end write nothing
            torch.zeros(layout.n_rows, t.MEASURES, dtype=layout.dtype, device=device),
            torch.zeros(len(layout.numels), dtype=torch.float64, device=device),
        )
    return Telemetry(plan.params, plan.meshes, layouts, measures)


def _layout(entries: Sequence[Entry], table: t.Table | None) -> Layout:
    numels = [e.local.numel() * (2 if e.local.is_complex() else 1) for e in entries]
    places, meshes = [e.place for e in entries], [e.mesh for e in entries]
    if table is None:
        return Layout(
            list(range(len(entries))), numels, places, meshes, len(entries), 1, torch.float64
        )
    tensors = table.chunks & 0xFFFFFFFF
    first = np.searchsorted(tensors, np.arange(len(entries))).tolist()
    per_chunk = table.blocks_per_chunk
    return Layout(first, numels, places, meshes, table.n_programs, per_chunk, torch.float32)


def read(
    telemetry: Telemetry | None,
    param_groups: Sequence[Mapping[str, Any]],
    device: torch.device,
    given: Any,
) -> dict[str, Tensor]:
    """NAMES -> float64 [n_groups], of all devices and ranks; all-reduces as norm.py's `add_up`.

    param_groups: as they are now, which need not be as the step found them: a param counts in the
    group that has it. device: of the result. given: the grad_norm_group.
    """
    shape = len(param_groups), t.MEASURES + 1
    alone = torch.zeros(shape, dtype=torch.float64, device=device)  # not to be added over `given`
    shared = torch.zeros_like(alone)
    if telemetry is not None:
        numbers = {p: i for i, group in enumerate(param_groups) for p in group["params"]}
        groups = [numbers.get(p, len(param_groups)) for p in telemetry.params]
        own = len(telemetry.meshes), len(param_groups) + 1, t.MEASURES + 1
        total = torch.zeros(own, dtype=torch.float64, device=device)
        for here, measures in telemetry.measures.items():
            x = _sums(telemetry.layouts[here], measures, groups, own)
            # on the way to the CPU the host has to wait: it reads there
            total += x.to(device, non_blocking=device.type != "cpu")
        total = total[:, :-1].contiguous()  # without params that have left
        for ranks, mesh in telemetry.meshes.items():
            for process_group in ranks.mesh:
                torch.distributed.all_reduce(total[mesh], group=process_group)
            (shared if ranks.given else alone).add_(total[mesh])
    if given is not None:
        torch.distributed.all_reduce(shared, group=given)
    sums = (alone + shared).unbind(1)
    elements, updates = (x.clamp(min=1) for x in (sums[t.MEASURES], sums[t.ADDED]))
    values = (
        (sums[t.ADDED_SQUARES] / elements).sqrt(),
        (sums[t.PARAM_SQUARES] / elements).sqrt(),
        sums[t.LOST] / updates,
    )
    return dict(zip(NAMES, values, strict=True))


def _sums(
    layout: Layout, measures: Measures, groups: Sequence[int], own: tuple[int, int, int]
) -> Tensor:
    """Sums of one device, float64 [n_meshes, n_groups, MEASURES + 1]; the last counts elements.

    groups: of all params, one after the other.
    """
    rows, counted = measures
    n_chunks, shape = layout.n_rows // layout.rows_per_chunk, (layout.rows_per_chunk, t.MEASURES)
    chunks = rows.view(n_chunks, *shape).sum(1, dtype=torch.float64)
    tensors = _bags(chunks, np.arange(n_chunks), np.array(layout.first_chunk))
    # what a tensor that the last step has not updated left there is older
    tensors = torch.where(counted[:, None] > 0, tensors, 0)
    n_meshes, n_groups, _ = own
    n_bags = n_meshes * n_groups
    bag = np.array(layout.meshes) * n_groups + np.array([groups[i] for i in layout.places])
    order = np.argsort(bag, kind="stable")
    starts = np.searchsorted(bag[order], np.arange(n_bags))
    sums = _bags(torch.cat([tensors, counted[:, None]], 1), order, starts)
    return sums.view(own)


def _bags(rows: Tensor, order: t.Words, starts: t.Words) -> Tensor:
    """Sums of rows: bag i has those numbered order[starts[i] : starts[i + 1]]."""
    # It adds in that order; index_add_ and scatter_add_ are atomic on GPUs, their bits chance.
    indices = torch.from_numpy(np.concatenate([order, starts]).astype(np.int64, copy=False))
    if rows.device.type != "cpu":
        indices = indices.pin_memory().to(rows.device, non_blocking=True)
    return embedding_bag(indices[: len(order)], rows, indices[len(order) :], mode="sum")
