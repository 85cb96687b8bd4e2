"""AdamW in plain torch: the path of CPU tensors, and the oracle of the kernels.

Twins of the kernels by name: `schedule` of kernels/schedule.py, `adamw_update` of its update.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import formats
from .kernels import table as t
from .layouts import memory_line
from .shards import Place
from .storage import MASTER, REMAINDER, Storage, decoded, encoded, master_of

# Elements: 1 MiB of each float32 stream. On 2 cores of an AMD EPYC with 32 MiB of L3, one thread:
# 32k 2.5x, 64k 2.9x, 128k 3.3x, 256k 3.5x the speed of torch's default (one tensor of 20M).
PIECE_PER_THREAD = 262144


class Scalars(NamedTuple):
    """What one step of one tensor needs beyond its elements (float64, computed by `schedule`)."""

    grad_factor: float  # +-clip/scale: maximize, unscale and clip cost one multiplication
    unscale: float
    one_minus_beta1: float
    one_minus_beta2: float
    rsqrt_bias2: float  # 1 / sqrt(1 - beta2^t)
    eps: Tensor  # 0-dim, in the dtype of the arithmetic: a product is added to it in one pass
    neg_step_size: float  # -lr / (1 - beta1^t)
    decay: float  # -lr * weight_decay, decoupled
    l2: float  # weight_decay, in the gradient


def arithmetic(param: Tensor) -> torch.dtype:
    """float64 for a param in it, real or complex, else float32."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def schedule(
    group: Mapping[str, Any],
    step: float,
    grad_scale: float = 1.0,
    clip_factor: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Scalars:
    """Scalars of the `step`-th update (counted from 1) under the hyper-parameters of `group`.

    dtype: of the arithmetic that they are for.
    """
    lr, beta1, beta2 = (
        float(x.detach() if isinstance(x, Tensor) else x) for x in (group["lr"], *group["betas"])
    )
    weight_decay, decoupled = float(group["weight_decay"]), group["decoupled_weight_decay"]
    unscale = 1 / grad_scale if grad_scale else float("inf")
    return Scalars(
        grad_factor=(-unscale if group["maximize"] else unscale) * clip_factor,
        unscale=unscale,
        one_minus_beta1=1 - beta1,
        one_minus_beta2=1 - beta2,
        rsqrt_bias2=(1 - beta2**step) ** -0.5,
        eps=torch.tensor(float(group["eps"]), dtype=dtype, device="cpu"),
        neg_step_size=-lr / (1 - beta1**step),
        decay=-lr * weight_decay if decoupled else 0.0,
        l2=0.0 if decoupled else weight_decay,
    )


