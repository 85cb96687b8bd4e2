"""Sums of the squares of all gradients of a device, in one launch over the table's chunks.

Squares are taken and added in float64: those of float32 gradients neither overflow nor vanish, and
a sum that is not finite means a gradient that is not. (Float64 gradients beyond 1e154 do overflow.)
Each program walks every n-th chunk and has a cell of its own, so there is no atomic addition, and
the sum has the same bits in every run. Tensors whose squares are added up over different ranks have
sums of their own: for each set of ranks there are as many programs, which pass over the others'.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import table as t
from .adamw import constexpr_signatures
from .columns import NUMEL, SIGNATURE, TENSOR_WORDS
from .front import Call, Front
from .streams import _VECTOR, _at

_MESH = tl.constexpr(t.MESH)


@triton.jit
def _squares(
    grad, start, first, last, GRAD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Squares of the elements [first, last) of a block, and 0 elsewhere."""
    lane = tl.arange(0, BLOCK)
    mask = lane < last
    if not ALIGNED:
        mask &= lane >= first
    g = tl.load(_at(grad, start, lane, GRAD, ALIGNED), mask=mask, other=0).to(tl.float64)
    return g * g


@triton.jit(
    do_not_specialize=["grads", "tensors", "chunks", "n_chunks", "blocks_per_chunk", "n_sums"],
    do_not_specialize_on_alignment=["sums"],
)
def _sum_squares(
    grads: tl.int64,  # addresses of parts of the table, int64: see table.py
    tensors: tl.int64,
    chunks: tl.int64,
    sums,  # float64 [meshes, n_sums], as many as there are programs
    n_chunks,
    blocks_per_chunk,
    n_sums,
    SIGNATURES: tl.constexpr,  # as adamw.py has them
    BLOCK: tl.constexpr,
    ONE: tl.constexpr,  # whether there is one mesh: 8 to 16 registers fewer, and more in flight
):
    grads = grads.to(tl.pointer_type(tl.int64))
    tensors = tensors.to(tl.pointer_type(tl.int64))
    chunks = chunks.to(tl.pointer_type(tl.int64))
    total = tl.zeros([BLOCK], tl.float64)
    i = tl.program_id(0)
    if not ONE:
        mesh = i // n_sums  # only tensors of this number count
        i %= n_sums
    while i < n_chunks:
        chunk = tl.load(chunks + i)
        index = chunk & 0xFFFFFFFF
        tensor = tensors + index * TENSOR_WORDS
        grad = tl.load(grads + index)
        signature = tl.load(tensor + SIGNATURE).to(tl.int32)
        block = chunk >> 32
        n_blocks = tl.minimum(
            (tl.load(tensor + NUMEL) + BLOCK - 1) // BLOCK, block + blocks_per_chunk
        )
        here = grad != 0
        if not ONE:
            here &= tl.load(tensor + _MESH) == mesh
        if not here:
            n_blocks = block
        while block < n_blocks:
            start = block * BLOCK
            size = tl.minimum(tl.load(tensor + NUMEL) - start, BLOCK).to(tl.int32)
            vectors = tl.where(grad % 16 == 0, size // _VECTOR, 0) * _VECTOR  # as in adamw.py
            for s in tl.static_range(len(SIGNATURES)):
                if signature == s:
                    if vectors > 0:
                        total += _squares(grad, start, 0, vectors, SIGNATURES[s][1], True, BLOCK)
                    if vectors < size:
                        total += _squares(
                            grad, start, vectors, size, SIGNATURES[s][1], False, BLOCK
                        )
            block += 1
        i += n_sums
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


def sum_squares(front: Front, table: t.Table, words: Tensor, sums: Tensor, meshes: int = 1) -> None:
    """Write each program's sum of squares to `sums`, float64 [meshes, table.n_sums].

    Those in a row are to be added: they are of the tensors with the row's number of a mesh.
    """
    at, (grads, tensors, chunks) = words.data_ptr(), table.offsets
    front.launch(
        _sum_squares,
        ("norm", table.signatures, table.parameters, meshes == 1),
        meshes * table.n_sums,
        (
            at + grads,
            at + tensors,
            at + chunks,
            sums,
            table.n_chunks,
            table.blocks_per_chunk,
            table.n_sums,
        ),
        lambda: _call(table, meshes),
    )


def _call(table: t.Table, meshes: int) -> Call:
    tuned = table.parameters
    return Call(
        {
            "SIGNATURES": constexpr_signatures(table.signatures),
            "BLOCK": tuned.elements,
            "ONE": meshes == 1,
        },
        {
            "num_warps": tuned.num_warps * min(tuned.blocks_per_program, 4),
            "enable_fp_fusion": False,
        },
    )
