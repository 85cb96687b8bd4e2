"""Runs PTX on the CPU: what Triton compiled for an NVIDIA GPU, executed without one.

Triton's interpreter takes the kernels' Python; inline assembly, layouts, exchanges between threads
and everything else that the compiler makes of it are first seen here. All threads of many programs
go through the code at once, as lanes of numpy arrays; where they part, those behind go first. What
a GPU would refuse is an error: an access outside of the tensors there are, or one that is not
aligned to its size. So is an instruction, or a form of it, that is not known here. A register that
nobody has written has junk in it, and so has shared memory. A program that writes what another one
of its launch reads or writes is an error, too; races within a program are not seen. One that begins
beside the launch before, and has not waited for its end yet, may not read what that one writes.

Arithmetic is IEEE's and to the bit, NaN NVIDIA's, but for the approximate root and reciprocal,
which are rounded correctly here, and fma in float64, which is rounded to 64 bits first. Cache hints
do nothing; what is prefetched has to lie in tensors, and is noted in `Machine.prefetched`.

Instructions, their meaning and their names: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Lanes = Array | None  # which threads execute an instruction, bool; None: all

WARP = 32
AT_ONCE = 64  # programs
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
_JUNK = {"%rs": np.array([0xA5C3], np.uint16), "%r": np.array([0xA5C33C5A], np.uint32)}
_JUNK |= {"%rd": np.array([0xA5C33C5A_96E1781E], np.uint64)}  # others are predicates: true

# The forms of each instruction that are known here, in which a dot stands for ::, too.
_INTEGER, _CACHE = r"[su](16|32|64)", r"(\.(ca|cg|cs|wb|wt|L1\.evict_first|L1\.evict_last))*"
_WIDENED, _ROUNDED = r"f(32|64)\.b?f16|f64\.f32", r"f16\.f32|f16x2\.f32|bf16\.f32"
_ROUNDED += r"|f16\.f64|bf16x2\.f32|bf16\.f64|f32\.f64|f32\.s32|f64\.s64"
_FORMS = {
    "ld": rf"param\.[bsu]\d+|(global{_CACHE}|shared(\.cta)?)(\.v[24])?\.b\d+",
    "st": rf"(global{_CACHE}|shared(\.cta)?)(\.v[24])?\.b\d+",
    "cp": r"async\.bulk\.prefetch\.L2\.global",
    "ldmatrix": r"sync\.aligned\.m8n8\.x4(\.trans)?\.shared\.b16",
    "stmatrix": r"sync\.aligned\.m8n8\.x4(\.trans)?\.shared\.b16",
    "bar": "sync",
    "griddepcontrol": "wait|launch_dependents",
    "shfl": r"sync\.bfly\.b32",
    "redux": r"sync\.add\.[su]32",
    "mov": r"[bsuf]\d+|pred",
    "cvt": rf"[su]\d+\.[su]\d+|{_WIDENED}|rn\.({_ROUNDED})|rzi\.s64\.f64",
    "selp": r"[bsuf]\d+",
    "setp": r"(eq|ne|lt|le|gt|ge)(\.[bsu]\d+|u?\.(f\d+|bf16))|(num|nan)\.f(32|64)|eq\.f16x2",
    "prmt": "b32",
    "bfe": r"[su](32|64)",
    "lop3": "b32",
    "add": rf"{_INTEGER}|rn\.f(32|64|32x2)",
    "sub": rf"{_INTEGER}|rn\.f(32|64|32x2)",
    "mul": rf"(lo|wide)\.{_INTEGER}|rn\.f(32|64|32x2)",
    "mad": rf"(lo|wide)\.{_INTEGER}",
    "fma": r"rn\.f(32|64|32x2)",
    "div": rf"{_INTEGER}|rn\.f(32|64)",
    "sqrt": r"approx\.ftz\.f32|rn\.f(32|64)",
    "rcp": r"approx\.ftz\.f32",
    "neg": r"[sf](32|64)",
    "abs": r"[sf](32|64)",
    **dict.fromkeys(("min", "max"), rf"{_INTEGER}|(NaN\.)?f(32|64)"),
    **dict.fromkeys(("and", "or", "xor", "not"), r"b\d+|pred"),
    "shl": r"b\d+",
    "shr": r"[su]\d+",
    "bra": "(uni)?",
    "brx": "idx",
    "ret": "",
}
_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip
_UNARY: dict[str, Callable[[Any], Any]] = {"neg": np.negative, "abs": np.abs, "not": np.invert}
_NO_RESULT = ("st", "cp", "stmatrix", "bar", "griddepcontrol", "bra", "brx", "ret")


class Region(NamedTuple):
    """Memory that may be accessed."""

    begin: int
    end: int
    data: Array  # its bytes


def region(address: int, size: int) -> Region:
    """That of a live object of this process."""
    view = (ctypes.c_uint8 * size).from_address(address)
    return Region(address, address + size, np.ctypeslib.as_array(view))


@functools.cache
def bits_of(name: str) -> int:
    """Width of a type, such as 32 of "s32"; 1 of a predicate."""
    return 1 if name == "pred" else int(name.lstrip("bfsu"))


@functools.cache
def dtype_of(name: str) -> np.dtype[Any]:
    """As numpy has it; bfloat16 as its bits."""
    if name == "pred":
        return np.dtype(bool)
    kind = _FLOAT if name[0] == "f" else _SIGNED if name[0] == "s" else _UNSIGNED
    return np.dtype(kind[bits_of(name)])


def from_bf16(bits: Array) -> Array:
    """float32 of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: Array) -> Array:
    """bfloat16 of float32, to nearest even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def to_odd32(x: Array) -> Array:
    """float32 of float64, to odd where it is inexact: as good as x itself for another rounding."""
    near = x.astype(np.float32)
    inexact = np.isfinite(near) & (near != x) & ((near.view(np.int32) & 1) == 0)
    toward = np.where(np.abs(near) < np.abs(x), 1, -1).astype(np.int32)
    return (near.view(np.int32) + np.where(inexact, toward, 0)).astype(np.int32).view(np.float32)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once: in float64 to odd, so that to round it again does no harm."""
    product = a.astype(np.float64) * b  # exact
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    even = (total.view(np.int64) & 1) == 0
    inexact = np.isfinite(total) & (error != 0) & even
    toward = np.where((error > 0) == (total > 0), 1, -1)
    odd = (total.view(np.int64) + np.where(inexact, toward, 0)).view(np.float64)
    return odd.astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in the widest format that numpy has."""
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


def nvidias_nan(x: Array) -> Array:
    """Results of arithmetic: float32 with the one NaN that NVIDIA's has."""
    if x.dtype != np.float32:
        return x
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), x.view(np.uint32)).view(np.float32)