def adamw_update(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, v_max: Tensor | None, d: Tensor, s: Scalars
) -> None:
    """One AdamW update, in place, of p, m, v and v_max; g may be overwritten, d is scratch.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101,
    algorithm 2; v_max: Reddi et al., https://openreview.net/forum?id=ryQu7f-RZ.
    """
    if s.grad_factor != 1:
        g.mul_(s.grad_factor)
    if s.l2:
        g.add_(p, alpha=s.l2)
    m.lerp_(g, s.one_minus_beta1)
    # An overflowed one counts as the largest number: inf - inf is NaN. Looking first saves a pass
    # on the CPU (the sum is quicker than the maximum), and would wait for any other device.
    if v.device.type != "cpu" or not v.sum().item() < math.inf:
        v.clamp_(max=torch.finfo(v.dtype).max)
    v.lerp_(torch.mul(g, g, out=d), s.one_minus_beta2)
    if v_max is not None:
        torch.maximum(v_max, v, out=v_max)  # keeps NaN
    torch.sqrt(v if v_max is None else v_max, out=d)
    torch.add(s.eps, d, alpha=s.rsqrt_bias2, out=d)
    if s.decay:
        p.add_(p, alpha=s.decay)
    p.addcdiv_(m, d, value=s.neg_step_size)


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    scalars: Scalars,
    store_grad: bool = False,
    measures: Tensor | None = None,
) -> None:
    """Update one tensor piece by piece, so that all temporaries stay in the cache.

    The tensors are dense and share one memory layout; dtypes are free (float64 params are computed
    in float64, all others in float32, with one rounding at the store). With `store_grad` the
    unscaled gradient is left in `grad`. `measures`: float64 [MEASURES], sums to add to, or None.
    """
    compute = arithmetic(param)
    kept = [param, exp_avg, exp_avg_sq]
    if max_exp_avg_sq is not None:
        kept.append(max_exp_avg_sq)
    in_place = (  # the update reads the gradient where it is, as nothing is to be written to it
        grad.dtype in (compute, compute.to_complex())
        and scalars.grad_factor == 1
        and not scalars.l2
        and (not store_grad or scalars.unscale == 1)
    )
    scratch: list[Tensor] = []
    for g_stored, *stored in _pieces([grad, *kept], PIECE_PER_THREAD * torch.get_num_threads()):
        converted = [x for x in stored if x.dtype != compute]
        if not scratch:  # the first piece is the largest
            needed = 1 + (not in_place) + len(converted)
            scratch = [torch.empty_like(g_stored, dtype=compute) for _ in range(needed)]
        elif len(scratch[0]) > len(g_stored):
            scratch = [x[: len(g_stored)] for x in scratch]
        d, *buffers = scratch
        g = g_stored if in_place else buffers.pop().copy_(g_stored)
        if store_grad:
            g_stored.copy_(torch.mul(g, scalars.unscale, out=d))
        values = stored
        if converted:
            values = [x if x.dtype == compute else buffers.pop().copy_(x) for x in stored]
        p, m, v, *maximum = values
        old = None if measures is None else p.clone()
        adamw_update(p, g, m, v, maximum[0] if maximum else None, d, scalars)
        if converted:
            for x, value in zip(stored, values, strict=True):
                if value is not x:
                    x.copy_(value)
        if measures is not None and old is not None:
            measure(_added(old, m, d, scalars), old, stored[0].to(compute), measures)


def _added(old: Tensor, m: Tensor, d: Tensor, scalars: Scalars) -> Tensor:
    """What an update was to add to p, decay included."""
    decayed = old * scalars.decay if scalars.decay else torch.zeros_like(old)
    return decayed.addcdiv_(m, d, value=scalars.neg_step_size)


def measure(added: Tensor, old: Tensor, kept: Tensor, sums: Tensor) -> None:
    """Add what an update has done to `sums`, float64 [MEASURES].

    added: to p, before any rounding to its own spacing; kept: p as it is read in the next step.
    """
    sums[t.ADDED_SQUARES] += added.double().square().sum()
    sums[t.PARAM_SQUARES] += kept.double().square().sum()
    sums[t.ADDED] += added.count_nonzero()
    sums[t.LOST] += ((added != 0) & (kept == old)).count_nonzero()


