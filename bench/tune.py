"""Sweep the launch parameters of the main kernel: predicted for any GPU, measured on the one here.

    python bench/tune.py                                # no GPU: compile for all, predict
    python bench/tune.py --targets sm_90 --sets fp32 --candidates default loop-4
    python bench/tune.py --try block=2048,maxnreg=48    # and one of your own
    python bench/tune.py --write                        # on a GPU: keep what is fastest

Compiling, the kernel's own launcher is asked for each candidate and target (bench/codegen.py), from
an empty cache. For each target and set of dtypes a table lists

    regs     registers of a thread
    spills   local loads and stores, and bytes of a thread, where there are any
    shared   bytes of a program
    progs    programs that share a multiprocessor, and how many of its warps that fills
    /elem.   instructions an element, prologue included; for sets of one signature only
    issue    part of the issue slots that these take at full bandwidth: above 100 % they bound it
    TB/s     predicted: 0.9 of the published bandwidth, or what the issue slots let through

What the compiler refuses is listed with its reason. On a GPU each candidate first updates small
tensors and has to leave the default's bits behind (the exact ones: nearly). Then all are timed on
tensors of their own, as bench/step.py times optimizers: in rounds, in random order, the cache
flushed, the default twice to show the noise. Predicted is then from the bandwidth that a stream of
4 reads and 3 writes has in the same run. The fastest candidate that keeps the bits, if it gains
more than noise, is what --write puts into kernels/launch_parameters.json for this architecture. The
default is what is there already, and a candidate is one change of it: who has written one runs it
again for the next.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import codegen
import torch
import triton
from cases import CASES, TINY_CASES, Case, Group, Leaf, Mi, gradients, make
from chips import CHIPS, REACHED, Chip, issue_share, predicted_tbs, programs_of_unit
from machine import Device, ceiling, describe, find_commit, measure_ceilings
from processes import in_processes
from providers import FORMATS, Provider
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from summary import noise, number, percentiles, times_as_fast
from timing import Line, run_case
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fused_adamw import FusedAdamW, plan
from fused_adamw.kernels import launch_parameters as stored
from fused_adamw.kernels.launch_parameters import LaunchParameters, architecture
from fused_adamw.storage import REMAINDER

PER_THREAD = 8  # elements: 128 bits of bf16. 16 cost 155 registers; 4 make 64-bit accesses of bf16


class Candidate(NamedTuple):
    """Launch parameters to try, as they differ from the architecture's own, and why."""

    name: str
    changes: dict[str, Any]
    reason: str

    def parameters(self, target: str) -> LaunchParameters:
        """As launched on the target: its own, and the changes; warps follow from the block."""
        lanes = codegen.TARGETS[target].warp_size
        own = stored.launch_parameters(target)
        p = own._replace(**self.changes)
        if lanes != 32:  # caps have no effect there
            p = p._replace(**{key: getattr(own, key) for key in stored.CAPS})
        if lanes != 32 or int(target.removeprefix("sm_")) < 90:  # nor what came with Hopper
            p = p._replace(prefetch=own.prefetch, overlap=own.overlap)
        if "num_warps" in self.changes:
            return p
        return p._replace(num_warps=max(1, p.block // (PER_THREAD * lanes)))


# Each goes one way from the default, some two where the one is the other's cure. Left out: other
# elements a thread (see PER_THREAD); num_stages, since a loop of loads is not pipelined; stores by
# .wb and .cg, which is what a plain store does, and .wt, which writes each through to memory;
# evict_last, since between two steps a training streams more than any cache through it.
CANDIDATES = (
    Candidate("default", {}, "8 elements a thread, 4 warps, one block: nothing to loop over"),
    Candidate("block-512", {"block": 512}, "shorter tails, and more programs to overlap"),
    Candidate("block-2048", {"block": 2048}, "half as many look-ups of chunk, row, addresses"),
    Candidate("block-4096", {"block": 4096}, "a quarter as many"),
    Candidate("loop-2", {"blocks_per_program": 2}, "look-ups and launch of a program for 2 blocks"),
    Candidate("loop-4", {"blocks_per_program": 4}, "for 4"),
    Candidate("loop-8", {"blocks_per_program": 8}, "for 8: is there an end to the gain?"),
    Candidate(
        "loop-4-free",
        {"blocks_per_program": 4, **codegen.FREE},
        "a loop wants more registers than the cap allows: does it matter?",
    ),
    Candidate(
        "loop-4-of-512", {"block": 512, "blocks_per_program": 4}, "small blocks, few look-ups"
    ),
    Candidate(
        "regs-free", codegen.FREE, "one or several dtypes as ptxas likes them: why cap them?"
    ),
    Candidate("regs-56", {"maxnreg": 56}, "9 programs a multiprocessor, not 8: more in flight"),
    Candidate("regs-48", {"maxnreg": 48}, "10 programs"),
    Candidate("one-56", {"maxnreg_one": 56}, "one dtype: 9 programs, where ptxas would take more"),
    Candidate("int8-72", {"maxnreg_int8": 72}, "8-bit moments: 7 programs, not 6"),
    Candidate("int8-64", {"maxnreg_int8": 64}, "8: worth more instructions, and spills in tails?"),
    Candidate("random-64", {"maxnreg_random": 64}, "stochastic rounding: 8 programs, not 7"),
    Candidate(
        "exact",
        {"exact": True, **codegen.FREE},
        "IEEE division and root: are the instructions free?",
    ),
    Candidate("exact-64", {"exact": True}, "the same, held to the registers of the others"),
    Candidate("prefetch-0", {"prefetch": 0}, "is it worth its instructions?"),
    Candidate("prefetch-4096", {"prefetch": 4096}, "nearer: less of the cache is taken"),
    Candidate("prefetch-8192", {"prefetch": 8192}, "farther: is it there in time?"),
    Candidate("overlap", {"overlap": True}, "launched and looked up while the schedule runs"),
    Candidate("apart", {"overlap": False}, "after it: does the overlap repay its instruction?"),
    Candidate("load-cg", {"load_cache": ".cg"}, "past L1: nothing is read twice"),
    Candidate("load-cs", {"load_cache": ".cs"}, "read lines leave first (refused by Triton 3.6)"),
    Candidate("store-cs", {"store_cache": ".cs"}, "written lines leave first: no one reads them"),
    Candidate("stream", {"load_cache": ".cg", "store_cache": ".cs"}, "both of these"),
    Candidate("evict-first", {"eviction": "evict_first"}, "the same by L2's own policy, both ways"),
    Candidate(
        "stream-2048",
        {"block": 2048, "load_cache": ".cg", "store_cache": ".cs"},
        "fewer look-ups, and these past the cache's elements",
    ),
)
BY_NAME = {candidate.name: candidate for candidate in CANDIDATES}
DEFAULT = CANDIDATES[0]

_BF16_TINY = Case("tiny-bf16", (Group(tuple(Leaf((n, 64), torch.bfloat16) for n in (1, 67))),))
_MATRICES = tuple(Leaf((16 * Mi,), torch.bfloat16) for _ in range(9))
_MIXED = Case("9x16Mi-bf16+16Mi", (Group((*_MATRICES, Leaf((16 * Mi,)))),))
_FLOAT32_MOMENTS = {"state_dtype": torch.float32}
_MASTER_INT8, _INT8, _STOCHASTIC = (FORMATS[name][0] for name in ("+master+int8", "+int8", "+sr"))


class Timed(NamedTuple):
    """A case, the set of signatures that it launches, and FusedAdamW's storage options."""

    case: Case
    set: str
    options: Mapping[str, Any] = {}


TIMED = (
    Timed(CASES["10x16Mi"], "fp32"),
    Timed(CASES["gpt2"], "fp32"),  # tails: 148 tensors, 98 of them small
    Timed(CASES["10x16Mi-bf16"], "bf16"),
    Timed(CASES["200x1Mi-bf16"], "bf16"),  # look-ups: a new tensor each 4 us of an H200
    Timed(_MIXED, "mixed+fp32", _FLOAT32_MOMENTS),
    Timed(CASES["10x16Mi-bf16"], "bf16-remainder-int8", _MASTER_INT8),
    Timed(CASES["10x16Mi-bf16"], "bf16-int8", _INT8),
    Timed(CASES["200x1Mi-bf16"], "bf16-int8", _INT8),
    Timed(CASES["10x16Mi-bf16"], "bf16-stochastic", _STOCHASTIC),
)
CHECKED = (  # the same sets, on small tensors
    Timed(TINY_CASES["tiny"], "fp32"),
    Timed(_BF16_TINY, "bf16"),
    Timed(TINY_CASES["tiny-mixed"], "mixed+fp32", _FLOAT32_MOMENTS),
    Timed(_BF16_TINY, "bf16-remainder-int8", _MASTER_INT8),
    Timed(_BF16_TINY, "bf16-int8", _INT8),
    Timed(_BF16_TINY, "bf16-stochastic", _STOCHASTIC),
)
SETS = tuple(timed.set for timed in CHECKED)
ONE_SIGNATURE = ("/elem.", "issue", "TB/s")  # columns of sets of one


# --- compiled ----------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """A candidate on a target and a set: what became of it, or why nothing did."""

    candidate: str
    target: str
    set: str
    num_warps: int
    report: codegen.Report | None
    refused: str = ""

    @property
    def chip(self) -> Chip | None:
        """Of the target, if it is a known one."""
        return CHIPS.get(self.target)

    @property
    def bytes_moved(self) -> float | None:
        """Of an element, where all have the same signature."""
        signatures = codegen.SETS[self.set].signatures
        return signatures[0].bytes_per_element if len(signatures) == 1 else None

    @property
    def programs(self) -> int | None:
        """Programs that share a multiprocessor."""
        if self.report is None or self.chip is None:
            return None
        return programs_of_unit(
            self.chip, self.report.registers, self.report.shared, self.num_warps
        )

    def predict(self, tbs: float | None = None) -> tuple[float, float] | None:
        """TB/s, and the part of the issue slots; memory gives `tbs`, or by publication."""
        if self.report is None or self.chip is None or self.bytes_moved is None:
            return None
        instructions = self.report.instructions_per_element
        if instructions is None:
            return None
        known = self.chip, instructions, self.bytes_moved, tbs or REACHED * self.chip.tbs
        return predicted_tbs(*known), issue_share(*known)

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        predicted = self.predict()
        return {
            **self._asdict(),
            "report": None if self.report is None else asdict(self.report),
            "programs": self.programs,
            "predicted_tbs": predicted and predicted[0],
            "issue_share": predicted and predicted[1],
        }


def reason(error: BaseException) -> str:
    """What the compiler says: the innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:160]


def compile_one(row: Compiled, parameters: LaunchParameters) -> Compiled:
    """The row with what became of it."""
    case = codegen.SETS[row.set]._replace(variant=parameters._replace(plain=True)._asdict())
    try:
        return row._replace(report=codegen.compile_case(row.set, row.target, case))
    except Exception as error:  # whatever the compiler raises
        return row._replace(refused=reason(error))


def compile_all(
    candidates: Sequence[Candidate],
    targets: Iterable[str],
    sets: Sequence[str],
    advance: Callable[[float], object],
) -> list[Compiled]:
    """Compile all, on all cores; launches that an earlier candidate has, too, are left out.

    `advance` is told of each, as a part of all.
    """
    jobs: dict[tuple[str, str, LaunchParameters], Compiled] = {}
    for target in targets:
        for candidate in candidates:
            parameters = candidate.parameters(target)
            for name in sets:
                row = Compiled(candidate.name, target, name, parameters.num_warps, None)
                jobs.setdefault((target, name, parameters), row)
    places = {row: place for place, row in enumerate(jobs.values())}
    calls = [
        functools.partial(compile_one, row, parameters) for (*_, parameters), row in jobs.items()
    ]
    compiled = []
    for row in in_processes(min(os.cpu_count() or 1, len(jobs)), calls):
        compiled.append(row)
        advance(1 / len(jobs))
    return sorted(compiled, key=lambda row: places[row._replace(report=None, refused="")])


def show_compiled(rows: Sequence[Compiled]) -> list[Table]:
    """A table a target and set; a row a candidate."""
    tables = []
    for target, name in dict.fromkeys((row.target, row.set) for row in rows):
        chip = CHIPS.get(target)
        table = Table(title=f"{target} ({chip.name if chip else 'no published numbers'}): {name}")
        table.add_column("candidate", no_wrap=True)
        alone = len(codegen.SETS[name].signatures) == 1
        for head in ("regs", "spills", "shared", "progs", *(ONE_SIGNATURE if alone else ())):
            table.add_column(head, justify="right", no_wrap=True)
        for row in rows:
            if (row.target, row.set) == (target, name):
                table.add_row(row.candidate, *_cells(row))
        tables.append(table)
    return tables


def _cells(row: Compiled) -> list[str]:
    alone = len(codegen.SETS[row.set].signatures) == 1
    if row.report is None:
        return ["[red]refused[/]", *[""] * (3 + len(ONE_SIGNATURE) * alone)]
    r, predicted = row.report, row.predict()
    programs = "-"
    if row.programs is not None and row.chip is not None:
        programs = f"{row.programs} {row.programs * row.num_warps / row.chip.warps:4.0%}"
    spills = f"[yellow]{r.spills}, {r.stack} B[/]" if r.spills or r.stack else "0"
    cells = [str(r.registers), spills, str(r.shared), programs]
    if alone and predicted is not None:
        tbs, share = predicted
        cells += [f"{r.instructions_per_element:.0f}", f"{share:.0%}", f"{tbs:.2f}"]
    elif alone:
        cells += ["-"] * len(ONE_SIGNATURE)
    return cells


# --- measured ----------------------------------------------------------------------------------


class Tuned(FusedAdamW):
    """FusedAdamW that launches with the given parameters."""

    def __init__(self, params: Any, parameters: LaunchParameters, **options: Any) -> None:
        super().__init__(params, backend="triton", **options)
        self.parameters = parameters

    def step(self, closure: Any = None) -> Any:
        """One step, planned with these parameters."""
        with mock.patch.object(plan, "launch_parameters", return_value=self.parameters):
            return super().step(closure)


def results(
    checked: Timed, parameters: LaunchParameters, device: torch.device
) -> dict[tuple[int, str], Tensor]:
    """Params and states after 3 steps from the same start with the same gradients.

    By the number of the param and what it is, "param" or a key of its state.
    """
    torch.manual_seed(0)
    groups = make(checked.case, device)
    params = [p for group in groups for p in group["params"]]
    grads, buffers = gradients(checked.case, device)
    optimizer = Tuned(groups, parameters, **checked.options)
    for _ in range(3):
        for buffer in buffers:
            buffer.normal_()
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
    return {
        (i, what): x
        for i, p in enumerate(params)
        for what, x in {"param": p.detach(), **optimizer.state[p]}.items()
    }


def wrong(candidate: Candidate, device: torch.device, target: str) -> str:
    """Why a candidate is not to be used: "", or where its values are not the default's.

    The default's bits, for an exact candidate up to what its division differs by: 2 ULP of an
    update, which is 1e-4 here, and one rounding of a bf16.
    """
    exact = candidate.changes.get("exact")
    for checked in CHECKED:
        plain, other = (
            results(checked, c.parameters(target), device) for c in (DEFAULT, candidate)
        )
        for (i, what), a in plain.items():
            b = other[i, what]
            # bits: remainders are kept as bfloat16, of which some are NaN
            same = torch.equal(*(x.flatten().view(torch.uint8) for x in (a, b)))
            if exact and what == REMAINDER:
                continue  # of no meaning without its param
            if exact and not same:
                rtol = max(1e-5, 2 * torch.finfo(a.dtype).eps)
                same = torch.allclose(a, b, rtol=rtol, atol=1e-8)
            if not same:
                worst = float((a.double() - b.double()).abs().max())
                where = f"{checked.case.name} as {checked.set}, {what} {i}"
                return f"{where}: {worst:.1e} from the default"
    return ""


def measure(
    timed: Timed,
    candidates: Sequence[Candidate],
    device: Device,
    target: str,
    rounds: int,
    seconds: float,
    advance: Callable[[float], None],
) -> list[Line]:
    """Times of all candidates on a case; the first one, the default, twice."""
    providers = {
        c.name: Provider(
            functools.partial(Tuned, parameters=c.parameters(target), **timed.options),
            options=timed.options,
        )
        for c in candidates
    }
    return run_case(timed.case, providers, device, rounds, seconds, advance)


def ratio(line: Line, lines: Sequence[Line]) -> float | None:
    """How many times as fast as the default, by the median of the ratios within rounds."""
    base = next(x for x in lines if x.provider == DEFAULT.name)
    if line.waited or base.waited:
        return None
    return times_as_fast(line, base, "gpu" if base.gpu else "wall")


def show_measured(
    timed: Timed, lines: Sequence[Line], compiled: Sequence[Compiled], tbs: float
) -> Table:
    """Measured beside predicted, for one case."""
    table = Table(title=f"{timed.case.name}: {timed.set}, median of {len(lines[0].wall)} rounds")
    table.add_column("candidate")
    for head in ("us", "p10", "p90", "x default", "TB/s", "predicted", "of it"):
        table.add_column(head, justify="right")
    rows = {row.candidate: row for row in compiled if row.set == timed.set}
    for line in lines:
        reached = line.tbs
        if line.problem or reached is None:
            table.add_row(line.provider, f"[red]{line.problem or 'waited for the host'}[/]")
            continue
        low, middle, high = percentiles(line.device_times)
        row = rows.get(line.provider)
        predicted = row.predict(tbs) if row else None
        expected = predicted[0] if predicted else tbs
        table.add_row(
            line.provider,
            *(number(x) for x in (middle, low, high)),
            f"{ratio(line, lines) or float('nan'):.3f}",
            f"{reached:.2f}",
            f"{expected:.2f}",
            f"{reached / expected:.0%}",
        )
    return table


def choose(
    by_case: Sequence[Sequence[Line]], candidates: Sequence[Candidate]
) -> tuple[Candidate, dict[str, float], float]:
    """The candidate to launch, how many times as fast as the default all are, and the noise.

    The geometric mean over the cases counts. The default stays unless another gains 1 %, and twice
    the largest difference of the default's two lines. Exact ones are not chosen: who wants IEEE
    division can see what it costs.
    """
    gains: dict[str, float] = {}
    for candidate in candidates:
        ratios = [
            ratio(line, lines)
            for lines in by_case
            for line in lines
            if line.provider == candidate.name
        ]
        known = [r for r in ratios if r is not None]
        if len(known) == len(by_case):
            gains[candidate.name] = statistics.geometric_mean(known)
    doubled = max((x for lines in by_case for x in noise(lines)), default=0.0)
    eligible = [c for c in candidates if c.name in gains and not c.changes.get("exact")]
    best = max(eligible, key=lambda c: gains[c.name], default=DEFAULT)
    if gains.get(best.name, 0.0) < 1 + max(0.01, 2 * doubled):
        best = DEFAULT
    return best, gains, doubled


def entry(parameters: LaunchParameters) -> dict[str, Any]:
    """What launch_parameters.json has to say of them: where they are not LaunchParameters'."""
    plain = LaunchParameters()._asdict()
    return {key: value for key, value in parameters._asdict().items() if value != plain[key]}


def with_entry(text: str, name: str, parameters: LaunchParameters) -> str:
    """The file's text with this architecture's entry, a line each."""
    entries = {**json.loads(text), name: entry(parameters)}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


# --- both --------------------------------------------------------------------------------------


_FLAGS = {"0": False, "1": True, "False": False, "True": True}


def own_candidate(text: str) -> Candidate:
    """A candidate from "block=2048,load_cache=.cg"."""
    fields = LaunchParameters()._asdict()
    parsers: dict[type, Callable[[str], object]] = {bool: _FLAGS.__getitem__, int: int, str: str}
    changes: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in fields:
            raise argparse.ArgumentTypeError(f"no parameter {key!r} (want {', '.join(fields)})")
        try:
            changes[key] = parsers[type(fields[key])](value)
        except (KeyError, ValueError):
            kind = "True or False" if isinstance(fields[key], bool) else "an int"
            raise argparse.ArgumentTypeError(f"{key} is {value!r} (want {kind})") from None
    return Candidate(text, changes, "of your own")


def show_candidates(candidates: Sequence[Candidate], commit: str) -> Table:
    """Names, changes and reasons."""
    versions = f"Triton {triton.__version__}, torch {torch.__version__}, commit {commit}"
    table = Table(title=versions)
    table.add_column("candidate", no_wrap=True)
    table.add_column("changes", no_wrap=True)
    table.add_column("why", no_wrap=True)
    for c in candidates:
        table.add_row(c.name, ", ".join(f"{k}={v!r}" for k, v in c.changes.items()), c.reason)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Compile; on a GPU check and time. Exits with 1 if a candidate leaves other bits behind."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--compile-only", action="store_true", help="the default without a GPU")
    parser.add_argument("--targets", nargs="+", choices=codegen.TARGETS, help="default: all")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--candidates", nargs="+", choices=BY_NAME, metavar="NAME")
    parser.add_argument("--try", dest="own", type=own_candidate, action="append", default=[])
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument(
        "--max-seconds", type=float, default=15.0, help="a case (default: %(default)s)"
    )
    parser.add_argument("--write", action="store_true", help="keep the fastest in the package")
    parser.add_argument("--out", type=Path, default=Path("out/tune"), help="default: %(default)s")
    parser.add_argument("--commit", help="for a copy of the checkout, where git cannot tell")
    args = parser.parse_args(argv)
    measured = on_gpu and not args.compile_only and not args.targets
    if args.write and not measured:
        parser.error("--write keeps what is measured, and nothing is without a GPU")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets the kernels: unset it to compile them")

    wanted = [BY_NAME[name] for name in args.candidates or BY_NAME] + args.own
    candidates = [DEFAULT, *(c for c in wanted if c is not DEFAULT)]  # the first is timed twice
    name = architecture(torch.device("cuda")) if measured else ""
    if name and name not in codegen.TARGETS:
        hip = torch.version.hip is not None
        codegen.TARGETS[name] = (
            GPUTarget("hip", name, 64) if hip else GPUTarget("cuda", int(name[3:]), 32)
        )
    targets = [name] if name else args.targets or list(codegen.TARGETS)

    console = Console(highlight=False)
    console.width = max(console.width, 160)
    commit = args.commit or find_commit()
    console.print(show_candidates(candidates, commit))
    # an empty cache: what is listed was compiled here and now
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}),
    ):
        started = time.perf_counter()
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("compiling", total=1)
            advance = functools.partial(progress.advance, task)
            compiled = compile_all(candidates, targets, args.sets, advance)
        numbers: dict[str, Any] = {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "commit": commit,
            "candidates": [c._asdict() for c in candidates],
            "compiled": [row.numbers() for row in compiled],
        }
        for table in show_compiled(compiled):
            console.print(table)
        refused = [row for row in compiled if row.refused]
        for row in refused:
            line = f"refused: {row.candidate}, {row.target}, {row.set}: {row.refused}"
            console.print(line, markup=False)
        console.print(
            f"{len(compiled) - len(refused)} of {len(compiled)} compiled, in "
            f"{time.perf_counter() - started:.0f} s"
        )
        args.out.mkdir(parents=True, exist_ok=True)
        path: Path = args.out / "tune.json"
        path.write_text(json.dumps(numbers, indent=1))  # what is known survives a crash
        failed = False
        if measured:
            without = {row.candidate for row in refused}
            usable = [c for c in candidates if c.name not in without]
            failed = tune(name, usable, compiled, numbers, args, console)
            path.write_text(json.dumps(numbers, indent=1))
    console.print(path)
    return int(failed)


