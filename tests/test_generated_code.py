"""What the compilers make of the kernels, for GPUs that need not be there (bench/codegen.py).

The kernel as it is launched is bounded. Its variants, with IEEE division or a loop over blocks, are
held to 128-bit accesses and no spills; bench/codegen.py lists their registers.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
NVIDIA = ("sm_80", "sm_90", "sm_100")
TARGETS = (*NVIDIA, "gfx942")
BITS = {"fp64": 64, "fp32": 32, "bf16": 16, "fp16": 16}
VECTOR = 128  # bits: the widest access that a 16-byte alignment allows

BOUNDED = ("fp32", "bf16", "mixed+fp32", "bf16+fp32")  # the sets whose registers are bounded
SETS = (*BOUNDED, "fp16", "fp32-scaled", "mixed+fp32-scaled", "fp32-amsgrad", "bf16-amsgrad")
SETS += ("fp64", "fp64-scaled")
SETS += ("fp32-exact", "mixed+fp32-exact", "fp32-looped", "mixed+fp32-looped")
SETS += ("fp32-general", "mixed+fp32-general")
MEASURED = tuple(
    f"{name}-measured"
    for name in ("fp32", "bf16", "mixed+fp32", "fp32-amsgrad", "mixed+fp32-scaled")
)
SETS += (*MEASURED, "fp64-measured", "mixed+fp32-looped-measured")
# storage formats, and their streams in 16 or 32 bits and in 8 bits, read and written
STORED = {
    "bf16-stochastic": (4, 0, 3, 0),
    "bf16-remainder-fp32": (7, 0, 6, 0),
    "bf16-int8": (2, 2, 1, 2),
    "bf16-remainder-int8": (3, 2, 2, 2),
    "bf16-remainder-int8+fp32": (11, 2, 8, 2),
}
GENERAL = ("bf16-stochastic", "bf16-int8", "bf16-remainder-int8")
STORED |= {f"{name}-general": STORED[name] for name in GENERAL}
# the sets whose instructions are bounded, by the bytes that an element moves
COUNTED = {"fp32": 28, "bf16": 14, "fp16": 14, "bf16-stochastic": 14}
COUNTED |= {"bf16-remainder-fp32": 26, "bf16-int8": 10.06, "bf16-remainder-int8": 14.06}
NORMS = ("norm-fp32", "norm-bf16", "norm-mixed+fp32", "norm-meshes")
SCHEDULES = ("schedule-clipped", "schedule", "schedule-scaled", "schedule-fp64-scaled")
SCHEDULES += ("schedule-measured",)
# (param, grad, moments), each on its own: all there are of these dtypes, and float64's
TRIPLES = tuple("/".join(t) for t in itertools.product(("fp32", "bf16", "fp16"), repeat=3))
TRIPLES += ("fp64/fp64/fp64", "fp64/fp32/fp64", "fp64/fp32/fp32")


def compiling(cache: Path) -> dict[str, str]:
    """The environment of a process that compiles, into a cache of its own: nothing is old."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    env.pop("TRITON_INTERPRET", None)
    path = (str(BENCH), *filter(None, [env.get("PYTHONPATH")]))
    return {**env, "PYTHONPATH": os.pathsep.join(path)}