class Random(NamedTuple):
    """What the random bits of one update of one tensor depend on."""

    key0: int
    key1: int
    place: Place

    def bits(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two times 32 bits for each element [start, stop) of the part that lies here, int64."""
        index = torch.arange(start, stop, device=device)
        first, inner, inner_whole = self.place
        if inner:
            index += index // inner * (inner_whole - inner)
        return formats.random_bits(index + first, self.key0, self.key1)


def adamw_stored(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    storage: Storage,
    scalars: Scalars,
    random: Random,
    store_grad: bool = False,
    measures: Tensor | None = None,
) -> None:
    """Update one real tensor with a master, 8-bit moments or stochastic rounding, piece by piece.

    Decodes, updates and encodes as kernels/adamw.py does; grad, param and states are dense and
    share one layout.
    """
    lines = {key: memory_line(x) for key, x in state.items() if key in storage.keys}
    lines |= {"param": memory_line(param), "grad": memory_line(grad)}
    size = PIECE_PER_THREAD * torch.get_num_threads()  # whole quantisation blocks
    for start in range(0, param.numel(), size):
        piece = {
            key: x[start // t.QUANT_BLOCK : -(-(start + size) // t.QUANT_BLOCK)]
            if key.endswith("_scale")
            else x[start : start + size]
            for key, x in lines.items()
        }
        p, g = master_of(piece["param"], piece), piece["grad"].to(torch.float32, copy=True)
        m, v, *maximum = (_decoded(name, piece) for name in storage.moments)
        if store_grad:
            piece["grad"].copy_(g * scalars.unscale)
        old, d = None if measures is None else p.clone(), torch.empty_like(p)
        adamw_update(p, g, m, v, maximum[0] if maximum else None, d, scalars)
        for_second, for_param = (
            random.bits(start, start + len(p), p.device) if storage.random else (None, None)
        )
        _encode_param(piece, p, for_param if storage.stochastic else None)
        for name, x in zip(storage.moments, (m, v, *maximum), strict=True):
            _encode(name, piece, x, None if name == "exp_avg" else for_second)
        if measures is not None and old is not None:
            measure(_added(old, m, d, scalars), old, master_of(piece["param"], piece), measures)


def _encode_param(piece: Mapping[str, Tensor], p: Tensor, random: Tensor | None) -> None:
    param = piece["param"]
    if REMAINDER in piece:
        high, remainder = formats.encode_remainder(p)
        param.copy_(high)
        piece[REMAINDER].copy_(remainder.view(torch.bfloat16))
    elif MASTER in piece:
        param.copy_(p)
        piece[MASTER].copy_(p)
    elif random is not None and param.dtype == torch.bfloat16:
        param.copy_(formats.round_stochastic(p, random))
    else:
        param.copy_(p)


def _decoded(name: str, piece: Mapping[str, Tensor]) -> Tensor:
    x = decoded(name, piece)
    assert x is not None, "the state was checked"
    return x.to(torch.float32, copy=name in piece)


def _encode(name: str, piece: Mapping[str, Tensor], x: Tensor, random: Tensor | None) -> None:
    if name not in piece:
        for key, value in zip(("_q", "_scale"), encoded(name, x, random), strict=True):
            piece[name + key].copy_(value)
    elif random is not None and piece[name].dtype == torch.bfloat16:
        piece[name].copy_(formats.round_stochastic(x, random))
    else:
        piece[name].copy_(x)


def sum_squares(grads: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all elements, float64 [1], on the gradients' device.

    Taken in float64, so that they neither overflow nor vanish, piece by piece.
    """
    total: Tensor | None = None
    for grad in grads:
        if total is None:
            total = torch.zeros(1, dtype=torch.float64, device=grad.device)
        grad = grad.resolve_conj().resolve_neg()
        line = (torch.view_as_real(grad) if grad.is_complex() else grad).reshape(-1)
        size = PIECE_PER_THREAD * torch.get_num_threads()
        for start in range(0, len(line), size):
            wide = line[start : start + size].double()
            total += torch.dot(wide, wide)
    return torch.zeros(1, dtype=torch.float64) if total is None else total


def _pieces(tensors: Sequence[Tensor], size: int) -> Iterable[Sequence[Tensor]]:
    """Dense tensors of one layout, cut alike into pieces of at most `size` reals."""
    if tensors[0].is_complex() or tensors[1].is_complex():
        tensors = [torch.view_as_real(x) if x.is_complex() else x for x in tensors]
    numel, shape = tensors[0].numel(), tensors[0].shape
    if not numel:
        return []
    if numel <= size and all(x.shape == shape for x in tensors):
        return [tensors]
    lines = [x.as_strided((numel,), (1,)) for x in tensors]
    return ([line[i : i + size] for line in lines] for i in range(0, numel, size))
