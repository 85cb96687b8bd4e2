"""What groups say of a step: checked where it has changed, and laid out as the table's rows.

Nearly every step finds options as they were, or other learning rates: to see that is all it costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import check_hypers
from .kernels import table as t
from .shards import local
from .storage import check_options, options_of

DECOUPLED = "decoupled_weight_decay"
_others_of = itemgetter("eps", "weight_decay", "maximize", DECOUPLED)  # besides lr and betas
_NO_TENSORS = {float, int, bool}  # types of hyper-parameters, as they are in nearly all groups


def check_group(group: Mapping[str, Any], min_lr: float = -math.inf) -> None:
    """Raise ValueError or TypeError for options that no group can have."""
    check_hypers(group, min_lr)
    check_options(group)


class GroupRows(NamedTuple):
    """The groups' rows of the table, and the device scalars that they point to."""

    words: t.Words
    alive: list[Tensor]
    exact: bool  # whether eps makes denominators whose reciprocals would be infinite, or 0
    plain: bool  # whether all are as `_adamw_update` has a shorter way for
    rates: tuple[int, ...]  # the lrs, if they go with the launch and the words' do not count

    def with_rates(self, rates: Sequence[float]) -> GroupRows:
        """The same with other learning rates, where all hyper-parameters are numbers."""
        if self.rates:
            return self._replace(rates=t.pack_rates(rates))
        words = self.words.reshape(-1, t.GROUP_WORDS).copy()
        words.view(np.float64)[:, t.LR] = rates
        return self._replace(words=t.frozen(words.ravel()))


def group_rows(
    groups: Sequence[Mapping[str, Any]], device: torch.device, max_norm: float | None = None
) -> GroupRows:
    """Rows of hyper-parameters for the tables of a device.

    A tensor on a device stays there: the kernel reads it, so that no one waits for it and a
    captured graph follows it. One on the CPU is read here, and frozen in a graph as floats are.
    """
    norm = math.inf if max_norm is None else max_norm
    rows: list[bytes] = []
    rates: list[float] = []
    alive: list[Tensor] = []
    exact, plain, with_launch = False, True, len(groups) <= t.RATES
    for group in groups:  # as few calls as can be: schedulers change the rows in every step
        flags = t.MAXIMIZE if group["maximize"] else 0
        if group["decoupled_weight_decay"]:
            flags |= t.DECOUPLED
        values, addresses = [group["lr"], *group["betas"]], [0, 0, 0]
        for i, x in enumerate(tuple(values)):
            if isinstance(x, Tensor):
                values[i], addresses[i], code = _scalar(x, device, alive)
                flags |= code << (t.CODES_SHIFT + 2 * i)
            else:
                values[i] = float(x)
        values += float(group["eps"]), float(group["weight_decay"])
        exact |= 0 < values[t.EPS] < 2.0**-126 or values[t.EPS] > 2.0**125
        # of betas on the device there are zeros here
        plain &= 1 - values[t.BETA1] < 0.5 and 1 - values[t.BETA2] < 0.5
        plain &= bool(flags & t.DECOUPLED) or values[t.WEIGHT_DECAY] == 0
        rest = flags, norm, group.get("seed", 0)
        rates.append(values[t.LR])
        if with_launch:
            values[t.LR] = 0.0  # so that another one changes no word
        rows.append(t.GROUP_ROW.pack(*values, *addresses, *rest))
    words = np.frombuffer(b"".join(rows), dtype=np.int64)  # read-only
    return GroupRows(words, alive, exact, plain, t.pack_rates(rates) if with_launch else ())


def _scalar(x: Tensor, device: torch.device, alive: list[Tensor]) -> tuple[float, int, int]:
    """Value, address and dtype code of a hyper-parameter: one of the first two, the other 0."""
    x = local(x)
    if x.device != device and x.device.type == "cpu":
        return float(x.detach()), 0, 0
    dtype = x.dtype if x.dtype in t.SCALAR_CODES else torch.float64
    scalar = x.detach().to(device, dtype, non_blocking=True)
    alive.append(scalar)
    return 0.0, scalar.data_ptr(), t.SCALAR_CODES[dtype]


class Hypers:
    """The options of all groups, as checked last, and rows made of them."""

    def __init__(self) -> None:
        self.stored: list[tuple[Any, ...]] = []  # those that say what is stored, and how
        self._rates: list[Any] = []  # lrs
        self._others: list[tuple[Any, ...]] = []  # where all are numbers
        self._rows: dict[torch.device, GroupRows] = {}

    def check(self, groups: Sequence[Mapping[str, Any]], max_norm: float | None) -> None:
        """Check options that are not as they were, and forget the rows made of them."""
        rates = [g["lr"] for g in groups]
        others = [(*_others_of(g), *g["betas"]) for g in groups]
        stored = [(g["amsgrad"], g["differentiable"], *options_of(g)) for g in groups]
        kinds = set(map(type, chain(rates, *others)))
        if not kinds <= _NO_TENSORS and any(issubclass(kind, Tensor) for kind in kinds):
            others = []  # they change in place, and comparing them would wait for the device
        else:
            others.append((max_norm,))
        if others and others == self._others and stored == self.stored:
            if rates == self._rates:
                return
            # as schedulers leave them
            if set(map(type, rates)) == {float} and all(map(math.isfinite, rates)):
                self._rows = {device: rows.with_rates(rates) for device, rows in self._rows.items()}
                self._rates = rates
                return
        for group in groups:
            check_group(group)
        self._others, self.stored, self._rates, self._rows = others, stored, rates, {}

    def rows(
        self, groups: Sequence[Mapping[str, Any]], device: torch.device, max_norm: float | None
    ) -> GroupRows:
        """Rows of checked groups for a device's table."""
        rows = self._rows.get(device)
        if rows is None:
            rows = self._rows[device] = group_rows(groups, device, max_norm)
        return rows

    def alive(self, device: torch.device) -> Sequence[Tensor]:
        """Device scalars that the rows point to."""
        rows = self._rows.get(device)
        return () if rows is None else rows.alive
