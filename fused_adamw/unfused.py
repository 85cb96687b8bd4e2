"""Steps without a kernel: the reference's, and torch's own where autograd shall see them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from . import formats, reference
from .entries import Entry, Grads, Groups, State
from .launch import Asked
from .norm import decide
from .shards import local_state
from .telemetry import Measures


def run_reference(
    entries: Sequence[Entry],
    grads: Grads,
    groups: Groups,
    state: State,
    asked: Asked,
    norm: tuple[Tensor, Tensor] | None,
    measures: Measures | None,
) -> None:
    """Update what has a gradient, piece by piece in torch; twin of the launches, norm apart.

    norm: sums of squares of all gradients, to be added up, and where to note the metrics.
    """
    scale = 1.0 if asked.grad_scale is None else float(asked.grad_scale)
    factor: float | None = 1.0
    overflow = asked.found_inf is not None and float(asked.found_inf) != 0
    if norm is not None:
        sums, metrics = norm
        factor = decide(sums, asked.grad_scale, asked.found_inf, asked.clipping, metrics)
    if overflow or factor is None:
        return
    for x in measures or ():
        x.zero_()
    busy = [
        (i, e, grad, state[e.param] if e.param is e.local else local_state(state[e.param]))
        for i, e in enumerate(entries)
        if (grad := grads[e.place]) is not None
    ]
    known: dict[tuple[int, float, torch.dtype], reference.Scalars] = {}
    steps = _count([own["step"] for *_, own in busy])
    for (i, e, grad, own), step in zip(busy, steps, strict=True):
        param = e.local if e.dense is None else e.dense
        key = e.group, step, reference.arithmetic(param)
        if key not in known:
            known[key] = reference.schedule(groups[e.group], step, scale, factor, key[2])
        if e.grad_copy is not None:
            grad = e.grad_copy
        measured = None
        if measures is not None:
            measures.counted[i] = param.numel() * (2 if param.is_complex() else 1)
            measured = measures.rows[i]
        if e.storage.plain:
            reference.adamw(
                param,
                grad,
                own["exp_avg"],
                own["exp_avg_sq"],
                own["max_exp_avg_sq"] if e.storage.amsgrad else None,
                known[key],
                store_grad=asked.grad_scale is not None,
                measures=measured,
            )
            continue
        seed = groups[e.group].get("seed", 0)
        keys = formats.random_keys(seed, int(step), e.position)
        reference.adamw_stored(
            param,
            grad,
            own,
            e.storage,
            known[key],
            reference.Random(*keys, e.part),
            store_grad=asked.grad_scale is not None,
            measures=measured,
        )


def _count(steps: list[Tensor]) -> Iterable[float]:
    """Add 1 to each, and say what it is then."""
    if len(set(map(id, steps))) < len(steps):
        # a param that is listed twice is updated twice, and its counter read in between
        return (float(x.add_(1)) for x in steps)
    if steps:  # at once, and a tensor instead of a number: a fifth of the time of x.add_(1)
        torch._foreach_add_(steps, torch.ones((), device=steps[0].device))
    return map(float, steps)


def run_differentiable(group: dict[str, Any], state: State, step_dtype: torch.dtype) -> None:
    """torch's own functional AdamW, operation by operation, so that autograd sees each."""
    params = [p for p in group["params"] if p.grad is not None]
    for p in params:
        own = state[p]
        if "step" not in own:
            own["step"] = torch.zeros((), dtype=step_dtype, device=p.device)
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        for name in names:
            if name not in own:
                own[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    states = [state[p] for p in params]
    function = adamw if group["decoupled_weight_decay"] else adam
    function(
        params,
        [p.grad for p in params],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else [],
        [s["step"] for s in states],
        foreach=False,
        differentiable=True,
        fused=False,
        has_complex=any(p.is_complex() for p in params),
        amsgrad=group["amsgrad"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
