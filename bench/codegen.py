"""Compile the kernels for GPUs that need not be there, and list what the compilers made of them.

    python bench/codegen.py                                        # the sets below, every target
    python bench/codegen.py --targets sm_90 --sets triples         # each (param, grad, state) alone
    python bench/codegen.py --sets fp32 bf16/fp32/bf16 --json OUT  # the numbers, for a program
    python bench/codegen.py --no-count                             # in 2/3 of the time

The kernels are launched by their own launchers, under a driver that only names a target, and stop
before the launch itself: dtypes, specialisation and options are those of a real step. A row shows
the registers of a thread, bytes it spills, shared memory of a program, instructions in all, those
an element costs on the vector path (where only one signature is compiled), and how many loads and
stores of tensor elements a thread has, by width in bits. The last two tell what tests/
test_generated_code.py asserts: the vector path moves 128 bits at a time, the other one element.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast
from unittest import mock

import numpy as np
import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fused_adamw.kernels import adamw, norm, schedule
from fused_adamw.kernels import table as t
from fused_adamw.kernels.front import Front
from fused_adamw.kernels.launch_parameters import CAPS, LaunchParameters, launch_parameters

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),  # A100
    "sm_90": GPUTarget("cuda", 90, 32),  # H100, H200
    "sm_100": GPUTarget("cuda", 100, 32),  # B200
    "gfx942": GPUTarget("hip", "gfx942", 64),  # MI300
}
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "int8": torch.uint8,
}
PREFETCH = "cp.async.bulk.prefetch.L2.global"


class Case(NamedTuple):
    """One compilation: a kernel, and what it is specialised on."""

    signatures: tuple[t.Signature, ...]
    scaled: bool = False  # under GradScaler: unscaled gradients are stored, steps may be skipped
    kernel: Literal["adamw", "schedule", "norm"] = "adamw"
    clipped: bool = False  # the schedule takes a norm
    meshes: int = 1  # over whose ranks squares are added up
    measured: bool = False  # with group_metrics
    variant: dict[str, Any] = {}  # noqa: RUF012  # launch parameters other than the target's own


def signature(name: str, amsgrad: bool = False) -> t.Signature:
    """A signature from "param/grad/state", such as "bf16/bf16/fp32"."""
    param, grad, state = (DTYPES[part] for part in name.split("/"))
    return t.Signature(param, grad, state, state, amsgrad)


def alone(name: str) -> Case:
    """The case of one signature, from "param/grad/state"."""
    return Case((signature(name),))


FREE = dict.fromkeys(CAPS, 0)  # registers as ptxas likes them
GENERAL = {"plain": False}  # for any hyper-parameters, not for those alone that most have
_ALL = {name: signature(f"{name}/{name}/{name}") for name in DTYPES if name != "int8"}
_MIXED = signature("bf16/bf16/fp32")
_BF16, _INT8 = _ALL["bf16"], signature("bf16/bf16/int8")
SETS = {
    "fp32": Case((_ALL["fp32"],)),
    "bf16": Case((_ALL["bf16"],)),
    "fp16": Case((_ALL["fp16"],)),
    "mixed+fp32": Case((_MIXED, _ALL["fp32"])),  # mixed: bf16 params, fp32 moments
    "bf16+fp32": Case((_ALL["bf16"], _ALL["fp32"])),
    "fp32-scaled": Case((_ALL["fp32"],), scaled=True),
    "mixed+fp32-scaled": Case((_MIXED, _ALL["fp32"]), scaled=True),
    "fp32-amsgrad": Case((signature("fp32/fp32/fp32", amsgrad=True),)),
    "bf16-amsgrad": Case((signature("bf16/bf16/bf16", amsgrad=True),)),
    "fp64": Case((_ALL["fp64"],)),
    "bf16-stochastic": Case((_BF16._replace(stochastic=True),)),
    "bf16-remainder-fp32": Case((_MIXED._replace(master=torch.int16),)),
    "bf16-remainder-int8": Case((_INT8._replace(master=torch.int16),)),
    "bf16-int8": Case((_INT8,)),
    "bf16-remainder-int8+fp32": Case((_INT8._replace(master=torch.int16), _ALL["fp32"])),
    "fp64-scaled": Case((_ALL["fp64"],), scaled=True),
    "fp32-exact": Case((_ALL["fp32"],), variant={"exact": True, **FREE}),
    "mixed+fp32-exact": Case((_MIXED, _ALL["fp32"]), variant={"exact": True, **FREE}),
    "fp32-general": Case((_ALL["fp32"],), variant=GENERAL),
    "mixed+fp32-general": Case((_MIXED, _ALL["fp32"]), variant=GENERAL),
    "bf16-stochastic-general": Case((_BF16._replace(stochastic=True),), variant=GENERAL),
    "bf16-int8-general": Case((_INT8,), variant=GENERAL),
    "bf16-remainder-int8-general": Case((_INT8._replace(master=torch.int16),), variant=GENERAL),
    "fp32-looped": Case((_ALL["fp32"],), variant={"blocks_per_program": 4, **FREE}),
    "mixed+fp32-looped": Case((_MIXED, _ALL["fp32"]), variant={"blocks_per_program": 4, **FREE}),
    "fp32-measured": Case((_ALL["fp32"],), measured=True),
    "bf16-measured": Case((_ALL["bf16"],), measured=True),
    "mixed+fp32-measured": Case((_MIXED, _ALL["fp32"]), measured=True),
    "fp32-amsgrad-measured": Case((signature("fp32/fp32/fp32", amsgrad=True),), measured=True),
    "fp64-measured": Case((_ALL["fp64"],), measured=True),
    "mixed+fp32-scaled-measured": Case((_MIXED, _ALL["fp32"]), scaled=True, measured=True),
    "mixed+fp32-looped-measured": Case(
        (_MIXED, _ALL["fp32"]), variant={"blocks_per_program": 4, **FREE}, measured=True
    ),
    "schedule": Case((_ALL["fp32"],), kernel="schedule"),
    "schedule-clipped": Case((_ALL["fp32"],), scaled=True, kernel="schedule", clipped=True),
    "norm-fp32": Case((_ALL["fp32"],), kernel="norm"),
    "norm-bf16": Case((_ALL["bf16"],), kernel="norm"),
    "norm-mixed+fp32": Case((_MIXED, _ALL["fp32"]), kernel="norm"),
    "norm-meshes": Case((_MIXED, _ALL["fp32"]), kernel="norm", meshes=2),
    "schedule-measured": Case((_ALL["fp32"],), kernel="schedule", measured=True),
    "schedule-scaled": Case((_ALL["fp32"],), scaled=True, kernel="schedule"),
    "schedule-fp64-scaled": Case((_ALL["fp64"],), scaled=True, kernel="schedule"),
}
TRIPLES = tuple("/".join(names) for names in itertools.product(("fp32", "bf16", "fp16"), repeat=3))


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of one kernel on one target."""

    kernel: str
    set: str
    target: str
    signatures: tuple[tuple[str, ...], ...]  # dtypes of param, grad, exp_avg, exp_avg_sq (and max)
    scaled: bool
    measured: bool
    elements_per_thread: int
    registers: int
    spills: int  # NVIDIA: local loads and stores; AMD: registers spilled
    stack: int  # bytes a thread
    shared: int  # bytes a program, that the launch asks for
    instructions: int | None  # None: not counted
    instructions_per_element: float | None  # up to the vector path's last store; one signature
    reciprocals: int  # in place of divisions, in NVIDIA's PTX
    prefetches: int  # there, too
    read_early: int  # instructions before the first prefetch that wait for elements; there, too
    overlaps: bool  # the launch may begin before that before it has ended
    grid_control: list[str]  # of dependent launches, "wait" and "launch_dependents", as in PTX
    loads: dict[int, int]  # bits -> how many of tensor elements, that is with a lane's own address
    stores: dict[int, int]


