"""kernels/table.py: which program updates what, where the words are, what an upload contains."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_adamw.kernels import table as t

F64, F32, B16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
VECTOR = 8  # elements of a 128-bit access to a 16-bit format
EDGES = sorted(
    {
        *(0, 1, 2),
        *(VECTOR - 1, VECTOR, VECTOR + 1),
        *(t.BLOCK - 1, t.BLOCK, t.BLOCK + 1),
        *(2 * t.BLOCK - 1, 2 * t.BLOCK, 2 * t.BLOCK + 1),
    }
)


def sizes(numels: Iterable[int]) -> t.Words:
    return np.fromiter(numels, dtype=np.int64)


def check_plan(numels: t.Words, block: int = t.BLOCK, chunks: int = t.CHUNKS) -> int:
    """Assert what plan_chunks promises, program by program; returns the blocks in a chunk."""
    words, per_chunk = t.plan_chunks(numels, block, chunks)
    assert words.dtype == np.int64
    assert per_chunk >= 1
    assert per_chunk & (per_chunk - 1) == 0
    tensor, first = words & 0xFFFFFFFF, words >> 32  # as the kernel reads them
    blocks = -(-numels // block)
    wanted = blocks.sum()

    # each block of each tensor once, and in each chunk one at least
    assert ((tensor >= 0) & (tensor < len(numels))).all()
    assert ((first >= 0) & (first < blocks[tensor])).all()
    covered = np.minimum(blocks[tensor] - first, per_chunk)  # a chunk may reach past the end
    by_tensor = np.lexsort((first, tensor))
    tensor, first, covered = tensor[by_tensor], first[by_tensor], covered[by_tensor]
    same = tensor[1:] == tensor[:-1]
    assert (first[1:] == np.where(same, first[:-1] + covered[:-1], 0)).all(), "gap or overlap"
    assert (first[:1] == 0).all()
    assert covered.sum() == wanted, "tensors or their ends are missing"

    # what it costs: the list's length, and programs that find nothing to do
    limit = chunks + t.CHUNKS_PER_TENSOR * len(numels)
    assert len(words) <= limit
    assert len(words) * per_chunk - wanted <= np.count_nonzero(blocks) * (per_chunk - 1)
    if per_chunk > 1:
        halves = -(-blocks // (per_chunk // 2))
        assert halves.sum() > chunks + t.CHUNKS_PER_TENSOR * len(numels), (
            "chunks are larger than the list's length wants"
        )
    return per_chunk


def elements(numels: t.Words, block: int, chunks: int) -> list[tuple[int, int]]:
    """(tensor, element) for everything that the programs of the launch update."""
    words, per_chunk = t.plan_chunks(numels, block, chunks)
    seen = []
    for program in range(len(words) * per_chunk):  # as _adamw does
        chunk = int(words[program // per_chunk])
        tensor = chunk & 0xFFFFFFFF
        start = ((chunk >> 32) + program % per_chunk) * block
        seen += [(tensor, i) for i in range(start, min(start + block, int(numels[tensor])))]
    return seen


# --- plan_chunks -------------------------------------------------------------------------------


@pytest.mark.parametrize("numel", EDGES)
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9], ids=lambda n: f"{n}-tensors")
def test_tensors_of_a_size_at_an_edge(numel: int, count: int) -> None:
    assert check_plan(sizes([numel] * count)) == 1


@pytest.mark.parametrize("order", ["as-is", "reversed", "shuffled"])
def test_all_edges_in_one_list(order: str) -> None:
    # an empty tensor first, in the middle and last: no one may be skipped because of it
    numels = [0, *EDGES, 0, *EDGES, 0]
    if order == "reversed":
        numels.reverse()
    if order == "shuffled":
        random.Random(0).shuffle(numels)
    check_plan(sizes(numels))


@pytest.mark.parametrize("numels", [[], [0], [0, 0, 0]], ids=["none", "one-empty", "all-empty"])
def test_nothing_to_do_needs_no_program(numels: list[int]) -> None:
    words, per_chunk = t.plan_chunks(sizes(numels))
    assert (len(words), per_chunk) == (0, 1)


@pytest.mark.parametrize("chunks", [1, 2, 7, 8, 9], ids=lambda n: f"limit-{n}")
@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65], ids=lambda n: f"{n}-b")
@pytest.mark.parametrize("ragged", [-1, 0, 1])
def test_chunks_of_more_blocks(blocks: int, chunks: int, ragged: int) -> None:
    # a short limit makes small tensors need large chunks; sizes are those of a chunk's ends +-1
    block = 4
    numels = sizes([blocks * block + ragged, 0, 3, blocks * block])
    per_chunk = check_plan(numels, block, chunks)
    everything = [(i, j) for i, n in enumerate(numels) for j in range(n)]
    assert sorted(elements(numels, block, chunks)) == everything
    for numel in (per_chunk * block + edge for edge in (-1, 0, 1)):
        check_plan(sizes([numel] * 3), block, chunks)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_chunks_double_just_above_the_limit(extra: int) -> None:
    # one tensor may have CHUNKS, and its own share, of chunks
    numels = sizes([(t.CHUNKS + t.CHUNKS_PER_TENSOR) * t.BLOCK + extra])
    assert check_plan(numels) == (2 if extra > 0 else 1)


@pytest.mark.parametrize("power", [31, 32, 33, 34])
@pytest.mark.parametrize("extra", [-1, 0, 1, 8])
def test_one_tensor_past_32_bit_offsets(power: int, extra: int) -> None:
    numel = 2**power + extra
    check_plan(sizes([numel]))
    check_plan(sizes([5, numel, 0, 5]))
    words, per_chunk = t.plan_chunks(sizes([numel]))
    # the last element is in the last chunk, and no program reaches further than one chunk
    last = int(words[-1] >> 32) * t.BLOCK
    assert last < numel <= last + per_chunk * t.BLOCK


def test_a_total_past_32_bits() -> None:
    check_plan(sizes([2**28 + 1] * 17))  # each far below 2^31, together 2^32


LLAMA_8B = [  # tensor sizes of meta-llama/Llama-3.1-8B's config: 8,030,261,248 in 291 tensors
    128256 * 4096,
    *[
        n
        for _ in range(32)
        for n in (
            *(4096 * 4096, 1024 * 4096, 1024 * 4096, 4096 * 4096),
            *(14336 * 4096, 14336 * 4096, 14336 * 4096),
            *(4096, 4096),
        )
    ],
    4096,
    128256 * 4096,
]


def test_an_8_billion_parameter_model() -> None:
    numels = sizes(LLAMA_8B)
    assert (len(numels), numels.sum()) == (291, 8_030_261_248)
    check_plan(numels)
    words, per_chunk = t.plan_chunks(numels)
    assert words.nbytes <= 300_000  # not tens of megabytes: a block each would be 63 MB
    blocks = int((-(-numels // t.BLOCK)).sum())
    assert len(words) * per_chunk <= 1.02 * blocks  # few programs that find nothing to do


@pytest.mark.parametrize("count", [10_000, 100_000])
def test_many_small_tensors(count: int) -> None:
    numels = np.full(count, 64, dtype=np.int64)
    words, per_chunk = t.plan_chunks(numels)
    assert per_chunk == 1
    assert (words == np.arange(count)).all()  # a program each, none empty


def test_many_tensors_of_all_sizes() -> None:
    rng = np.random.default_rng(0)
    check_plan(rng.integers(0, 200_000, size=100_000))


def test_a_small_model_fills_the_gpu() -> None:
    # 1M elements in one tensor: a program a block, that is 977, and no chunk to share
    words, per_chunk = t.plan_chunks(sizes([1_000_000]))
    assert (len(words), per_chunk) == (977, 1)


@settings(max_examples=200, deadline=None)
@given(
    numels=st.lists(
        st.one_of(st.integers(0, 70), st.sampled_from(EDGES), st.integers(0, 2**35)), max_size=20
    ),
    chunks=st.integers(1, 64),
)
def test_any_sizes(numels: list[int], chunks: int) -> None:
    check_plan(sizes(numels), chunks=chunks)


@settings(max_examples=200, deadline=None)
@given(
    numels=st.lists(st.integers(0, 70), max_size=8),
    block=st.sampled_from([1, 4, 8]),
    chunks=st.integers(1, 8),
)
def test_any_small_sizes_element_by_element(numels: list[int], block: int, chunks: int) -> None:
    seen = elements(sizes(numels), block, chunks)
    assert sorted(seen) == [(i, j) for i, n in enumerate(numels) for j in range(n)]


# --- build -------------------------------------------------------------------------------------


def row(number: int, numel: int, signature: t.Signature, group: int = 0) -> t.Row:
    """A row in which every word is another number."""
    at = 4096 * (number + 1)
    amsgrad_at = at + 768 if signature.amsgrad else 0
    double = signature.compute == F64
    row = t.Row(at, at + 256, at + 512, amsgrad_at, at + 1024, numel, group, signature, double)
    rest = {field: at + 1280 + 16 * i for i, field in enumerate(t.Row._fields[9:])}
    return row._replace(**rest)


PLAIN = t.Signature(F32, F32, F32, F32, False)
MIXED = t.Signature(B16, B16, F32, F32, False)
DOUBLE = t.Signature(F64, F64, F64, F64, True)
ROWS = [
    row(0, 5, PLAIN),
    row(1, 3 * t.BLOCK, DOUBLE, group=1),
    row(2, 0, PLAIN, group=1),  # present, and without a program
    row(3, t.BLOCK + 1, MIXED),
    row(4, 1, PLAIN, group=1),
]


def make(rows: list[t.Row], n_groups: int = 2) -> t.Table:
    grads = np.arange(1, len(rows) + 1, dtype=np.int64) << 20
    groups = np.arange(n_groups * t.GROUP_WORDS, dtype=np.int64) + 7_000_000
    return t.build(rows, grads, groups, n_groups)


def test_words_are_where_the_kernels_read_them() -> None:
    table = make(ROWS)
    words = torch.full((table.n_words,), -1, dtype=torch.int64)  # poison
    t.write_words(table, words)
    flat = words.numpy()

    groups, flat = np.split(flat, [2 * t.GROUP_WORDS])
    grads, flat = np.split(flat, [len(ROWS)])
    gap, flat = np.split(flat, [table.tensors_at - 2 * t.GROUP_WORDS - len(ROWS)])
    tensors, chunks = np.split(flat, [len(ROWS) * t.TENSOR_WORDS])
    assert gap.tolist() == [0]
    assert table.tensors_at % t.SECTOR == t.TENSOR_WORDS % t.SECTOR == 0
    assert table.offsets == (
        2 * t.GROUP_WORDS * 8,
        table.tensors_at * 8,
        (table.n_words - len(chunks)) * 8,
    )
    assert groups.tolist() == list(range(7_000_000, 7_000_000 + 2 * t.GROUP_WORDS))
    assert grads.tolist() == [i << 20 for i in range(1, 6)]
    columns = tensors.reshape(len(ROWS), t.TENSOR_WORDS)
    for name in t.Row._fields:
        if name != "signature":
            wanted = [getattr(r, name) for r in ROWS]
            assert columns[:, getattr(t, name.upper())].tolist() == wanted, name
    for r, code in zip(ROWS, columns[:, t.SIGNATURE], strict=True):
        assert table.signatures[code] == r.signature
    assert chunks.tolist() == [0, 1, 1 | 1 << 32, 1 | 2 << 32, 3, 3 | 1 << 32, 4]
    assert (table.n_groups, table.n_tensors, table.n_programs) == (2, 5, 7)
    assert table.blocks_per_chunk == 1


ROUNDED = MIXED._replace(stochastic=True)
INT8 = MIXED._replace(exp_avg_sq=torch.uint8)


@pytest.mark.parametrize(
    ("signature", "changed", "unaligned"),
    [
        pytest.param(MIXED, {}, False, id="aligned"),
        *(
            pytest.param(MIXED, {field: 8}, True, id=field)
            for field in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")
        ),
        pytest.param(MIXED, {"step": 4, "position": 3, "exp_avg_sq_scale": 1}, False, id="others"),
        pytest.param(MIXED, {"first": 3}, False, id="nothing random"),
        pytest.param(ROUNDED, {"first": 24, "inner": 16, "inner_whole": 80}, False, id="groups"),
        *(
            pytest.param(signature, {field: 12}, True, id=f"{field} cuts a group, {name}")
            for field in ("first", "inner", "inner_whole")
            for name, signature in (("rounded", ROUNDED), ("8-bit", INT8))
        ),
    ],
)
def test_which_tensors_elements_go_one_by_one(
    signature: t.Signature, changed: dict[str, int], unaligned: bool
) -> None:
    """Beside the number of their signature, which is not the first."""
    odd = row(1, 9, signature)
    odd = odd._replace(first=0, inner=0, inner_whole=0)._replace(
        **{field: getattr(odd, field) // 16 * 16 + more for field, more in changed.items()}
    )
    table = make([row(0, 5, PLAIN), odd])
    rows = table.rest[: 2 * t.TENSOR_WORDS].reshape(2, t.TENSOR_WORDS)
    assert table.signatures.index(PLAIN) != table.signatures.index(signature)
    assert [divmod(int(word), t.UNALIGNED) for word in rows[:, t.SIGNATURE]] == [
        (0, table.signatures.index(PLAIN)),
        (unaligned, table.signatures.index(signature)),
    ]


def test_signatures_are_shared_and_in_an_order_of_their_own() -> None:
    # whoever orders the parameters otherwise must find the same compiled kernel
    table = make(ROWS)
    assert len(table.signatures) == 3
    assert set(table.signatures) == {PLAIN, MIXED, DOUBLE}
    for seed in range(5):
        rows = random.Random(seed).sample(ROWS, len(ROWS))
        assert make(rows).signatures == table.signatures
    assert make(ROWS * 3).signatures == table.signatures


def test_float64_is_known_to_the_table() -> None:
    assert make(ROWS).float64
    assert not make([r for r in ROWS if r.signature != DOUBLE]).float64


def test_programs_count_whole_chunks() -> None:
    rows = [row(0, 2**34, PLAIN), row(1, 1, PLAIN)]
    table = make(rows, n_groups=1)
    chunks, per_chunk = t.plan_chunks(sizes([2**34, 1]))
    assert per_chunk > 1
    assert table.blocks_per_chunk == per_chunk
    assert table.n_programs == len(chunks) * per_chunk
    assert table.rest[2 * t.TENSOR_WORDS :].tolist() == chunks.tolist()


def test_a_table_without_tensors() -> None:
    table = make([], n_groups=1)
    assert (table.n_words, table.n_tensors, table.n_programs) == (table.tensors_at, 0, 0)
    assert table.signatures == ()


@pytest.mark.parametrize("column", ["groups", "grads", "rest"])
def test_columns_are_read_only(column: str) -> None:
    # they are compared by identity: a write in place would go unseen
    with pytest.raises(ValueError, match="read-only"):
        getattr(make(ROWS), column)[0] = 1


# --- uploads -----------------------------------------------------------------------------------


def replaced(table: t.Table, *columns: str) -> t.Table:
    return dataclasses.replace(table, **{c: getattr(table, c).copy() for c in columns})


N_GROUPS, N_GRADS = 2 * t.GROUP_WORDS, len(ROWS)


@pytest.mark.parametrize(
    ("moved", "words"),
    [
        ((), 0),
        (("groups",), N_GROUPS),
        (("grads",), N_GROUPS + N_GRADS),
        (("groups", "grads"), N_GROUPS + N_GRADS),
        (("rest",), None),
        (("groups", "rest"), None),
        (("groups", "grads", "rest"), None),
    ],
    ids=lambda x: "+".join(x) or "nothing" if isinstance(x, tuple) else None,
)
def test_only_a_prefix_is_stale(moved: tuple[str, ...], words: int | None) -> None:
    table = make(ROWS)
    assert t.stale_words(replaced(table, *moved), table) == (
        table.n_words if words is None else words
    )


def test_all_is_stale_before_the_first_upload() -> None:
    table = make(ROWS)
    assert t.stale_words(table, None) == table.n_words


@pytest.mark.parametrize(
    "size", [0, 1, N_GROUPS - 1, N_GROUPS, N_GROUPS + 1, N_GROUPS + N_GRADS, N_GROUPS + N_GRADS + 1]
)
def test_a_prefix_is_written_and_nothing_else(size: int) -> None:
    table = make(ROWS)
    everything = torch.empty(table.n_words, dtype=torch.int64)
    t.write_words(table, everything)
    memory = torch.full((table.n_words,), -1, dtype=torch.int64)
    t.write_words(table, memory[:size])
    assert memory[:size].equal(everything[:size])
    assert (memory[size:] == -1).all()


def test_memory_fits_its_own_table_only(device: torch.device) -> None:
    table = make(ROWS)
    memory = t.allocate(table, device)
    assert [x.dtype for x in memory] == [torch.int64, F32, F64]
    assert [tuple(x.shape) for x in memory] == [(table.n_words,), (5, t.SCALARS), (5, t.SCALARS)]
    assert all(x.device == device for x in memory)
    assert memory.fits(table)
    assert memory.fits(replaced(table, "groups", "grads"))
    assert not memory.fits(make(ROWS, n_groups=3))
    assert not memory.fits(make(ROWS[:-1]))
    # as many words (rows of five, seven blocks), but nothing in float64
    rows32 = [r._replace(signature=PLAIN, step_is_double=False) for r in ROWS]
    assert make(rows32).n_words == table.n_words
    assert not memory.fits(make(rows32))
    assert t.allocate(make(rows32), device).scalars64.shape == (0, t.SCALARS)


# --- signatures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signature", "floor"),
    [  # bytes read and written for a parameter
        pytest.param(t.Signature(F32, F32, F32, F32, False), 28, id="fp32"),
        pytest.param(t.Signature(B16, B16, F32, F32, False), 22, id="bf16-fp32-moments"),
        pytest.param(t.Signature(B16, B16, B16, B16, False), 14, id="bf16"),
        pytest.param(t.Signature(F16, F16, F16, F16, False), 14, id="fp16"),
        pytest.param(t.Signature(F64, F64, F64, F64, False), 56, id="fp64"),
        pytest.param(t.Signature(F32, B16, F32, F32, False), 26, id="fp32-bf16-grad"),
        pytest.param(t.Signature(F32, F32, F32, F32, True), 36, id="fp32-amsgrad"),
        pytest.param(t.Signature(B16, B16, B16, F32, True), 26, id="bf16-fp32-squares-amsgrad"),
    ],
)
def test_bytes_moved_for_an_element(signature: t.Signature, floor: int) -> None:
    assert signature.bytes_per_element == floor


@pytest.mark.parametrize("grad", [F64, F32, B16, F16], ids=str)
def test_compute_dtype_follows_the_param_alone(grad: torch.dtype) -> None:
    assert t.Signature(F64, grad, grad, grad, False).compute == F64
    for param in (F32, B16, F16):
        assert t.Signature(param, grad, grad, grad, False).compute == F32


def test_a_row_of_scalars_holds_every_column() -> None:
    columns = [t.ACTIVE, t.GRAD_FACTOR, t.UNSCALE, t.W1, t.W2, t.RSQRT_BIAS2, t.EPSILON]
    columns += [t.NEG_STEP_SIZE, t.DECAY, t.L2]
    assert len(set(columns)) == len(columns)
    assert max(columns) < t.SCALARS
