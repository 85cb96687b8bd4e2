"""Memory layouts: what they are, and whether two tensors have the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REALS = {torch.complex128: torch.float64, torch.complex64: torch.float32}


_LOW = 2**33


class Described(NamedTuple):
    """Addresses, dtypes and layouts of many tensors, in lists that are quick to make and compare.

    Contiguous tensors are told apart by numel, others by shape and strides. A sign or a conjugate
    that is applied only when read (`is_neg`, `is_conj`) comes from complex tensors: those can be
    conjugated, and an imaginary part negated, which is contiguous only if it is one element (unless
    as_strided made it so).
    """

    addresses: list[int]
    kinds: tuple[list[torch.dtype], list[int], list[bool]]  # dtype, numel, whether contiguous
    others: list[tuple[torch.Size, tuple[int, ...], bool]]  # shape, strides, negated
    lazy: list[bool]  # of complex tensors and of single elements

    @classmethod
    def of(cls, tensors: Sequence[Tensor], before: Described | None) -> Described:
        """Ask tensors; before itself where all is as it was, so that the answers are not kept.

        Raises what torch raises for one without address or strides.
        """
        addresses = list(map(Tensor.data_ptr, tensors))
        kinds = (
            [x.dtype for x in tensors],
            list(map(Tensor.numel, tensors)),
            list(map(Tensor.is_contiguous, tensors)),
        )
        if before is not None and kinds == before.kinds:  # they say who has to be asked more
            kinds, strided, signed = before.kinds, bool(before.others), bool(before.lazy)
        else:
            dtypes, numels, contiguous = kinds
            strided = not all(contiguous)
            signed = 1 in numels or any(dtype.is_complex for dtype in set(dtypes))
        others, lazy = [], []
        if strided:
            others = [(x.shape, x.stride(), x.is_neg()) for x in tensors if not x.is_contiguous()]
        if signed:
            lazy = [x.is_conj() or x.is_neg() for x in tensors if x.is_complex() or x.numel() == 1]
        now = addresses, kinds, others, lazy
        return before if before is not None and now == before else cls(*now)

    def may_lack_memory(self) -> bool:
        """Whether some address is so low that it may be an offset alone, in memory that is freed.

        On GPUs none is; on CPUs some are.
        """
        return min(self.addresses, default=_LOW) < _LOW

    def same_kinds(self, other: Described) -> bool:
        """Whether all but the addresses is equal."""
        return self[1:] == other[1:]


class GradLayout(NamedTuple):
    """What a gradient is besides its address."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    numel: int
    contiguous: bool
    lazy: bool  # conjugated or negated only when read


def grad_layout(grad: Tensor) -> GradLayout:
    """The layout of a strided gradient."""
    lazy = grad.is_conj() or grad.is_neg()
    return GradLayout(
        grad.dtype, grad.shape, grad.stride(), grad.numel(), grad.is_contiguous(), lazy
    )


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


@torch.no_grad()
def dense_copy(x: Tensor) -> Tensor:
    """A copy without gaps, its dimensions in the same order in memory."""
    return torch.empty_like(x, memory_format=torch.preserve_format).copy_(x)


def memory_line(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory, [numel], a view."""
    return x.as_strided((x.numel(),), (1,))


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