class Launch(NamedTuple):
    """One call of a kernel by its launcher, and what was compiled for it."""

    kernel: str
    args: tuple[object, ...]
    kwargs: dict[str, object]
    compiled: Any


class Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Address:
    """Stands for a tensor on a GPU that is not there: what Triton and the launchers look at."""

    dtype: torch.dtype
    address: int = 512  # torch's allocators align to 512 bytes
    device: ClassVar[torch.device] = torch.device("cuda")  # ROCm's name, too

    def data_ptr(self) -> int:
        """The address."""
        return self.address

    def numel(self) -> int:
        """Some number of elements."""
        return 1


MEMORY = t.Memory(*(cast(Tensor, Address(d)) for d in (torch.int64, torch.float32, torch.float64)))


@contextlib.contextmanager
def launches(target: GPUTarget) -> Iterator[list[Launch]]:
    """Within it the launchers compile for the target and append to the list, and launch nothing."""
    seen: list[Launch] = []

    def compile_only(kernel: Any, run: Callable[..., Any]) -> Callable[..., None]:
        def wrapped(*args: object, grid: object, warmup: bool, **kwargs: object) -> None:
            compiled = run(*args, grid=grid, warmup=True, **kwargs)
            seen.append(Launch(kernel.__name__, args, kwargs, compiled))

        return wrapped

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(triton.runtime.driver, "_active", Driver(target)))
        enter(mock.patch.object(torch.version, "hip", "0" if target.backend == "hip" else None))
        for kernel in (adamw._adamw, schedule._schedule, norm._sum_squares):
            kernel.device_caches.clear()  # the device is always 0, whatever the target
            stack.callback(kernel.device_caches.clear)
            enter(mock.patch.object(kernel, "run", compile_only(kernel, kernel.run)))
        yield seen


