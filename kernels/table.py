"""The table: where every tensor of a device lies, and which program of the launch takes which part.

Host only (torch and numpy, no Triton). The words that the kernels read, int64, in this order:

    groups   [n_groups, GROUP_WORDS]    hyper-parameters, float64 bit patterns and addresses
    grads    [n_tensors]                addresses; 0 = no gradient in this step
    tensors  [n_tensors, TENSOR_WORDS]  addresses of param and states, numel, group, signature
    chunks   [n_chunks]                 tensor index | first block << 32

What changes often comes first, so that whatever a step must upload is one prefix: one copy. Tensors
begin at whole SECTORs of memory; zeros fill the gap.
A chunk is `blocks_per_chunk` blocks of one tensor; a program takes one block. So the list stays
short while every program keeps one block and one code path. (Where a launch has several
`blocks_per_program`, what one program takes counts as a block here.)
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .launch_parameters import LaunchParameters

Words = npt.NDArray[np.int64]

BLOCK = LaunchParameters().block
# The work list is thinned out (to chunks of a power of two of blocks) above this length: 256 KiB
# and 64 bytes a tensor are soon uploaded, and fewer than one program in five has nothing to do.
CHUNKS, CHUNKS_PER_TENSOR = 32768, 8

# words of a row of `groups`
LR, BETA1, BETA2, EPS, WEIGHT_DECAY = range(5)  # float64 bits
LR_AT, BETA1_AT, BETA2_AT = range(5, 8)  # address of a device scalar, 0 = use the value above
FLAGS = 8  # bit 0 maximize, bit 1 decoupled, then 2 bits of dtype code for lr, beta1, beta2
MAX_NORM = 9  # float64 bits; of all gradients, so every group has the same; infinity: no clipping
SEED = 10
GROUP_WORDS = 11
GROUP_ROW = struct.Struct("=5d 3q q d q")  # all of these, in their order
# groups whose lr goes with the launch: schedulers change it in every step, and an upload makes the
# kernels wait for it
RATES = 4
MAXIMIZE, DECOUPLED, CODES_SHIFT = 1, 2, 2
SCALAR_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Words of a row of `tensors`, in the order of need: programs wait for memory by the sector.
SECTOR = 4  # words
PARAM, EXP_AVG, EXP_AVG_SQ, NUMEL = range(4)
SIGNATURE = 4  # its number in the table | UNALIGNED
MASTER = 5  # address of the remainder or the float32 copy, 0 = none
EXP_AVG_SCALE, EXP_AVG_SQ_SCALE = 6, 7  # of 8-bit moments, else 0
MAX_EXP_AVG_SQ, MAX_EXP_AVG_SQ_SCALE = 8, 9
# element i of a shard is element FIRST + i // INNER * INNER_WHOLE + i % INNER of the whole tensor
FIRST, INNER, INNER_WHOLE = range(10, 13)
STEP, STEP_IS_DOUBLE, GROUP = range(13, 16)
MESH = 16  # tensors whose squares are added up over the same ranks have the same number
POSITION = 17  # among all params: what the random bits of two tensors differ by
TENSOR_WORDS = 20  # whole sectors
UNALIGNED = 1 << 32  # elements go one by one, wherever the gradient is

# columns of the scalars that the schedule writes for each tensor; a row is 64 bytes in float32
ACTIVE, GRAD_FACTOR, UNSCALE, W1, W2, RSQRT_BIAS2, EPSILON, NEG_STEP_SIZE, DECAY, L2 = range(10)
KEY0, KEY1 = 10, 11  # of the random bits: uint32, in float32 rows alone
SCALARS = 16

SUMS = (
    2048  # programs, at most, of kernels/norm.py: each leaves one sum to be added by the schedule
)
NORM, CLIP_FACTOR, SKIPPED = range(3)  # what the schedule writes down: float64 [METRICS]
METRICS = 3

# what the main kernel's programs sum up if asked to: float32 [n_programs, MEASURES], 16 bytes each
ADDED_SQUARES, PARAM_SQUARES, ADDED, LOST = range(4)  # ADDED, LOST: numbers of elements
MEASURES = 4

# 8-bit moments: blocks of elements share an exponent, uint8 as in torch.float8_e8m0fnu. A code is
# cut out of the bits of |x| / 2^exponent + FLOOR, so codes are linear up to FLOOR and logarithmic
# above; fused_adamw/formats.py has the measurements that chose them.
QUANT_BLOCK = 64
SIGNED_MANTISSA, SIGNED_FLOOR = 5, 2.0**-3  # 4 binades of 32 codes, and a sign
UNSIGNED_MANTISSA, UNSIGNED_FLOOR = 4, 2.0**-15  # 16 binades of 16 codes
SIGNED_ZERO = (127 - 3) << SIGNED_MANTISSA  # of the floor: what the code 0 is in the cut
UNSIGNED_ZERO = (127 - 15) << UNSIGNED_MANTISSA
# What is added to the bits of a block's largest before its exponent is taken, so that nothing that
# is rounded up leaves the codes: 2 is the end, and floor and (half of) a code come on top.
SIGNED_CARRY = (1 << 20) + (1 << 17)
UNSIGNED_CARRY = 1 << 19
# Bits of the largest number whose block's exponent is 253: the scales of encoding and decoding,
# 2^-126 and 2^127, are the ends of float32's normal numbers. Larger ones count as this.
SIGNED_LARGEST = (254 << 23) - SIGNED_CARRY - 1
UNSIGNED_LARGEST = (254 << 23) - UNSIGNED_CARRY - 1

# Random bits: a hash for 8 elements, which one thread has, and for each of them a multiple of it
# by the power of a multiplier. Taken modulo 2^32, any two and any three of these 8 have a spectral
# figure of merit of at least 0.51, the best of 6,000 multipliers drawn at random.
RANDOM_GROUP = 8
RANDOM_MULTIPLIER = 0x25D88DFD

# kernels/prefetch.py: the blocks asked for at once where a moment has 8 bits, elsewhere one, and
# the bytes of an element's loads from which on enough are under way as it is.
PREFETCH_UNIT, PLENTY = 8, 16

EMPTY_GRAD = 1  # stands for the address of a gradient without elements: present, never read


class Signature(NamedTuple):
    """What a block's code depends on: the storage dtype of each stream, and amsgrad."""

    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype  # uint8: 8-bit codes
    exp_avg_sq: torch.dtype
    amsgrad: bool
    master: torch.dtype | None = None  # int16: the remainder of bf16 params; float32: a copy
    stochastic: bool = False  # bf16 params without master and bf16 second moments
    columns: bool = False  # random bits for a shard whose rows are parts of the whole's

    @property
    def compute(self) -> torch.dtype:
        """Dtype of the arithmetic: float64 for float64 params, else float32."""
        return torch.float64 if self.param == torch.float64 else torch.float32

    @property
    def quantised(self) -> bool:
        """Whether a moment is kept in 8 bits."""
        return torch.uint8 in (self.exp_avg, self.exp_avg_sq)

    @property
    def random(self) -> bool:
        """Whether something may be rounded stochastically."""
        return self.stochastic or self.exp_avg_sq == torch.uint8

    @property
    def bytes_per_element(self) -> float:
        """Bytes for one element: param, moments and master read and written, the gradient read."""
        moments = [self.exp_avg, *[self.exp_avg_sq] * (2 if self.amsgrad else 1)]
        kept: float = self.param.itemsize + sum(x.itemsize for x in moments)
        kept += moments.count(torch.uint8) / QUANT_BLOCK
        if self.master is not None:
            kept += self.master.itemsize
        return 2 * kept + self.grad.itemsize

    @property
    def bytes_read(self) -> float:
        """The part of these that is read."""
        return (self.bytes_per_element + self.grad.itemsize) / 2

    @property
    def prefetches_elements(self) -> bool:
        """Whether its programs ask for later elements, not for tables alone (prefetch.py)."""
        return self.bytes_read < PLENTY