def run(env: dict[str, str], *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """(set, target) -> what bench/codegen.py says of it."""
    folder = tmp_path_factory.mktemp("codegen")
    env = compiling(folder / "cache")
    others = [x for x in (*SETS, *SCHEDULES, *NORMS, *STORED) if x not in COUNTED]
    jobs = [  # in pairs of about the same length, for two cores
        ("--no-count", ("sm_80", "sm_100"), others),
        ("--no-count", ("sm_90", "gfx942"), others),
        ("--count", ("sm_80", "sm_100"), COUNTED),
        ("--count", ("sm_90", "gfx942"), COUNTED),
        ("--no-count", ("sm_90",), TRIPLES[: len(TRIPLES) // 2]),
        ("--no-count", ("sm_90",), TRIPLES[len(TRIPLES) // 2 :]),
    ]

    def compile_all(number: int) -> list[Any]:
        count, targets, sets = jobs[number]
        arguments = ["--targets", *targets, "--sets", *sets]
        file = folder / f"{number}.json"
        run(env, BENCH / "codegen.py", count, *arguments, "--json", file)
        written: list[Any] = json.loads(file.read_text())
        return written

    with ThreadPoolExecutor(2) as pool:
        done = [r for part in pool.map(compile_all, range(len(jobs))) for r in part]
    for r in done:
        for kind in ("loads", "stores"):
            r[kind] = {int(bits): n for bits, n in r[kind].items()}
    return {(r["set"], r["target"]): r for r in done}


def streams(report: Any, kind: str) -> list[str]:
    """Dtype of each array that the kernel reads ("loads") or writes ("stores")."""
    of_grad = 1
    return [
        dtype
        for signature in report["signatures"]
        for place, dtype in enumerate(signature)
        if kind == "loads" or place != of_grad or report["scaled"]
    ]


def check_accesses(report: Any) -> None:
    """Each stream is accessed twice, in vectors and one by one, and neither as the other."""
    per_thread = report["elements_per_thread"]
    for kind in ("loads", "stores"):
        vectors, singles = Counter[int](), Counter[int]()
        for dtype in streams(report, kind):
            bits = per_thread * BITS[dtype]
            assert bits % VECTOR == 0, f"{per_thread} {dtype} a thread are {bits} bits"
            vectors[VECTOR] += bits // VECTOR
            singles[BITS[dtype]] += per_thread
        if kind == "stores" and report["measured"]:
            singles[32] += 1  # the row of sums, by the first threads
        # Were the unaligned path vectorised, it would fault; there would be more vectors than these
        # and fewer single elements.
        assert report[kind] == vectors + singles, kind


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SETS)
def test_aligned_path_moves_128_bits_and_the_other_one_element(
    reports: dict[tuple[str, str], Any], name: str, target: str
) -> None:
    check_accesses(reports[name, target])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", STORED)
def test_storage_formats_move_vectors_and_spill_nothing(
    reports: dict[tuple[str, str], Any], name: str, target: str
) -> None:
    report, (loads, narrow_loads, stores, narrow_stores) = reports[name, target], STORED[name]
    assert report["loads"].get(VECTOR) == loads
    assert report["stores"].get(VECTOR) == stores
    assert report["loads"].get(64, 0) == narrow_loads, "8 elements a thread in 8 bits"
    assert report["stores"].get(64, 0) == narrow_stores
    assert (report["spills"], report["stack"]) == (0, 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NORMS)
def test_norm_reads_128_bits_at_a_time(
    reports: dict[tuple[str, str], Any], name: str, target: str
) -> None:
    report = reports[name, target]
    per_thread, grads = report["elements_per_thread"], [s[1] for s in report["signatures"]]
    wanted = Counter[int]()
    for dtype in grads:
        wanted[VECTOR] += per_thread * BITS[dtype] // VECTOR
        wanted[BITS[dtype]] += per_thread
    assert report["loads"] == wanted
    if target in ("sm_90", "sm_100") and name != "norm-meshes":
        assert report["registers"] <= 32, "16 programs a multiprocessor; with 12 bf16 takes longer"


# What ptxas keeps in local memory all the same, on sm_90: 8 bytes a thread, once a block or
# program.
# The first two are told to do with 64 and 56 registers.
SPILLED = {"3.8": {"schedule-fp64-scaled"}, "3.9": {"mixed+fp32", "fp32-general"}}


def check_spills(report: Any) -> None:
    """Nothing is spilled, but for what is known to be."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    if report["target"] == "sm_90" and report["set"] in SPILLED.get(version, ()):
        assert (report["spills"], report["stack"]) == (2, 8)
    else:
        assert (report["spills"], report["stack"]) == (0, 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SETS + SCHEDULES + NORMS)
def test_nothing_is_spilled(reports: dict[tuple[str, str], Any], name: str, target: str) -> None:
    check_spills(reports[name, target])


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", BOUNDED)
def test_registers_let_eight_programs_share_a_multiprocessor(
    reports: dict[tuple[str, str], Any], name: str, target: str
) -> None:
    # 65536 registers / (8 programs x 128 threads)
    assert reports[name, target]["registers"] <= 64


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", MEASURED)
def test_with_group_metrics_five_programs_share_a_multiprocessor(
    reports: dict[tuple[str, str], Any], name: str, target: str
) -> None:
    # 65536 registers / (5 programs x 128 threads), given out by eights
    assert reports[name, target]["registers"] <= 96


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(("name", "bytes_moved"), COUNTED.items())
def test_memory_and_not_instructions_limits_the_kernel(
    reports: dict[tuple[str, str], Any], name: str, bytes_moved: float, target: str
) -> None:
    # at full bandwidth an H200 issues 7.8 instructions of a thread in the time of a byte
    cost = reports[name, target]["instructions_per_element"]
    assert 10 < cost < 7.8 * bytes_moved  # fewer than 10 would be no AdamW: the count is wrong then


@pytest.mark.parametrize("target", TARGETS)
def test_nvidia_divides_by_the_reciprocal(reports: dict[tuple[str, str], Any], target: str) -> None:
    # 8 elements a thread, on two paths
    for name in ("fp32", "bf16", *STORED):
        wanted = 16 * len(reports[name, target]["signatures"]) * (target in NVIDIA)
        assert reports[name, target]["reciprocals"] == wanted, name
    for name in ("fp32-exact", "fp64"):
        assert reports[name, target]["reciprocals"] == 0, name


@pytest.mark.parametrize("target", TARGETS)
def test_hopper_prefetches(reports: dict[tuple[str, str], Any], target: str) -> None:
    # the list of chunks and a tensor's row, gradient and scalars; then an element's streams, with
    # the exponents of 8-bit ones
    wanted = {"fp32": 4, "fp64": 4, "bf16": 8, "bf16-stochastic": 8, "bf16-remainder-fp32": 9}
    wanted |= {"bf16-int8": 10, "bf16-remainder-int8": 11, "mixed+fp32": 12, "fp16": 8}
    for name, prefetches in wanted.items():
        assert reports[name, target]["prefetches"] == prefetches * (target == "sm_90"), name


def test_look_ups_do_not_wait_for_the_program_s_own_elements(
    reports: dict[tuple[str, str], Any],
) -> None:
    early = {of: report["read_early"] for of, report in reports.items() if report["prefetches"]}
    assert len(early) > len(TRIPLES)
    assert set(early.values()) == {0}, early


@pytest.mark.parametrize("target", TARGETS)
def test_on_hopper_the_update_begins_beside_the_schedule(
    reports: dict[tuple[str, str], Any], target: str
) -> None:
    """What it may read by then is seen with --ptx: nothing that the schedule writes."""
    control = {"adamw": ["wait"], "schedule": ["launch_dependents"], "norm": []}
    for (name, of), report in reports.items():
        if of == target:
            hopper = target == "sm_90"
            assert report["overlaps"] == (hopper and report["kernel"] == "adamw"), name
            assert report["grid_control"] == (control[report["kernel"]] if hopper else []), name


@pytest.mark.parametrize("target", NVIDIA)
def test_stochastic_rounding_adds_20_instructions_at_most(
    reports: dict[tuple[str, str], Any], target: str
) -> None:
    # of the param and of the second moment together
    stochastic, nearest = (reports[name, target] for name in ("bf16-stochastic", "bf16"))
    added = stochastic["instructions_per_element"] - nearest["instructions_per_element"]
    assert 5 < added <= 20  # fewer than 5 would be no rounding


@pytest.mark.parametrize("triple", TRIPLES)
def test_each_signature_alone(reports: dict[tuple[str, str], Any], triple: str) -> None:
    check_accesses(reports[triple, "sm_90"])
    check_spills(reports[triple, "sm_90"])


@pytest.mark.parametrize("target", TARGETS)
def test_no_more_shared_memory_than_eight_programs_have(
    reports: dict[tuple[str, str], Any], target: str
) -> None:
    # 64 KiB of AMD's is the least of them; the unaligned path changes layouts through it
    for name in SETS + SCHEDULES + NORMS:
        assert reports[name, target]["shared"] <= 8192, name


# --- what is compiled again --------------------------------------------------------------------

LAUNCHES = """
import dataclasses, itertools, json
import codegen as c
import numpy as np
import torch
from fused_adamw.kernels import adamw, schedule, table as t
from fused_adamw.kernels.front import Front

FP32, BF16 = c.signature("fp32/fp32/fp32"), c.signature("bf16/bf16/bf16")


def make(lr=1e-3, numel=8, groups=1, signatures=(FP32,)):
    words = np.zeros((groups, t.GROUP_WORDS), dtype=np.int64)
    words.view(np.float64)[:, t.LR] = lr
    rows = [t.Row(512, 512, 512, 0, 512, numel, i % groups, s, False)
            for i, s in enumerate(signatures)]
    return t.build(rows, np.full(len(rows), 512), words.ravel(), groups)


def compiled(tables, memories=(c.MEMORY,), scalars=((None, None),), measures=((None, None),),
             rates=(t.pack_rates([1e-3]),)):
    with c.launches(c.TARGETS["sm_90"]) as seen:
        for table in tables:
            for memory, (grad_scale, found_inf), (rows, counted), lrs in itertools.product(
                    memories, scalars, measures, rates):
                front = Front()
                schedule.schedule(front, table, memory, grad_scale, found_inf, None, counted, lrs)
                adamw.adamw(front, table, memory, grad_scale is not None, rows)
        caches = [k.device_caches[0][0] for k in (schedule._schedule, adamw._adamw)]
        return [len(cache) for cache in caches], seen


def address(at, dtype=torch.float32):
    return c.Address(dtype, at)


table = make()
counts = [dataclasses.replace(table, n_programs=n, **{column: n})
          for column in ("n_tensors", "blocks_per_chunk")
          for n in (1, 2, 16, 17, 128, 2**20, 2**31 - 1)]
elsewhere = [t.Memory(*(c.Address(x.dtype, at) for x in c.MEMORY)) for at in (512, 2**40 + 1024)]
results = {
    "counts": compiled(counts),
    "lr": compiled([make(lr) for lr in (0.0, 1.0, 1e-3, 16.0)]),
    "rates": compiled([table], rates=[t.pack_rates([lr] * n) for n in (1, 4)
                                      for lr in (0.0, 1.0, 1e-3, 2.0**-1074, -1e-30)]),
    "numel": compiled([make(numel=n) for n in (0, 1, 16, 17, 2**34)]),
    "groups": compiled([make(groups=n) for n in (1, 16, 17)]),
    "tensors": compiled([make(signatures=(FP32,) * n) for n in (1, 16, 17, 1000)]),
    "order": compiled([make(signatures=s) for s in ((FP32, BF16), (BF16, FP32), (BF16, FP32) * 3)]),
    "memory": compiled([table], elsewhere),
    "scaler": compiled([table], scalars=[(address(a), address(b)) for a in (512, 516)
                                         for b in (1024, 1028, 1032)]),
    "measures": compiled([table], measures=[(address(a), address(a, torch.float64))
                                            for a in (512, 2**40 + 1024)]),
    # the control: these have to be compiled anew
    "signatures": compiled([table, make(signatures=(BF16,))]),
    "scaler-or-not": compiled([table], scalars=[(None, None), (address(512), address(512))]),
    "rates-or-not": compiled([table], rates=[(), t.pack_rates([1e-3])]),
    "measured-or-not": compiled([table], measures=[(None, None), (address(512), address(512))]),
}
print(json.dumps({
    name: {
        "compiled": number,
        "arguments": [[x if isinstance(x, int) else type(x).__name__ for x in launch.args]
                      for launch in seen],
        "options": [sorted(launch.kwargs) for launch in seen],
        "fusion": [launch.kwargs["enable_fp_fusion"] for launch in seen],
    }
    for name, (number, seen) in results.items()
}))
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Launches of the real launchers, by what differs between them; compiled kernels counted."""
    env = compiling(tmp_path_factory.mktemp("launches"))
    answer: dict[str, Any] = json.loads(run(env, "-c", LAUNCHES))
    return answer


@pytest.mark.parametrize(
    "what",
    [
        "counts",
        "lr",
        "rates",
        "numel",
        "groups",
        "tensors",
        "order",
        "memory",
        "scaler",
        "measures",
    ],
)
def test_compiled_once_whatever_changes(launched: dict[str, Any], what: str) -> None:
    # counts hold 1 and multiples of 16, which Triton would specialise on; GradScaler's scalars may
    # be views at any multiple of 4 bytes
    assert launched[what]["compiled"] == [1, 1]
    assert len(launched[what]["arguments"]) > 2, "nothing changed"


@pytest.mark.parametrize(
    ("what", "kernels"),
    [
        ("signatures", [1, 2]),
        ("scaler-or-not", [2, 2]),
        ("measured-or-not", [2, 2]),
        ("rates-or-not", [2, 1]),
    ],
    ids=str,
)
def test_compiled_again_where_the_code_differs(
    launched: dict[str, Any], what: str, kernels: list[int]
) -> None:
    assert launched[what]["compiled"] == kernels


@pytest.mark.parametrize("what", ["lr", "numel"])
def test_lr_step_and_numel_are_in_memory(launched: dict[str, Any], what: str) -> None:
    grads = 512 + 8 * 11  # behind the words of a group
    for arguments in launched[what]["arguments"]:
        given = [x for x in arguments if x != "NoneType"]  # no GradScaler, no norm
        if given[0] == "Address":  # the schedule: words, grads, tensors, scalars in two dtypes
            assert given[:5] == ["Address", grads, grads + 8, "Address", "Address"]
            assert given[5:7] == [1, 0], "tensors, and sums of the norm"
            rest = given[7:]
            assert len(rest) == 8, "halves of lrs"
        else:  # the update: grads, tensors, chunks, scalars in two dtypes
            assert given[:5] == [grads, grads + 8, grads + 8 + 160, "Address", "Address"]
            rest = given[5:]
            assert len(rest) == 2, "log2 of the blocks in a chunk, and programs ahead"
        assert all(isinstance(n, int) for n in rest)


def test_fusion_is_switched_off_by_name(launched: dict[str, Any]) -> None:
    # its default is about to flip, and what is fused has to be what is written
    flags = [flag for launches in launched.values() for flag in launches["fusion"]]
    assert flags
    assert not any(flags)


def test_the_interpreter_is_told_apart(tmp_path: Path) -> None:
    env = {**compiling(tmp_path), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, BENCH / "codegen.py", "--sets", "fp32"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "unset it" in done.stderr