def make_table(
    signatures: Sequence[t.Signature], parameters: LaunchParameters | None = None
) -> t.Table:
    """A table of one small tensor a signature."""
    rows = [
        t.Row(512, 512, 512, 512 * s.amsgrad, 512, 8, 0, s, s.compute == torch.float64)
        for s in signatures
    ]
    grads = np.full(len(rows), 512, dtype=np.int64)
    groups = np.zeros(t.GROUP_WORDS, dtype=np.int64)
    return t.build(rows, grads, groups, 1, parameters or LaunchParameters())


def compile_case(name: str, target: str, case: Case | None = None, *, count: bool = True) -> Report:
    """Compile a case for a target, through its launcher; by name, or one that has none.

    count: whether to count the instructions, for which NVIDIA's code is disassembled. Those of an
        element are counted without prefetches, for which one warp of a program, or of 8, is there.
    """
    if case is None:
        case = SETS[name] if name in SETS else alone(name)
    variant = {"plain": True, **case.variant}
    table = make_table(case.signatures, launch_parameters(target)._replace(**variant))
    with launches(TARGETS[target]) as seen:
        if case.kernel == "schedule":
            scalar = cast(Tensor, Address(torch.float32)) if case.scaled else None
            sums = cast(Tensor, Address(torch.float64))
            given = schedule.Norm(sums, sums, skip_nonfinite=True) if case.clipped else None
            counted = cast(Tensor, Address(torch.float64)) if case.measured else None
            rates = t.pack_rates([1e-3])
            schedule.schedule(Front(), table, MEMORY, scalar, scalar, given, counted, rates)
        elif case.kernel == "norm":
            sums = cast(Tensor, Address(torch.float64))
            norm.sum_squares(Front(), table, MEMORY.words, sums, case.meshes)
        else:
            rows = cast(Tensor, Address(torch.float32)) if case.measured else None
            adamw.adamw(Front(), table, MEMORY, store_grad=case.scaled, rows=rows)
    (launch,) = seen
    block = cast(int, launch.kwargs["TENSORS" if case.kernel == "schedule" else "BLOCK"])
    threads = launch.compiled.metadata.num_warps * TARGETS[target].warp_size
    per_thread = max(1, block // threads)
    narrow = any(s.quantised for s in case.signatures)
    if TARGETS[target].backend == "hip":
        code = _read_amd(launch.compiled.asm, narrow)
    else:
        code = _read_nvidia(launch.compiled.asm, narrow, count)
    cost = None
    if count and case.kernel == "adamw" and len(case.signatures) == 1:
        if table.ahead:
            without = case._replace(variant={**case.variant, "prefetch": 0})
            cost = compile_case(name, target, without).instructions_per_element
        elif code.last_vector_store:
            cost = code.last_vector_store / per_thread
    names = {dtype: short for short, dtype in DTYPES.items()}
    ptx = launch.compiled.asm.get("ptx", "")  # NVIDIA's alone
    return Report(
        kernel=case.kernel,
        set=name,
        target=target,
        signatures=tuple(
            tuple(names[d] for d in (*s[:4], *([s.exp_avg_sq] if s.amsgrad else [])))
            for s in case.signatures
        ),
        scaled=case.scaled,
        measured=case.measured,
        elements_per_thread=per_thread,
        registers=code.registers,
        spills=code.spills,
        stack=code.stack,
        shared=launch.compiled.metadata.shared,
        instructions=code.instructions if count else None,
        instructions_per_element=cost,
        reciprocals=ptx.count("rcp.approx.ftz.f32"),
        prefetches=ptx.count(PREFETCH),
        read_early=_read_early(ptx),
        overlaps=getattr(launch.compiled.metadata, "launch_pdl", False),
        grid_control=re.findall(r"griddepcontrol\.(\w+)", ptx),
        loads=code.loads,
        stores=code.stores,
    )


class _Code(NamedTuple):
    registers: int
    spills: int
    stack: int
    instructions: int
    last_vector_store: int | None  # instructions up to it; the vector path comes first
    loads: dict[int, int]
    stores: dict[int, int]


def _read_nvidia(asm: dict[str, Any], narrow: bool, count: bool) -> _Code:
    usage = _cuobjdump(asm["cubin"], "-res-usage")
    used = {key: int(number) for key, number in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    code = []
    if count or used["STACK"]:  # without a stack there is nowhere to spill to
        # /*0a30*/  @!P0 LDG.E.128 R4, [R2.64] ;
        sass = _cuobjdump(asm["cubin"], "-sass")  # half a second
        code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?(\S+)", sass, re.MULTILINE)
        code = code[: _end(code, lambda op: op == "BRA")]  # a branch to itself and NOPs pad the end
    # Elements are loaded under their lane's mask, what all lanes share (table, scalars) is not.
    access = re.findall(r"@%p\d+ (ld|st)\.global[.\w:]*?(?:\.v(\d))?\.b(\d+) ", asm["ptx"])
    widths = [(kind, int(count or 1) * int(bits)) for kind, count, bits in access]
    return _Code(
        registers=used["REG"],
        spills=sum(op.startswith(("LDL", "STL")) for op in code),
        stack=used["STACK"],
        instructions=len(code),
        last_vector_store=_last(
            code,
            lambda op: op.startswith("STG") and op.endswith((".128", ".64") if narrow else ".128"),
        ),
        loads=_count(bits for kind, bits in widths if kind == "ld"),
        stores=_count(bits for kind, bits in widths if kind == "st"),
    )


def _read_early(ptx: str) -> int:
    """How many instructions before the first prefetch wait for an element."""
    before, _, behind = ptx.partition(PREFETCH)
    loaded: set[str] = set()
    early = 0
    for line in before.splitlines() if behind else ():
        _, _, of = line.partition("[" if "st." in line else ",")
        if re.match(r"\s*@%p\d+ ld\.global", line):
            loaded.update(re.findall(r"%\w+", line[line.index("{") : line.index("}")]))
        else:
            early += not loaded.isdisjoint(re.findall(r"%\w+", of))
    return early


def _cuobjdump(cubin: bytes, *options: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        run = subprocess.run([tool, *options, file], capture_output=True, text=True, check=True)
    return run.stdout


_AMD_BITS = {
    "byte": 8,
    "ubyte": 8,
    "sbyte": 8,
    "short": 16,
    "ushort": 16,
    "sshort": 16,
    "short_d16": 16,
    "short_d16_hi": 16,
}
_AMD_BITS |= {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def _read_amd(asm: dict[str, Any], narrow: bool) -> _Code:
    text = asm["amdgcn"]
    used = {key: int(number) for key, number in re.findall(r"^\s+\.(\w+): +(\d+)$", text, re.M)}
    code = re.findall(r"^\t([a-z]+_\w+)", text.split("s_endpgm")[0], re.MULTILINE)
    # Elements are reached through buffer operations (a base and a lane's offset), what all lanes
    # share through scalar and global loads.
    access = [re.match(r"buffer_(load|store)_(?:format_)?(\w+)$", op) for op in code]
    widths = [(m[1], _AMD_BITS[m[2].removesuffix("_d16")]) for m in access if m]
    return _Code(
        registers=used["vgpr_count"],
        spills=used["vgpr_spill_count"] + used["sgpr_spill_count"],
        stack=used["private_segment_fixed_size"],
        instructions=len(code),
        last_vector_store=_last(
            code,
            lambda op: op == "buffer_store_dwordx4" or (narrow and op == "buffer_store_dwordx2"),
        ),
        loads=_count(bits for kind, bits in widths if kind == "load"),
        stores=_count(bits for kind, bits in widths if kind == "store"),
    )


def _count(bits: Iterator[int]) -> dict[int, int]:
    return dict(sorted(Counter(bits).items()))


def _last(code: Sequence[str], want: Callable[[str], bool]) -> int | None:
    """How many instructions there are up to the last one wanted, itself included."""
    return max((i + 1 for i, op in enumerate(code) if want(op)), default=None)


def _end(code: Sequence[str], want: Callable[[str], bool]) -> int:
    return (_last(code, want) or len(code) + 1) - 1


def show(reports: Sequence[Report]) -> Table:
    """The reports as a table for people."""

    def widths(counts: dict[int, int]) -> str:
        return " ".join(f"{n}x{bits}" for bits, n in sorted(counts.items(), reverse=True)) or "-"

    table = Table(title=f"Triton {triton.__version__}")
    for head in ("set", "target"):
        table.add_column(head, no_wrap=True)
    for head in ("regs", "spills", "stack", "shared", "instr.", "/elem."):
        table.add_column(head, justify="right")
    table.add_column("loads (n x bits)")
    table.add_column("stores")
    for r in reports:
        cost = "" if r.instructions_per_element is None else f"{r.instructions_per_element:.0f}"
        count = "" if r.instructions is None else r.instructions
        numbers = (r.registers, r.spills, r.stack, r.shared, count)
        row = (*map(str, numbers), cost, widths(r.loads), widths(r.stores))
        table.add_row(r.set, r.target, *row)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--sets",
        nargs="+",
        default=list(SETS),
        metavar="SET",
        help=f"any of {', '.join(SETS)}; param/grad/state, as in bf16/bf16/fp32; or triples",
    )
    parser.add_argument(
        "--count",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count instructions, which takes a third of the time",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    options = parser.parse_args(arguments)
    names = [n for s in options.sets for n in (TRIPLES if s == "triples" else (s,))]
    for name in names:
        if name not in SETS and (name.count("/") != 2 or not set(name.split("/")) <= set(DTYPES)):
            parser.error(f"unknown set {name!r} (want {', '.join(SETS)}, triples, or p/g/s)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets the kernels: unset it to compile them")
    console = Console(width=None if sys.stdout.isatty() else 160)
    started, reports = time.perf_counter(), []
    with console.status("compiling"):
        for target, name in itertools.product(options.targets, names):
            reports.append(compile_case(name, target, count=options.count))
    console.print(show(reports))
    console.print(f"{len(reports)} kernels in {time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(r) for r in reports], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