def tune(
    name: str,
    candidates: Sequence[Candidate],
    compiled: Sequence[Compiled],
    numbers: dict[str, Any],
    args: argparse.Namespace,
    console: Console,
) -> bool:
    """Check and time the candidates, and print, or write, the choice; True if one is wrong."""
    device = Device()
    problems = {c.name: wrong(c, device.device, name) for c in candidates}
    for who, problem in problems.items():
        if problem:
            console.print(f"[red]wrong[/]: {who}: {problem}")
    right = [c for c in candidates if not problems[c.name]]
    ceilings: dict[str, list[float]] = {}
    measure_ceilings(device, ceilings, 10)
    by_case = []
    with Progress(console=console, transient=True) as progress:
        for timed in TIMED:
            task = progress.add_task(timed.case.name, total=1)
            advance = functools.partial(progress.advance, task)
            by_case.append(
                measure(timed, right, device, name, args.rounds, args.max_seconds, advance)
            )
            torch.cuda.empty_cache()
    tbs = ceiling(ceilings["4R3W fp32"])
    for timed, lines in zip(TIMED, by_case, strict=True):
        console.print(show_measured(timed, lines, compiled, tbs))
    best, gains, doubled = choose(by_case, right)
    numbers |= {
        "machine": describe(device, args.commit),
        "wrong": problems,
        "ceilings": ceilings,
        "lines": [asdict(line) for lines in by_case for line in lines],
        "gains": gains,
        "noise": doubled,
        "best": best.name,
    }
    ranked = sorted(gains.items(), key=lambda pair: -pair[1])
    console.print("times as fast as the default:", ", ".join(f"{k} {v:.3f}" for k, v in ranked))
    console.print(f"noise {doubled:.1%}; chosen: {best.name}")
    text = with_entry(stored.FILE.read_text(), name, best.parameters(name))
    if args.write:
        stored.FILE.write_text(text)
    console.print(f"{'wrote' if args.write else '--write would write'} {stored.FILE}:")
    console.print(text, markup=False)
    return any(problems.values())


if __name__ == "__main__":
    sys.exit(main())