class Row(NamedTuple):
    """One tensor, as the table wants it: a field for each word, of the same name."""

    param: int
    exp_avg: int
    exp_avg_sq: int
    max_exp_avg_sq: int  # 0 without amsgrad
    step: int
    numel: int  # of reals: a complex element counts two
    group: int
    signature: Signature
    step_is_double: bool
    mesh: int = 0
    master: int = 0
    exp_avg_scale: int = 0
    exp_avg_sq_scale: int = 0
    max_exp_avg_sq_scale: int = 0
    position: int = 0
    first: int = 0
    inner: int = 0  # 0: the whole tensor is here, or rows of it in a stretch
    inner_whole: int = 0


_COLUMNS = [  # of a row's fields
    *(PARAM, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, STEP, NUMEL, GROUP, SIGNATURE, STEP_IS_DOUBLE),
    *(MESH, MASTER, EXP_AVG_SCALE, EXP_AVG_SQ_SCALE, MAX_EXP_AVG_SQ_SCALE),
    *(POSITION, FIRST, INNER, INNER_WHOLE),
]


@dataclasses.dataclass(frozen=True)
class Table:
    """Frozen words of one device. Replace the column that moved, keep the rest."""

    groups: Words  # [n_groups * GROUP_WORDS]
    grads: Words  # [n_tensors]
    rest: Words  # [n_tensors * TENSOR_WORDS + n_chunks]
    n_groups: int
    n_tensors: int
    blocks_per_chunk: int  # a power of two
    ahead: int  # programs between a prefetch and the use; 0: nothing is prefetched
    n_programs: int
    signatures: tuple[Signature, ...]  # sorted: the kernel is specialised on them
    parameters: LaunchParameters

    def with_grads(self, grads: Words) -> Table:
        """The same with other gradients, as many: what depends on lengths is not made anew."""
        table = object.__new__(Table)
        table.__dict__.update(self.__dict__, grads=grads)
        return table

    @functools.cached_property
    def tensors_at(self) -> int:
        """Where the rows of tensors begin."""
        return -(-(len(self.groups) + len(self.grads)) // SECTOR) * SECTOR

    @property
    def n_words(self) -> int:
        """Length of groups, grads, tensors and chunks together."""
        return self.tensors_at + len(self.rest)

    @functools.cached_property
    def offsets(self) -> tuple[int, int, int]:
        """Bytes from the first word to grads, tensors and chunks."""
        tensors = 8 * self.tensors_at
        return 8 * len(self.groups), tensors, tensors + 8 * TENSOR_WORDS * self.n_tensors

    @property
    def n_chunks(self) -> int:
        """Length of the work list."""
        return self.n_programs // self.blocks_per_chunk

    @property
    def chunks(self) -> Words:
        """The work list: tensor index | first block << 32, in the order of the tensors."""
        return self.rest[self.n_tensors * TENSOR_WORDS :]

    @property
    def n_sums(self) -> int:
        """Sums of squares that the norm's launch leaves."""
        return min(self.n_chunks, SUMS)

    @functools.cached_property
    def float64(self) -> bool:
        """Whether some tensor is computed in float64."""
        return any(s.compute == torch.float64 for s in self.signatures)


def pack_rates(rates: Sequence[float]) -> tuple[int, ...]:
    """The lrs of up to RATES groups as the schedule is launched with them: 2 int32 each.

    Integers, since Triton takes a Python float for a float32.
    """
    doubles = (*rates, *[0.0] * (RATES - len(rates)))
    return struct.unpack(f"<{2 * RATES}i", struct.pack(f"<{RATES}d", *doubles))


def frozen(words: Words) -> Words:
    """The same words, read-only: who wants other ones replaces them."""
    words.setflags(write=False)
    return words


def plan_chunks(numels: Words, block: int = BLOCK, chunks: int = CHUNKS) -> tuple[Words, int]:
    """Cut tensors into chunks so that each element is in exactly one block of one chunk.

    Returns the chunk words (tensor | first block << 32) and the blocks in a chunk, the smallest
    power of two for which `chunks` and CHUNKS_PER_TENSOR for each tensor are enough. A chunk may
    reach past its tensor's end; a program whose block lies there has nothing to do.
    """
    blocks = -(-numels // block)
    per_chunk = 1
    while (count := -(-blocks // per_chunk)).sum() > chunks + CHUNKS_PER_TENSOR * len(numels):
        per_chunk *= 2
    tensor = np.repeat(np.arange(len(numels), dtype=np.int64), count)
    within = np.arange(len(tensor), dtype=np.int64) - np.repeat(np.cumsum(count) - count, count)
    return tensor | (within * per_chunk) << 32, per_chunk


def programs_ahead(
    tensors: Words, signatures: Sequence[Signature], parameters: LaunchParameters, of_chunk: int
) -> int:
    """How many programs read as much as is to be prefetched, in whole chunks.

    So the first of a chunk, which always has elements, is asked for by the first of another.
    """
    numels = tensors[:, NUMEL]
    if not parameters.prefetch:
        return 0
    if not numels.any():
        return of_chunk
    read = np.array([s.bytes_read for s in signatures])[tensors[:, SIGNATURE]]
    of_program = float(np.average(read, weights=numels)) * parameters.elements
    return of_chunk * max(1, round(parameters.prefetch * 1024 / of_program / of_chunk))


def _unaligned(tensors: Words, signatures: Sequence[Signature]) -> npt.NDArray[np.bool_]:
    """Of which tensors elements have to go one by one.

    128-bit accesses want addresses that are multiples of 16; and the 8 elements that these access,
    or two of them, have one hash for their random bits, so that they have to be a group of the
    whole tensor's.
    """
    addresses = tensors[:, [PARAM, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, MASTER]]
    places = tensors[:, [FIRST, INNER, INNER_WHOLE]]
    random = np.array([s.random for s in signatures], dtype=bool)[tensors[:, SIGNATURE]]
    unaligned: npt.NDArray[np.bool_] = np.bitwise_or.reduce(addresses, axis=1) % 16 != 0
    unaligned |= random & (np.bitwise_or.reduce(places, axis=1) % RANDOM_GROUP != 0)
    return unaligned


def build(
    rows: Sequence[Row],
    grads: Words,
    groups: Words,
    n_groups: int,
    parameters: LaunchParameters = LaunchParameters(),  # noqa: B008  # immutable
) -> Table:
    """Lay out the rows. They must not overlap in memory: one launch updates all at once."""
    signatures = tuple(sorted({row.signature for row in rows}, key=str))
    code = {signature: i for i, signature in enumerate(signatures)}
    tensors = np.zeros((len(rows), TENSOR_WORDS), dtype=np.int64)
    if rows:
        tensors[:, _COLUMNS] = [[*row[:7], code[row.signature], *row[8:]] for row in rows]
    chunks, blocks_per_chunk = plan_chunks(tensors[:, NUMEL], parameters.elements)
    ahead = programs_ahead(tensors, signatures, parameters, blocks_per_chunk)
    tensors[:, SIGNATURE] += UNALIGNED * _unaligned(tensors, signatures)
    return Table(
        groups=frozen(groups),
        grads=frozen(grads),
        rest=frozen(np.concatenate([tensors.ravel(), chunks])),
        n_groups=n_groups,
        n_tensors=len(rows),
        blocks_per_chunk=blocks_per_chunk,
        ahead=ahead,
        n_programs=len(chunks) * blocks_per_chunk,
        signatures=signatures,
        parameters=parameters,
    )


class Memory(NamedTuple):
    """Device memory of one table: its words, and the scalars that the schedule writes."""

    words: Tensor  # int64 [n_words]
    scalars: Tensor  # float32 [n_tensors, SCALARS]
    scalars64: Tensor  # float64, the same; no rows where nothing is computed in float64

    def fits(self, table: Table) -> bool:
        """Whether this memory was allocated for a table of the same size."""
        rows64 = table.n_tensors if table.float64 else 0
        sizes = (self.words.numel(), self.scalars.numel(), self.scalars64.numel())
        return sizes == (table.n_words, table.n_tensors * SCALARS, rows64 * SCALARS)


def allocate(table: Table, device: torch.device) -> Memory:
    """Uninitialised device memory for a table."""
    rows64 = table.n_tensors if table.float64 else 0
    return Memory(
        torch.empty(table.n_words, dtype=torch.int64, device=device),
        torch.empty(table.n_tensors, SCALARS, dtype=torch.float32, device=device),
        torch.empty(rows64, SCALARS, dtype=torch.float64, device=device),
    )


def write_words(table: Table, host: Tensor) -> None:
    """Write the first len(host) words of the table to `host`, int64 on the CPU."""
    words, tensors_at = host.numpy(), table.tensors_at
    words[len(table.groups) + len(table.grads) : tensors_at] = 0
    starts = 0, len(table.groups), tensors_at
    for at, part in zip(starts, (table.groups, table.grads, table.rest), strict=True):
        if at < len(words):
            words[at : at + len(part)] = part[: len(words) - at]


def stale_words(table: Table, uploaded: Table | None) -> int:
    """How many words of the device's copy are out of date, counted from the front.

    Columns are compared by identity: they are frozen, so the same object means the same words.
    """
    if uploaded is None or table.rest is not uploaded.rest:
        return table.n_words
    if table.grads is not uploaded.grads:
        return len(table.groups) + len(table.grads)
    return len(table.groups) if table.groups is not uploaded.groups else 0
