"""Memory layouts: what they are, and whether two tensors have the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REALS = {torch.complex128: torch.float64, torch.complex64: torch.float32}


class Layouts(NamedTuple):
    """Dtypes and layouts of many tensors, in lists that are quick to make and to compare.

    Shape and strides are listed where they matter: contiguous tensors are told apart by numel.
    """

    dtypes: list[torch.dtype]
    numels: list[int]
    contiguous: list[bool]
    others: list[tuple[torch.Size, tuple[int, ...]]]
    lazy: list[bool]


def layouts_of(tensors: Sequence[Tensor]) -> Layouts:
    """The layouts of strided tensors."""
    contiguous = list(map(Tensor.is_contiguous, tensors))
    return Layouts(
        dtypes=[x.dtype for x in tensors],
        numels=list(map(Tensor.numel, tensors)),
        contiguous=contiguous,
        others=[
            (x.shape, x.stride()) for x, plain in zip(tensors, contiguous, strict=True) if not plain
        ],
        lazy=[x.is_conj() or x.is_neg() for x in tensors],
    )


class Kinds:
    """What tensors were besides their addresses; keeps none of them alive.

    torch's compiled-code guards compare dtype, sizes, strides and lazy bits of all tensors in one
    call: 0.08 us a tensor, where Python's lists take 0.25. They are private, so whatever they do
    not say, or do not exist to say, the lists decide.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._layouts = layouts_of(tensors)
        self._guards: Any = None

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these tensors are of the same kinds, one by one."""
        if self._guards is not None and self._guards.check(*tensors):
            return True
        if layouts_of(tensors) != self._layouts:
            return False
        self._guards = _guards(tensors)  # they held once: quick from now on
        return True


def _guards(tensors: Sequence[Tensor]) -> Any:
    if not tensors:
        return None
    any_dim = [[None] * x.dim() for x in tensors]  # None: this size, and this stride, is fixed
    try:
        from torch._C._dynamo.guards import TensorGuards

        # each takes a list for each tensor; torch's stub leaves out the outer one
        return TensorGuards(
            *tensors,
            dynamic_dims_sizes=any_dim,  # type: ignore[arg-type]
            dynamic_dims_strides=any_dim,  # type: ignore[arg-type]
        )
    except (ImportError, TypeError, ValueError, RuntimeError):
        return None


class GradLayout(NamedTuple):
    """What a gradient is besides its address."""

    dtype: torch.dtype
    stride: tuple[int, ...]
    numel: int
    lazy: bool  # conjugated or negated only when read


def grad_layout(grad: Tensor) -> GradLayout:
    """The layout of a strided gradient."""
    lazy = grad.is_conj() or grad.is_neg()
    return GradLayout(grad.dtype, grad.stride(), grad.numel(), lazy)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_strides(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether equal indices lie at equal offsets; strides of size-1 dimensions say nothing."""
    return (
        a == b or all(n == 1 or x == y for n, x, y in zip(shape, a, b, strict=True)) or 0 in shape
    )


def overlaps_itself(x: Tensor) -> bool:
    """Whether several indices share an element, as in an expanded tensor."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return x.numel() > 0
            reach += (size - 1) * stride
    return False