def flushed(x: Array) -> Array:
    """Subnormal float32 as zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


def compare(how: str, a: Array, b: Array) -> Array:
    """Of setp: ordered, or true for NaN with a u behind."""
    if how in ("num", "nan"):
        unordered = np.isnan(a) | np.isnan(b)
        return unordered if how == "nan" else ~unordered
    if a.dtype.kind == "f":
        unordered = np.isnan(a) | np.isnan(b)
        if how.endswith("u"):
            return _COMPARE[how[:-1]](a, b) | unordered
        return _COMPARE[how](a, b) & ~unordered
    return _COMPARE[how](a, b)


class Instruction(NamedTuple):
    """One statement."""

    text: str
    guard: str | None  # a predicate's register; "!" in front: where it does not hold
    op: list[str]  # its name, split at dots
    operands: list[str]  # vectors in braces


class Program(NamedTuple):
    """An entry function."""

    params: list[str]
    code: list[Instruction]
    labels: dict[str, int]
    tables: dict[str, list[str]]  # of labels


def parse(text: str) -> Program:
    """The one entry function of a module."""
    text = re.sub(r"//.*", "", text)
    head, body = text.split(".entry", 1)[1].split("\n{", 1)
    params = re.findall(r"\.param .*? (\w+),?\s*$", head.split(")")[0], re.MULTILINE)
    body = re.sub(r"^\s*\.(loc|file|pragma)\b.*$", "", body.split("\n}", 1)[0], flags=re.MULTILINE)
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    tables: dict[str, list[str]] = {}
    for part in " ".join(body.split()).split(";"):
        statement, label = part.strip(), ""
        while (match := re.match(r"[{}]\s*|([$\w]+):\s*", statement)) is not None:  # or a scope's
            if label := match[1] or label:
                labels[label] = len(code)
            statement = statement[match.end() :]
        if statement.startswith(".branchtargets"):
            tables[label] = re.findall(r"\$\w+", statement)
        elif statement and not statement.startswith("."):
            code.append(_instruction(statement))
    assert code[-1].op[0] in ("ret", "bra"), "the code ends in the middle"
    written = {x for i in code if i.op[0] not in _NO_RESULT for x in _registers(i.operands[:1])}
    for i in code:
        if i.op[0] == "mov" and i.operands[1][0] == "{":
            continue  # a half that no one wants is nobody's
        read = _registers([*i.operands[i.op[0] not in _NO_RESULT :], i.guard or ""])
        assert set(read) <= written | _SPECIAL, f"nothing writes what {i.text!r} reads"
    return Program(params, code, labels, tables)


_SPECIAL = {"%tid", "%ctaid", "%nctaid", "%ntid"}


def _registers(operands: Iterable[str]) -> list[str]:
    return re.findall(r"%\w+", " ".join(operands))


def _instruction(text: str) -> Instruction:
    match = re.match(r"(?:@(!?[%\w]+)\s+)?(\S+)\s*(.*)$", text)
    assert match is not None, text
    name, _, form = match[2].replace("::", ".").partition(".")
    if not re.fullmatch(_FORMS[name], form):
        raise NotImplementedError(text)
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", match[3])
    return Instruction(text, match[1], [name, *form.split(".")], operands)


class Span(NamedTuple):
    """What some threads access in one region."""

    region: Region
    bytes: Array  # offsets, [threads, size]
    threads: Array  # which, bool


class Machine:
    """A GPU's memory, and some programs' worth of threads, their registers and shared memory.

    regions: what may be accessed. more: when something else is, more and more of them in turn.
    before: the machine of a launch that may not have ended when this one begins.
    """

    def __init__(
        self,
        regions: Iterable[Region],
        more: Callable[[], Iterable[Iterable[Region]]],
        before: Machine | None = None,
    ) -> None:
        self.prefetched: list[tuple[int, int]] = []  # first address, number of bytes
        self._more = more
        self._touched: dict[int, Array] = {}  # by region: who has read and written each byte
        self._beside = {} if before is None else before._touched
        self._set(regions)

    def _set(self, regions: Iterable[Region]) -> None:
        self.regions = sorted(regions, key=lambda r: r.begin)
        self._begins = np.array([r.begin for r in self.regions], dtype=np.uint64)
        self._ends = np.array([r.end for r in self.regions], dtype=np.uint64)

    def _with_more(self) -> Iterator[None]:
        """To look for something in the regions as they are, then in more and more of them."""
        yield
        for regions in self._more():
            self._set(regions)
            yield

    def launch(
        self, code: Program, arguments: Mapping[str, int], programs: int, threads: int, shared: int
    ) -> None:
        """Execute all programs of a grid, of so many threads and bytes of shared memory each."""
        self._arguments, self._shared_bytes = arguments, shared
        self._touched.clear()
        for first in range(0, programs, AT_ONCE):
            here = min(AT_ONCE, programs - first)
            self._lane = np.arange(here * threads, dtype=np.uint32)
            self._everyone = np.ones(len(self._lane), dtype=bool)
            self._waited = np.zeros(len(self._lane), dtype=bool)
            self._program = self._lane // np.uint32(threads)
            self._special = {
                "%tid.x": self._lane % np.uint32(threads),
                "%ctaid.x": self._program + np.uint32(first),
                "%nctaid.x": np.full_like(self._lane, programs),
                "%ntid.x": np.full_like(self._lane, threads),
            }
            self._run(code, here)

    @property
    def threads(self) -> int:
        """All that run at once."""
        return len(self._lane)

    def _run(self, program: Program, programs: int) -> None:
        self._registers: dict[str, Array] = {}
        self._shared = np.full(programs * self._shared_bytes, 0xA5, dtype=np.uint8)
        at = np.zeros(self.threads, dtype=np.int64)
        end = len(program.code)
        with np.errstate(all="ignore"):
            while (at < end).any():
                self._ended = at >= end
                here = int(at.min())
                lanes = at == here
                others = at[~lanes]
                until = int(others.min()) if len(others) else end
                at[lanes] = end  # if it runs to the end
                self._run_from(program, here, until, None if lanes.all() else lanes, at)

    def _run_from(self, program: Program, at: int, until: int, lanes: Lanes, where: Array) -> None:
        """Execute until threads part, or meet those at `until`; writes where each is then."""
        while at < until:
            instruction = program.code[at]
            name = instruction.op[0]
            active = self._guarded(instruction.guard, lanes)
            at += 1
            if name in ("bra", "brx", "ret"):
                here = self._everyone if lanes is None else lanes
                target: Any = len(program.code)
                if name == "bra":
                    target = program.labels[instruction.operands[0]]
                elif name == "brx":
                    table = [program.labels[x] for x in program.tables[instruction.operands[1]]]
                    index = self._wide(self._get(instruction.operands[0], "u32"))
                    target = np.array(table)[np.where(here, index, 0)]
                goes = here if active is None else here & active
                where[here] = np.where(goes, target, at)[here]
                return
            if active is not None and not active.any():
                continue
            try:
                if name in _BINARY:
                    self._binary(instruction, active, _BINARY[name])
                elif name in _UNARY:
                    self._unary(instruction, active, _UNARY[name])
                else:
                    getattr(self, f"_do_{name}")(instruction, active)
            except (IndexError, ValueError) as error:
                raise type(error)(f"{error}, in {instruction.text!r}") from error
        where[slice(None) if lanes is None else lanes] = at

    def _guarded(self, guard: str | None, lanes: Lanes) -> Lanes:
        if guard is None:
            return lanes
        holds = self._wide(self._get(guard.lstrip("!"), "pred"))
        holds = ~holds if guard[0] == "!" else holds
        both = holds if lanes is None else holds & lanes
        return None if both.all() else both

    # Operands

    def _get(self, operand: str, kind: str) -> Array:
        """Values as the type has them, of all threads, or one for all."""
        dtype = dtype_of(kind)
        if operand in self._special:
            return self._special[operand].astype(dtype)
        if operand == "global_smem":
            return np.zeros(1, dtype)
        if re.match(r"-?\d|0[xfd]", operand):
            return _immediate(operand, dtype)
        bits = self._registers.get(operand, _junk(operand))
        if dtype.itemsize < bits.itemsize:
            bits = bits.astype(_UNSIGNED[8 * dtype.itemsize])
        return bits.view(dtype)

    def _put(self, operand: str, values: Array, lanes: Lanes) -> None:
        """Into a register, whose width is its name's."""
        if operand == "_":
            return
        assert re.fullmatch(r"[%\w]+", operand), operand
        if values.dtype.kind != "b":
            size = {"%rs": 16, "%r": 32, "%rd": 64}.get(operand.rstrip("0123456789"), 0)
            size = max(size, 8 * values.itemsize)
            if values.dtype.kind == "i":  # signs spread
                values = values.astype(_SIGNED[size])
            values = np.ascontiguousarray(values).view(_UNSIGNED[8 * values.dtype.itemsize])
            values = values.astype(_UNSIGNED[size])
        values = self._wide(values)
        if lanes is not None:
            values = np.where(lanes, values, self._registers.get(operand, _junk(operand)))
        self._registers[operand] = values

    def _wide(self, values: Array) -> Array:
        """One for each thread."""
        whole = values.shape == self._lane.shape
        return values if whole else np.broadcast_to(values, self._lane.shape)

    def _address(self, operand: str) -> Array:
        match = re.match(r"\[\s*(\S+?)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        assert match is not None, operand
        base = self._get(match[1], "u64" if match[1].startswith("%rd") else "u32")
        return self._wide(base).astype(np.uint64) + np.uint64(int(match[2] or 0) % 2**64)

    # Memory

    def _spans(self, address: Array, size: int, lanes: Lanes) -> list[Span]:
        """Of global memory, by region."""
        active = self._everyone if lanes is None else lanes
        for _ in self._with_more():
            number, wrong = self._find(address, size, active)
            if not wrong.any():
                break
        else:
            at = int(address[wrong][0])
            raise IndexError(f"{size} bytes at {at:#x} are in no tensor")
        if (address[active] % np.uint64(size)).any():
            raise ValueError(f"an address is not a multiple of {size}")
        spans = []
        for n in np.unique(number[active]):
            own = active & (number == n)
            offsets = (address[own] - self._begins[n]).astype(np.int64)
            spans.append(Span(self.regions[n], offsets[:, None] + np.arange(size), own))
        return spans

    def _note(self, span: Span, writes: bool) -> None:
        """Raise RuntimeError where a program writes what another one reads or writes.

        Or touches what the launch before writes, or writes what that reads, and has not waited.
        """
        begin, data = span.region.begin, span.region.data
        if begin < 0:  # shared memory
            return
        if begin in self._beside:
            early = span.bytes[~self._waited[span.threads]]
            read, written = self._beside[begin]
            if written[early].any() or (writes and read[early].any()):
                raise RuntimeError("a program has not waited for the kernel before")
        if begin not in self._touched:
            self._touched[begin] = np.zeros((2, len(data)), np.int32)
        read_by, written_by = self._touched[begin]
        own = self._special["%ctaid.x"][span.threads].astype(np.int32) + 1
        who = np.broadcast_to(own[:, None], span.bytes.shape)
        race = _others(written_by[span.bytes], who)
        if writes:
            race |= _others(read_by[span.bytes], who)
            written_by[span.bytes] = who
            race |= _others(written_by[span.bytes], who)  # at the same time
        else:
            before = read_by[span.bytes]
            read_by[span.bytes] = np.where((before == 0) | (before == who), who, -1)
            read_by[span.bytes[read_by[span.bytes] != who]] = -1  # several
        if race:
            raise RuntimeError("a program writes what another one reads or writes")

    def _find(self, address: Array, size: int, active: Array) -> tuple[Array, Array]:
        """Numbers of regions, and which active threads find none."""
        number = np.searchsorted(self._begins, address, "right").astype(np.int64) - 1
        if not self.regions:
            return number, active
        return number, active & ((number < 0) | (address + np.uint64(size) > self._ends[number]))

    def _space(self, op: Sequence[str], address: Array, size: int, lanes: Lanes) -> list[Span]:
        if "global" in op:
            return self._spans(address, size, lanes)
        assert "shared" in op, op
        active = self._everyone if lanes is None else lanes
        offsets = self._in_shared(address, size, active)
        shared = Region(-1, -1, self._shared)
        return [Span(shared, offsets[:, None] + np.arange(size), active)]

    def _in_shared(self, address: Array, size: int, active: Array) -> Array:
        """Offsets in the shared memory of all programs, one behind the other."""
        at = address[active].astype(np.int64)
        if (at % size).any() or (at + size > self._shared_bytes).any():
            raise IndexError(f"shared memory has no {size} bytes at {at.max()}")
        return at + self._program[active].astype(np.int64) * self._shared_bytes

    def _do_ld(self, i: Instruction, lanes: Lanes) -> None:
        kind, to = i.op[-1], _vector(i.operands[0])
        dtype = dtype_of(kind)
        if "param" in i.op:
            value = np.array([self._arguments[i.operands[1].strip("[]")] % 2**64], np.uint64)
            self._put(to[0], value.astype(_UNSIGNED[bits_of(kind)]), lanes)
            return
        size = dtype.itemsize * len(to)
        values = np.zeros((self.threads, len(to)), dtype)
        for span in self._space(i.op, self._address(i.operands[1]), size, lanes):
            self._note(span, writes=False)
            values[span.threads] = span.region.data[span.bytes].view(dtype)
        for k, register in enumerate(to):
            self._put(register, values[:, k], lanes)

    def _do_st(self, i: Instruction, lanes: Lanes) -> None:
        kind, of = i.op[-1], _vector(i.operands[1])
        columns = [self._wide(self._get(x, kind)) for x in of]
        values = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
        size = values.shape[1]
        for span in self._space(i.op, self._address(i.operands[0]), size, lanes):
            self._note(span, writes=True)
            span.region.data[span.bytes] = values[span.threads]

    def _do_cp(self, i: Instruction, lanes: Lanes) -> None:
        address, sizes = self._address(i.operands[0]), self._get(i.operands[1], "u32")
        active = self._everyone if lanes is None else lanes
        for thread in np.flatnonzero(active):
            begin, size = int(address[thread]), int(sizes[thread])
            if begin % 16 or size % 16 or not size:
                raise ValueError(f"a prefetch of {size} bytes from {begin:#x}")
            for _ in self._with_more():
                # 16 bytes are whole in an allocation of a GPU's, or not in it at all
                if any(r.begin < begin + 16 and begin + size - 16 < r.end for r in self.regions):
                    break
            else:
                raise IndexError(f"a prefetch of {size} bytes at {begin:#x}, in no tensor")
            self.prefetched.append((begin, size))

    def _do_ldmatrix(self, i: Instruction, lanes: Lanes) -> None:
        """Four 8x8 matrices of 16 bits; thread 8k + r has the address of row r of the k-th."""
        offsets, warps = self._rows(i.operands[1], lanes)
        rows = self._shared[offsets[..., None] + np.arange(16)].view(np.uint16)  # [warp, 4, 8, 8]
        if "trans" in i.op:
            rows = rows.swapaxes(2, 3)
        pairs = np.ascontiguousarray(rows).view(np.uint32)  # [warp, 4, 8, 4]: thread 4r + c
        for k, register in enumerate(_vector(i.operands[0])):
            values = np.zeros((len(warps), WARP), np.uint32)
            values[warps] = pairs[:, k].reshape(-1, WARP)
            self._put(register, values.reshape(-1), lanes)

    def _do_stmatrix(self, i: Instruction, lanes: Lanes) -> None:
        offsets, warps = self._rows(i.operands[0], lanes)
        registers = [self._get(x, "b32").reshape(-1, WARP)[warps] for x in _vector(i.operands[1])]
        pairs = np.stack([r.reshape(-1, 8, 4) for r in registers], 1)  # [warp, 4, 8, 4]
        rows = np.ascontiguousarray(pairs).view(np.uint16)
        if "trans" in i.op:
            rows = np.ascontiguousarray(rows.swapaxes(2, 3))
        self._shared[offsets[..., None] + np.arange(16)] = rows.view(np.uint8)

    def _rows(self, operand: str, lanes: Lanes) -> tuple[Array, Array]:
        """Offsets of matrices' rows, [warp, 4, 8], and which warps want them."""
        active = self._everyone if lanes is None else lanes
        warps = active.reshape(-1, WARP).all(1)
        assert warps.repeat(WARP).tolist() == active.tolist(), "a warp's threads have parted"
        return self._in_shared(self._address(operand), 16, active).reshape(-1, 4, 8), warps

    # What threads do together

    def _do_bar(self, i: Instruction, lanes: Lanes) -> None:
        """Who is behind goes first: so all of a program that have not ended are here, or none."""
        if lanes is not None:
            programs = np.zeros(int(self._program.max()) + 1, dtype=bool)
            programs[self._program[lanes]] = True
            assert not (programs[self._program] & ~lanes & ~self._ended).any(), i.text

    def _do_griddepcontrol(self, i: Instruction, lanes: Lanes) -> None:
        if i.op[1] == "wait":
            self._waited[slice(None) if lanes is None else lanes] = True

    def _do_shfl(self, i: Instruction, lanes: Lanes) -> None:
        other = self._lane ^ int(i.operands[2], 0)
        self._put(i.operands[0], self._get(i.operands[1], "b32")[other], lanes)

    def _do_redux(self, i: Instruction, lanes: Lanes) -> None:
        values = self._get(i.operands[1], "u32").reshape(-1, WARP)
        total = values.sum(1, dtype=np.uint64).astype(np.uint32)
        self._put(i.operands[0], total.repeat(WARP), lanes)

    # Moves and conversions

    def _do_mov(self, i: Instruction, lanes: Lanes) -> None:
        to, of = i.operands
        if to[0] == "{":
            parts = _vector(to)
            size = bits_of(i.op[1]) // len(parts)
            whole = self._get(of, i.op[1])
            for k, register in enumerate(parts):
                piece = (whole >> whole.dtype.type(k * size)).astype(_UNSIGNED[size])
                self._put(register, piece, lanes)
        elif of[0] == "{":
            parts, dtype = _vector(of), dtype_of(i.op[1])
            size = bits_of(i.op[1]) // len(parts)
            joined = np.zeros(1, dtype)
            for k, x in enumerate(parts):
                joined = joined | (self._get(x, f"b{size}").astype(dtype) << dtype.type(k * size))
            self._put(to, joined, lanes)
        else:
            self._put(to, self._get(of, i.op[1]), lanes)

    def _do_cvt(self, i: Instruction, lanes: Lanes) -> None:
        target, source = i.op[-2:]
        x = self._get(i.operands[1], "b16" if source == "bf16" else source)
        if source == "bf16":
            x = from_bf16(x)
        if target in ("bf16x2", "f16x2"):
            low = self._get(i.operands[2], source)
            low16, high16 = (_to_half(h, target[:-2]).astype(np.uint32) for h in (low, x))
            self._put(i.operands[0], low16 | (high16 << np.uint32(16)), lanes)
        elif target in ("bf16", "f16"):
            self._put(i.operands[0], _to_half(x, target), lanes)
        else:
            self._put(i.operands[0], x.astype(dtype_of(target)), lanes)

    def _do_selp(self, i: Instruction, lanes: Lanes) -> None:
        a, b = (self._get(x, i.op[1]) for x in i.operands[1:3])
        self._put(i.operands[0], np.where(self._get(i.operands[3], "pred"), a, b), lanes)

    def _do_setp(self, i: Instruction, lanes: Lanes) -> None:
        if i.op[2] == "f16x2":
            a, b = (self._wide(self._get(x, "b32")) for x in i.operands[1:3])
            halves = (x.view(np.float16).reshape(-1, 2) for x in map(np.ascontiguousarray, (a, b)))
            both = compare(i.op[1], *halves)
            for k, register in enumerate(i.operands[0].split("|")):
                self._put(register, both[:, k], lanes)
            return
        kind = "b16" if i.op[2] == "bf16" else i.op[2]
        a, b = (self._get(x, kind) for x in i.operands[1:3])
        if i.op[2] == "bf16":
            a, b = from_bf16(a), from_bf16(b)
        self._put(i.operands[0], compare(i.op[1], a, b), lanes)

    def _do_prmt(self, i: Instruction, lanes: Lanes) -> None:
        a, b, selector = (self._get(x, "b32").astype(np.uint64) for x in i.operands[1:4])
        pool, result = a | (b << np.uint64(32)), np.zeros(1, np.uint64)
        for k in range(4):
            choice = (selector >> np.uint64(4 * k)) & np.uint64(15)
            byte = (pool >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(choice & np.uint64(8), sign, byte)
            result = result | (byte << np.uint64(8 * k))
        self._put(i.operands[0], result.astype(np.uint32), lanes)

    def _do_bfe(self, i: Instruction, lanes: Lanes) -> None:
        x = self._get(i.operands[1], i.op[1])
        begin, size = (self._get(o, "u32").astype(x.dtype) for o in i.operands[2:4])
        above = x.dtype.type(8 * x.itemsize) - begin - size
        self._put(i.operands[0], x << above >> above + begin, lanes)  # a sign spreads

    def _do_lop3(self, i: Instruction, lanes: Lanes) -> None:
        a, b, c = (self._get(x, "b32") for x in i.operands[1:4])
        table, result = int(i.operands[4], 0), np.zeros(1, np.uint32)
        for k in range(8):
            if table >> k & 1:
                terms = (x if k >> n & 1 else ~x for x, n in ((a, 2), (b, 1), (c, 0)))
                result = result | np.bitwise_and.reduce(np.broadcast_arrays(*terms))
        self._put(i.operands[0], result, lanes)

    # Arithmetic and logic

    def _numbers(self, operand: str, kind: str) -> Array:
        """As `_get`; float32 pairs of 64 bits, Blackwell's, as [2 * threads]."""
        if kind != "f32x2":
            return self._get(operand, kind)
        return np.ascontiguousarray(self._wide(self._get(operand, "b64"))).view(np.float32)

    def _put_result(self, i: Instruction, result: Array, lanes: Lanes) -> None:
        result = nvidias_nan(result)
        self._put(i.operands[0], result.view(np.uint64) if i.op[-1] == "f32x2" else result, lanes)

    def _binary(self, i: Instruction, lanes: Lanes, call: Callable[[Any, Any], Any]) -> None:
        a, b = (self._numbers(x, i.op[-1]) for x in i.operands[1:3])
        self._put_result(i, call(a, b), lanes)

    def _unary(self, i: Instruction, lanes: Lanes, call: Callable[[Any], Any]) -> None:
        self._put(i.operands[0], call(self._get(i.operands[1], i.op[-1])), lanes)

    def _do_mul(self, i: Instruction, lanes: Lanes) -> None:
        if "wide" in i.op:
            a, b = (_widened(self._get(x, i.op[-1])) for x in i.operands[1:3])
            self._put(i.operands[0], a * b, lanes)
        else:
            self._binary(i, lanes, np.multiply)

    def _do_mad(self, i: Instruction, lanes: Lanes) -> None:
        a, b = (self._get(x, i.op[-1]) for x in i.operands[1:3])
        kind = i.op[-1]
        if "wide" in i.op:
            a, b, kind = _widened(a), _widened(b), f"{kind[0]}64"
        self._put(i.operands[0], a * b + self._get(i.operands[3], kind), lanes)

    def _do_fma(self, i: Instruction, lanes: Lanes) -> None:
        a, b, c = (self._numbers(x, i.op[-1]) for x in i.operands[1:4])
        self._put_result(i, (fma64 if i.op[-1] == "f64" else fma32)(a, b, c), lanes)

    def _do_div(self, i: Instruction, lanes: Lanes) -> None:
        whole = i.op[-1][0] != "f"  # towards 0
        self._binary(i, lanes, lambda a, b: (a - np.fmod(a, b)) // b if whole else a / b)

    def _do_sqrt(self, i: Instruction, lanes: Lanes) -> None:
        x = self._get(i.operands[1], i.op[-1])
        root = flushed(np.sqrt(flushed(x))) if "ftz" in i.op else np.sqrt(x)
        self._put_result(i, root, lanes)

    def _do_rcp(self, i: Instruction, lanes: Lanes) -> None:
        x = self._get(i.operands[1], i.op[-1])
        self._put_result(i, flushed(np.float32(1) / flushed(x)), lanes)

    def _do_min(self, i: Instruction, lanes: Lanes) -> None:
        self._binary(i, lanes, np.fmin if _ignores_nan(i) else np.minimum)

    def _do_max(self, i: Instruction, lanes: Lanes) -> None:
        self._binary(i, lanes, np.fmax if _ignores_nan(i) else np.maximum)

    def _do_shl(self, i: Instruction, lanes: Lanes) -> None:
        x, by, size = self._shift(i)
        shifted = np.where(by < size, x << by.astype(x.dtype), x.dtype.type(0))
        self._put(i.operands[0], shifted, lanes)

    def _do_shr(self, i: Instruction, lanes: Lanes) -> None:
        x, by, size = self._shift(i)
        gone = x >> x.dtype.type(size - 1) if x.dtype.kind == "i" else x.dtype.type(0)
        self._put(i.operands[0], np.where(by < size, x >> by.astype(x.dtype), gone), lanes)

    def _shift(self, i: Instruction) -> tuple[Array, Array, int]:
        return self._get(i.operands[1], i.op[1]), self._get(i.operands[2], "u32"), bits_of(i.op[1])


def _junk(register: str) -> Array:
    return _JUNK.get(register.rstrip("0123456789"), np.array([True]))


def _to_half(x: Array, kind: str) -> Array:
    """Bits of float16 or bfloat16."""
    if kind == "bf16":
        return to_bf16(to_odd32(x) if x.dtype == np.float64 else x)
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def _ignores_nan(i: Instruction) -> bool:
    return i.op[-1][0] == "f" and "NaN" not in i.op


def _others(programs: Array, who: Array) -> bool:
    return bool(((programs != 0) & (programs != who)).any())


def _vector(operand: str) -> list[str]:
    return [x.strip() for x in operand.strip("{} ").split(",")]


def _widened(x: Array) -> Array:
    return x.astype(_SIGNED[64] if x.dtype.kind == "i" else _UNSIGNED[64])


def _immediate(text: str, dtype: np.dtype[Any]) -> Array:
    if text[:2] in ("0f", "0d"):
        bits = np.array([int(text[2:], 16)], _UNSIGNED[32 if text[1] == "f" else 64])
        return bits.view(dtype)
    if dtype.kind == "b":
        return np.array([int(text, 0) != 0])
    value = int(text.rstrip("U"), 0) % 2 ** (8 * dtype.itemsize)
    return np.array([value], _UNSIGNED[8 * dtype.itemsize]).view(dtype)
