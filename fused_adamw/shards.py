"""DTensors: a step updates the part that lies on this rank, a plain tensor, without their dispatch.

FSDP2, HSDP, tensor and expert parallelism make parameters DTensors. AdamW goes element by element,
so a shard is updated alone; the one thing that needs other ranks is a gradient that is laid out in
another way than its parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_PLAIN = {Tensor, torch.nn.Parameter}


def is_sharded(x: object) -> TypeGuard[DTensor]:
    """Whether x is a DTensor."""
    kind = _dtensor()
    return kind is not None and isinstance(x, kind)


def _dtensor() -> type[DTensor] | None:
    # who has one has imported it; doing so here would cost everyone a second
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_flattened(x: Tensor) -> bool:
    """Whether x is FSDP1's: a flat param, or a part of one (`use_orig_params=True`)."""
    return bool(getattr(x, "_fsdp_flattened", False))  # private, but all that tells of both


def local(x: Tensor) -> Tensor:
    """What lies on this rank: x itself, unless it is a DTensor."""
    # not to_local(): on a Parameter it makes a new view in every call
    return x._local_tensor if is_sharded(x) else x


def local_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parameter's state as it lies on this rank."""
    kind = _dtensor()
    if kind is None:
        return state
    return {key: x._local_tensor if isinstance(x, kind) else x for key, x in state.items()}


