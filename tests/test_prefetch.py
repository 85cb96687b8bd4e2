"""kernels/prefetch.py: what is asked for lies where it will be read, and nowhere else.

The instruction itself is NVIDIA's: the interpreter notes what it would be given, and tests/ptx.py,
with --ptx, what it is given.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fused_adamw import FusedAdamW
from fused_adamw import plan as planning
from fused_adamw.kernels import table as t
from fused_adamw.kernels.launch_parameters import LaunchParameters
from fused_adamw.launch import load_kernels

BLOCK = LaunchParameters().block
SIZES = 12 * BLOCK, 3, 17 * BLOCK + 5, 20 * BLOCK, 9 * BLOCK, 2 * BLOCK
UNALIGNED = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {},
    "amsgrad": {"amsgrad": True},
    "int8": {"state_dtype": "int8"},
    "master": {"master_weights": True, "state_dtype": torch.float32},
    "master+int8": {"master_weights": True, "state_dtype": "int8"},
}


def make(name: str) -> tuple[list[Parameter], FusedAdamW]:
    """Params with gradients, and their optimizer. Matrices: in 8 bits are no others."""
    torch.manual_seed(0)
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    values = [torch.randn(1, n + 1).to(dtype) for n in SIZES]
    views = [x[:, 1:] if i == UNALIGNED else x[:, :-1].clone() for i, x in enumerate(values)]
    params = [Parameter(x) for x in views]
    for p in params:
        p.grad = torch.randn_like(p)
    return params, FusedAdamW(params, backend="triton", **OPTIONS[name])


class Noted:
    """One step, and what was prefetched in it."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        as_compiled: Any,
        optimizer: FusedAdamW,
        per_chunk: int,
    ) -> None:
        self.asked: list[tuple[int, int]] = []
        adamw = load_kernels(torch.device("cpu")).adamw
        module = adamw._prefetch_ahead.fn.__globals__

        def note(address: Any, size: Any) -> None:
            begin, count = address.handle.data.item(), size.handle.data.item()
            assert begin % 16 == count % 16 == 0, "the instruction wants it so"
            if count > 0:
                self.asked.append((begin, begin + count))

        chunks = sum(-(-n // BLOCK) for n in SIZES) // per_chunk
        plan_chunks, own = t.plan_chunks, LaunchParameters(prefetch=16)
        with monkeypatch.context() as patch:
            patch.setattr(t, "CHUNKS_PER_TENSOR", 1)
            patch.setattr(
                t, "plan_chunks", lambda numels, block: plan_chunks(numels, block, chunks)
            )
            patch.setattr(planning, "launch_parameters", lambda _: own)
            patch.setattr(adamw, "_prefetches", lambda table, _: table.ahead > 0)
            optimizer._plan = None  # it may be one without prefetches
            if as_compiled is None:
                patch.setitem(module, "_ask", note)
                patch.setitem(module, "_is_first_thread", lambda: True)
            optimizer.step()
        if as_compiled is not None:  # the update is the last launch
            self.asked = [(begin, begin + size) for begin, size in as_compiled.prefetched]
        (launcher,) = optimizer._launchers.values()
        assert launcher._whole is not None
        self.table = launcher._whole
        self.words, self.scalars, _ = launcher._memory
        assert self.table.blocks_per_chunk == per_chunk

    def of(self, x: Tensor) -> npt.NDArray[np.bool_]:
        """Whether each byte of a tensor was asked for."""
        found = np.zeros(x.nbytes, dtype=bool)
        for begin, end in self.asked:
            begin, end = begin - x.data_ptr(), end - x.data_ptr()
            found[max(0, begin) : max(0, end)] = True
        return found


def streams(optimizer: FusedAdamW, p: Tensor) -> list[Tensor]:
    """All that a step reads for the elements of a param."""
    states = (x for key, x in optimizer.state[p].items() if key != "step")
    return [x for x in (p, p.grad, *states) if x is not None]


@pytest.fixture(autouse=True)
def interpreted(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("notes what the interpreter is given")


@pytest.mark.parametrize("per_chunk", [1, 16])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_later_programs_read_is_asked_for(
    name: str, per_chunk: int, monkeypatch: pytest.MonkeyPatch, as_compiled: Any
) -> None:
    params, optimizer = make(name)
    noted = Noted(monkeypatch, as_compiled, optimizer, per_chunk)
    table, ahead = noted.table, noted.table.ahead
    assert ahead % per_chunk == 0
    assert 0 < 3 * ahead < table.n_programs

    def block_of(program: int) -> tuple[int, int]:
        chunk = int(table.chunks[program // per_chunk])
        return chunk & 0xFFFFFFFF, (chunk >> 32) + program % per_chunk

    rows = table.rest[: table.n_tensors * t.TENSOR_WORDS].reshape(-1, t.TENSOR_WORDS)
    kinds = [table.signatures[kind] for kind in rows[:, t.SIGNATURE] & 0xFFFFFFFF]

    def asker(program: int, times: int) -> int | None:
        """The tensor of the program that is to ask, if that has vectors of its own."""
        program -= times * ahead
        if program < 0:
            return None
        if kinds[block_of(program)[0]].quantised:  # one for several
            program -= program % min(per_chunk, t.PREFETCH_UNIT)
        tensor, block = block_of(program)
        has_vectors = (block + 1) * BLOCK <= SIZES[tensor] and tensor != UNALIGNED
        return tensor if has_vectors else None

    # elements, unless enough are under way as it is, but for a last few
    assert any(kind.prefetches_elements for kind in kinds) == (name != "float32")
    found = {id(x): noted.of(x) for p in params for x in streams(optimizer, p)}
    for p, kind in zip(params, kinds, strict=True):
        assert kind.prefetches_elements or not any(
            found[id(x)].any() for x in streams(optimizer, p)
        )
    checked = Counter[int]()
    for program in range(table.n_programs):
        tensor, block = block_of(program)
        begin, end = block * BLOCK, min((block + 1) * BLOCK, SIZES[tensor])
        by = asker(program, 1)
        if (
            by is None
            or begin >= end
            or not kinds[by].prefetches_elements
            or kinds[by] != kinds[tensor]
        ):
            continue
        checked[tensor] += 1
        for x in streams(optimizer, params[tensor]):
            bytes_each = x.nbytes / SIZES[tensor]  # of exponents 1/64
            till = x.data_ptr() + int(end * bytes_each)
            asked = found[id(x)][int(begin * bytes_each) : till // 16 * 16 - x.data_ptr()]
            assert asked.all(), (program, x.dtype)
    if name != "float32":
        assert 3 in checked
        assert per_chunk > 1 or UNALIGNED in checked

    # tables: the rows of tensors, and the list of chunks
    grads = noted.words[len(table.groups) :]
    tensors = noted.words[table.tensors_at :]
    chunks = tensors[table.n_tensors * t.TENSOR_WORDS :]
    for item, chunk in enumerate(table.chunks):
        if asker(item * per_chunk, 3) is not None:
            assert noted.of(chunks[item : item + 1]).all()
        if asker(item * per_chunk, 2) is not None and chunk >> 32 == 0:
            row = tensors[chunk * t.TENSOR_WORDS : (chunk + 1) * t.TENSOR_WORDS]
            for x in row, grads[chunk : chunk + 1], noted.scalars[chunk]:
                assert noted.of(x).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_else_is_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch, as_compiled: Any
) -> None:
    """Past the end of its memory an address may belong to no one; in whole 16 bytes it cannot."""
    params, optimizer = make(name)
    optimizer.step()
    params[3].grad = None  # its address is 0 then
    noted = Noted(monkeypatch, as_compiled, optimizer, 2)
    elements = [x for p in params for x in streams(optimizer, p)]
    for begin, end in noted.asked:
        assert any(
            x.data_ptr() // 16 * 16 <= begin and end <= x.data_ptr() + x.nbytes + more
            for more, xs in ((0, elements), (15, [noted.words, noted.scalars]))
            for x in xs
        )
    assert noted.asked
    assert not any(noted.of(x).any() for x in streams(optimizer, params[3]))