def as_param(x: Tensor, param: Tensor) -> Tensor:
    """A tensor that lies on this rank as a DTensor of the param's mesh and placements.

    x has the local shape of the param, or is [rows, n] with one part in n of each row's elements.
    """
    if not is_sharded(param):
        return x
    shape, stride = param.shape, param.stride()
    if x.shape != param._local_tensor.shape:  # exponents of 8-bit moments
        columns = param.shape[1:].numel()
        own = param._local_tensor.shape[1:].numel()
        shape = torch.Size((param.shape[0], columns * x.shape[1] // own if own else 0))
        stride = (shape[1], 1)
    made: Tensor = type(param).from_local(
        x, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride
    )
    return made


def row_of_shard(param: DTensor) -> int:
    """How many elements each rank has of a row, [1:]; 0 where that differs, or they are apart."""
    parts = 1
    for dimension, placement in enumerate(param.placements):
        cut = getattr(placement, "dim", None)  # FSDP2's shards of tensor parallel ones have it, too
        if cut == 1:
            parts *= param.device_mesh.size(dimension)
        elif cut != 0 and not placement.is_replicate():
            return 0
    return 0 if param.shape[1] % parts else param.shape[1:].numel() // parts


class Place(NamedTuple):
    """Where a shard's elements lie in the whole tensor, both row-major.

    Element i is its element first + i // inner * inner_whole + i % inner; with inner 0, first + i.
    """

    first: int = 0
    inner: int = 0
    inner_whole: int = 0


def place_of(name: str, param: Tensor) -> Place:
    """Where the elements on this rank lie in the whole param.

    Raises:
        RuntimeError: a DTensor sharded on more than the first and one other dimension.
    """
    if not is_sharded(param):
        return Place()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    others = [d for d in range(1, param.dim()) if shape[d] != param.shape[d]]
    here = torch.empty_like(param._local_tensor, device="meta")  # without gaps, as it is updated
    if len(others) > 1 or not here.is_contiguous():
        raise RuntimeError(
            f"{name} is a DTensor of {param.placements}: stochastic rounding and 8-bit moments "
            "need to know where its elements lie in the whole tensor, and can tell for row-major "
            "shards of the first dimension and at most one other. Use neither for its group."
        )
    if not others:
        return Place(offset[0] * param.shape[1:].numel() if param.dim() else 0)
    cut = others[0]
    behind = param.shape[cut + 1 :].numel()
    inner, inner_whole = shape[cut] * behind, param.shape[cut] * behind
    before = offset[0] * param.shape[1:cut].numel() * inner_whole
    return Place(before + offset[cut] * behind, inner, inner_whole)


class LocalGrads(NamedTuple):
    """Gradients as they lie on this rank, in the order of the params."""

    grads: list[Tensor | None]
    moved: dict[int, Tensor]  # DTensors that had to be laid out anew, by place


def local_grads(params: Sequence[Tensor], name: Callable[[int], str]) -> LocalGrads | None:
    """The local gradients, laid out as their params; None where no param is a DTensor.

    Replicated params under sequence parallelism get gradients that are partial sums: taken as they
    lie they would be silently wrong. Laying them out is a collective, so this has to be called once
    a step, on every rank, whatever else is known of the step.

    name: what messages call the param at a place.

    Raises:
        TypeError: a DTensor whose gradient is not one, or lies on another mesh.
    """
    kinds = set(map(type, params))
    if kinds <= _PLAIN:  # as nearly all are
        return None
    kind = _dtensor()
    if kind is None or not any(issubclass(c, kind) for c in kinds):
        return None
    result = LocalGrads([], {})
    for place, p in enumerate(params):
        grad = p.grad
        if grad is not None and is_sharded(p):
            if not is_sharded(grad) or grad.device_mesh != p.device_mesh:
                one = f"another, {grad.device_mesh}" if is_sharded(grad) else "no mesh"
                raise TypeError(
                    f"{name(place)} is a DTensor on {p.device_mesh} but its gradient is a "
                    f"{type(grad).__name__} on {one}. Assign a DTensor of the param's mesh, as "
                    "backward() does."
                )
            if grad.placements != p.placements:
                grad = grad.redistribute(placements=p.placements)
                result.moved[place] = grad
        if grad is not None and (is_sharded(p) or not is_sharded(grad)):
            grad = local_now(grad)
        result.grads.append(grad)  # a plain param's DTensor is refused as it is
    return result


def replicated(x: Tensor, param: DTensor) -> DTensor:
    """A tensor that is the same on all ranks as a DTensor on the param's mesh."""
    from torch.distributed.tensor import Replicate

    everywhere = [Replicate()] * param.device_mesh.ndim
    made: DTensor = type(param).from_local(x, param.device_mesh, everywhere, run_check=False)
    return made


def in_reach(x: DTensor, param: Tensor) -> bool:
    """Whether a loaded DTensor's mesh has all ranks of the param's, or of a plain param all ranks.

    A plain param of a pipeline's stage may be on fewer; it cannot be told from here.
    """
    if is_sharded(param):
        wanted = set(param.device_mesh.mesh.flatten().tolist())
    else:
        wanted = set(range(torch.distributed.get_world_size()))
    return wanted <= set(x.device_mesh.mesh.flatten().tolist())


def whole_if_elsewhere(x: Tensor, param: Tensor) -> Tensor:
    """The whole of a loaded DTensor that is not on the param's mesh, or x itself."""
    if not is_sharded(x) or (is_sharded(param) and x.device_mesh == param.device_mesh):
        return x
    return x.full_tensor()


def local_of_loaded(x: Tensor, param: Tensor) -> Tensor:
    """Part of a loaded state on this rank, from a DTensor on the mesh of the param or the whole."""
    if not is_sharded(param) or (not is_sharded(x) and x.shape != param.shape):
        return local_now(x)  # what does not fit is refused by its shape
    if not is_sharded(x):
        x = replicated(x, param)
    if is_sharded(x) and x.placements != param.placements:
        x = x.redistribute(param.device_mesh, param.placements)
    return local_now(x)


def check_state_lies_as(
    name: str, param: Tensor, state: Mapping[str, Any], keys: Collection[str]
) -> None:
    """Raise TypeError for a DTensor state of AdamW's that is cut in another way than its param.

    Its part on this rank may be as large, and be of other elements all the same. keys: of states,
    besides the step.
    """
    if _dtensor() is None:
        return
    for key, x in state.items():
        if not is_sharded(x):
            continue
        if key == "step":
            fits = all(where.is_replicate() for where in x.placements)
        elif key in keys:
            fits = is_sharded(param) and (x.device_mesh, x.placements) == (
                param.device_mesh,
                param.placements,
            )
            fits &= x.shape == param.shape or key.endswith("_scale")
        else:  # the user's own
            continue
        if not fits:
            own = f"{param.placements} on {param.device_mesh}" if is_sharded(param) else "plain"
            raise TypeError(
                f"{key} of {name} is a DTensor of shape {tuple(x.shape)}, {x.placements} on "
                f"{x.device_mesh}, but the param has shape {tuple(param.shape)} and is {own}; a "
                "step is replicated. Lay it out as the param is (redistribute, full_tensor), or "
                "call load_state_dict, which does so."
            )


def local_now(x: Tensor) -> Tensor:
    """What lies on this rank, when a collective that makes it has ended."""
    x = local(x)
    wait = getattr(x, "wait", None)  # an AsyncCollectiveTensor: the stream waits, not the host
    return x if wait is None else wait()
