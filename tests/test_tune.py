"""bench/tune.py compiles and times candidates; bench/chips.py knows what fits on a chip."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import codegen
import pytest
import timing
import torch
import tune
from chips import CHIPS, issue_share, predicted_tbs, programs_of_unit
from rich.console import Console

from fused_adamw.kernels import launch_parameters as stored
from fused_adamw.kernels.launch_parameters import LaunchParameters

each = pytest.mark.parametrize


@each(
    ("target", "registers", "shared", "num_warps", "programs"),
    [
        # 65,536 registers of 128 threads each; a thread is given a multiple of 8
        pytest.param("sm_90", 56, 1024, 4, 9, id="56_registers"),
        pytest.param("sm_90", 64, 1024, 4, 8, id="64_registers"),
        pytest.param("sm_90", 65, 1024, 4, 7, id="65_are_72"),
        pytest.param("sm_90", 72, 1024, 16, 1, id="16_warps"),  # of 28
        pytest.param("sm_90", 16, 0, 4, 16, id="64_warps_at_most"),
        pytest.param("sm_90", 16, 0, 1, 32, id="32_programs_at_most"),
        pytest.param("sm_90", 56, 57 * 1024, 4, 3, id="shared_memory"),  # and 1 KiB each, of 228
        pytest.param("sm_80", 56, 56 * 1024, 4, 2, id="shared_memory_of_164"),
        pytest.param("gfx942", 84, 0, 2, 10, id="amd"),  # 5 waves of 88 in 512, on 4 SIMDs
        pytest.param("gfx942", 50, 0, 8, 4, id="amd_8_waves_at_most"),
    ],
)
def test_programs_of_a_multiprocessor(
    target: str, registers: int, shared: int, num_warps: int, programs: int
) -> None:
    assert programs_of_unit(CHIPS[target], registers, shared, num_warps) == programs


def test_prediction() -> None:
    """An H200 issues 7.8 instructions in the time of a byte, at the 4.3 TB/s of a copy."""
    chip = CHIPS["sm_90"]
    assert issue_share(chip, instructions=7.8 * 28, bytes_moved=28, tbs=4.3) == pytest.approx(
        1, abs=0.01
    )
    assert predicted_tbs(chip, 42, 28, 4.3) == 4.3  # bound by memory
    assert predicted_tbs(chip, 2 * 7.8 * 28, 28, 4.3) == pytest.approx(4.3 / 2, rel=0.01)


def test_candidates_are_few_reasoned_and_can_be_launched() -> None:
    assert len(tune.BY_NAME) == len(tune.CANDIDATES)
    assert 12 <= len(tune.CANDIDATES) <= 29
    assert len({c.reason for c in tune.CANDIDATES}) == len(tune.CANDIDATES)
    for target, lanes in (("sm_100", 32), ("gfx942", 64)):  # of neither anything is measured
        default = ("prefetch-0", "apart")  # what the default has where nothing is measured
        launched = [c.parameters(target) for c in tune.CANDIDATES if c.name not in default]
        for p in launched:
            assert p.block // (p.num_warps * lanes) == 8, "128 bits of bf16 a thread"
            assert p.block & (p.block - 1) == 0
        if lanes == 32:
            assert launched[0] == LaunchParameters()
            assert len(set(launched)) == len(launched)
            for field in set(LaunchParameters._fields) - {"plain"}:  # as hyper-parameters are
                assert len({getattr(p, field) for p in launched}) > 1, f"{field} is never varied"
    assert tune.DEFAULT.parameters("gfx942") == stored.launch_parameters("gfx942")


def test_candidates_keep_what_the_architecture_has() -> None:
    """Else --write would drop it."""
    own = stored.launch_parameters("sm_90")
    assert (own.maxnreg_random, own.maxnreg_int8) != (0, 0)
    assert tune.DEFAULT.parameters("sm_90") == own
    written = tune.BY_NAME["block-512"].parameters("sm_90")
    assert written == own._replace(block=512, num_warps=2)


def test_what_a_target_ignores_is_compiled_once() -> None:
    """Caps on registers and prefetches are NVIDIA's: on AMD such candidates are others again."""
    on_amd = {c.name: c.parameters("gfx942") for c in tune.CANDIDATES}
    assert on_amd["regs-48"] == on_amd["regs-free"] == on_amd["default"]
    assert on_amd["prefetch-4096"] == on_amd["default"]
    assert tune.BY_NAME["prefetch-4096"].parameters("sm_80").prefetch == 0
    assert on_amd["overlap"] == on_amd["apart"] == on_amd["default"]
    assert not tune.BY_NAME["overlap"].parameters("sm_80").overlap
    assert on_amd["exact"] == on_amd["exact-64"] != on_amd["default"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Numbers and output of a few candidates, compiled for two targets, without a GPU."""
    out = tmp_path_factory.mktemp("tune")
    command = [sys.executable, str(Path(tune.__file__)), "--out", str(out), "--sets", "fp32"]
    command += ["--targets", "sm_90", "gfx942", "--candidates", "regs-48", "exact", "evict-first"]
    command += ["--try", "load_cache=.xx"]
    # a cache of the user's own, which tune.py must not take its kernels from
    own = out / "cache"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(own)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not own.exists()
    return json.loads((out / "tune.json").read_text()), done.stdout


def test_compiles_and_lists(run: tuple[dict[str, Any], str]) -> None:
    numbers, printed = run
    import triton

    assert numbers["triton"] == triton.__version__
    rows = {(row["target"], row["candidate"]): row for row in numbers["compiled"]}
    names = ("default", "regs-48", "exact", "evict-first", "load_cache=.xx")
    assert set(rows) == {("sm_90", n) for n in names} | {
        ("gfx942", n) for n in names if n != "regs-48"
    }
    for target in ("sm_90", "gfx942"):
        default, exact = rows[target, "default"], rows[target, "exact"]
        for row in (default, exact):
            assert row["report"]["registers"] > 32
            assert row["report"]["spills"] == 0
            assert row["programs"] >= 4
            assert 0 < row["issue_share"] < 1
            assert row["predicted_tbs"] == pytest.approx(0.9 * CHIPS[target].tbs)
        for kind in ("loads", "stores"):  # counted whatever policy their names carry
            assert default["report"][kind]
            assert rows[target, "evict-first"]["report"][kind] == default["report"][kind]
        assert exact["issue_share"] > default["issue_share"]
    assert rows["sm_90", "default"]["num_warps"] == 2 * rows["gfx942", "default"]["num_warps"]
    for text in (f"Triton {triton.__version__}", "sm_90 (H200)", "gfx942 (MI300X)", "exact=True"):
        assert text in printed


def test_what_the_compiler_refuses_is_listed_with_its_reason(
    run: tuple[dict[str, Any], str],
) -> None:
    numbers, printed = run
    refused = [row for row in numbers["compiled"] if row["refused"]]
    assert {(row["candidate"], row["target"]) for row in refused} == {
        ("load_cache=.xx", "sm_90"),
        ("load_cache=.xx", "gfx942"),
    }
    (why,) = {row["refused"] for row in refused}
    assert why.startswith("ValueError: ")  # the innermost of three errors; Triton's words change
    assert "cache modifier" in why.lower()
    assert all(row["report"] is None for row in refused)
    assert f"refused: load_cache=.xx, sm_90, fp32: {why}" in printed
    assert "7 of 9 compiled" in printed


@each(
    ("options", "message"),
    [
        pytest.param(["--write"], "nothing is without a GPU", id="write"),
        pytest.param(["--try", "blocks=2"], "no parameter 'blocks'", id="misspelt"),
    ],
)
def test_refuses(
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(options)
    assert message in capsys.readouterr().err


def test_own_candidate_has_the_types_of_the_parameters() -> None:
    changes = tune.own_candidate("block=2048,exact=1,load_cache=.cg").changes
    assert changes == {"block": 2048, "exact": True, "load_cache": ".cg"}
    assert tune.own_candidate("exact=False").changes == {"exact": False}
    for text, words in ("exact=maybe", "True or False"), ("block=big", "an int"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'.*' .want {words}"):
            tune.own_candidate(text)


# --- what a GPU does, here under the interpreter ------------------------------------------------

# more than a block, a tail, and an empty one
SMALL = cases.Case("small", (cases.Group((cases.Leaf((1030,)), cases.Leaf((0,)))),))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small case in place of all, and no GPU of step.py's."""
    for name in ("CHECKED", "TIMED"):
        monkeypatch.setattr(tune, name, (tune.Timed(SMALL, "fp32"),))


@pytest.mark.usefixtures("small")
@each("name", ["block-2048", "loop-2", "exact", "stream"])
def test_candidates_leave_the_bits_of_the_default(name: str, device: torch.device) -> None:
    assert tune.wrong(tune.BY_NAME[name], device, "sm_80") == ""


@each("checked", tune.CHECKED, ids=lambda checked: checked.set)
@each("name", ["block-512", "exact"])
def test_candidates_leave_the_bits_of_the_default_in_all_sets(
    checked: tune.Timed, name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "CHECKED", [checked])
    assert tune.wrong(tune.BY_NAME[name], device, "sm_80") == ""


@pytest.mark.usefixtures("small")
@each(
    ("changes", "lr", "found"),
    [
        pytest.param({"block": 2048}, 1e-3 * (1 + 1e-6), True, id="other_bits"),
        pytest.param({"exact": True}, 1e-3 * (1 + 1e-6), False, id="exact_may_be_near"),
        pytest.param({"exact": True}, 1.1e-3, True, id="exact_is_no_licence"),
    ],
)
def test_other_results_are_found(
    changes: dict[str, Any],
    lr: float,
    found: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An optimizer whose lr is off wherever it is not launched as the default is."""

    class Off(tune.Tuned):
        def step(self, closure: Any = None) -> Any:
            off = self.parameters != LaunchParameters()
            self.param_groups[0]["lr"] = lr if off else 1e-3
            return super().step(closure)

    monkeypatch.setattr(tune, "Tuned", Off)
    problem = tune.wrong(tune.Candidate("off", changes, ""), device, "sm_80")
    assert bool(problem) == found
    assert not found or problem.startswith("small as fp32, param 0: ")


@pytest.mark.usefixtures("small")
def test_launches_as_told(device: torch.device) -> None:
    p = torch.nn.Parameter(torch.ones(9, dtype=torch.bfloat16, device=device))
    wanted = LaunchParameters(block=512, num_warps=2)
    optimizer = tune.Tuned([p], wanted, state_dtype=torch.float32)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer._plan is not None
    (table,) = optimizer._plan.tables.values()
    assert table.parameters == wanted
    assert {optimizer.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}


def test_sets_are_those_that_the_cases_launch() -> None:
    """The prediction that is shown beside a measured case is of the same kernel."""
    for timed in (*tune.TIMED, *tune.CHECKED):
        leaves = set(timed.case.leaves)
        launched = {cases.signature(leaf, options=timed.options) for leaf in leaves}
        assert launched == set(codegen.SETS[timed.set].signatures)
    assert {timed.set for timed in tune.CHECKED} == {timed.set for timed in tune.TIMED}
    assert {timed.set for timed in tune.TIMED} == set(tune.SETS)


@pytest.mark.usefixtures("small")
def test_the_gpu_part_runs_to_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checked, timed in rounds and chosen; --write changes one line of the file."""
    file = tmp_path / "launch_parameters.json"
    stored_text = stored.FILE.read_text()
    file.write_text(stored_text)
    monkeypatch.setattr(stored, "FILE", file)
    ceilings = {"4R3W fp32": [1e-3]}
    monkeypatch.setattr(tune, "measure_ceilings", lambda _, into, __: into.update(ceilings))
    chosen = [tune.BY_NAME[name] for name in ("default", "block-2048")]
    monkeypatch.setattr(tune, "choose", lambda *_: (chosen[1], {"default": 1.0}, 0.25))
    args = argparse.Namespace(rounds=2, max_seconds=60.0, write=True, commit="1a2b3c4")
    numbers: dict[str, Any] = {}
    console = Console(highlight=False, width=160)
    assert not tune.tune("sm_90", chosen, [], numbers, args, console)
    printed = capsys.readouterr().out
    lines = {line["provider"]: line for line in numbers["lines"]}
    assert list(lines) == ["default", "default again", "block-2048"]
    assert all(len(line["wall"]) == 2 and not line["problem"] for line in lines.values())
    assert numbers["wrong"] == {"default": "", "block-2048": ""}
    assert numbers["machine"]["commit"] == "1a2b3c4"
    assert "chosen: block-2048" in printed
    assert json.loads(file.read_text()) == {
        "default": {},
        "gfx": {"num_warps": 2},
        "sm_90": {"block": 2048, "num_warps": 8, **json.loads(stored_text)["sm_90"]},
    }


def lines(times: dict[str, float]) -> list[timing.Line]:
    """Lines of 3 rounds, the second slower for all; the wall times tell nothing."""
    return [
        timing.Line("case", name, 1, 1, 28, gpu=[us, 2 * us, us], wall=[1.0] * 3)
        for name, us in times.items()
    ]


@each(
    ("times", "best"),
    [
        pytest.param({"default": 100, "default again": 100, "stream": 90}, "stream", id="faster"),
        pytest.param({"default": 100, "default again": 106, "stream": 90}, "default", id="noise"),
        pytest.param(
            {"default": 100, "default again": 100, "stream": 99.5}, "default", id="too_little"
        ),
        pytest.param(
            {"default": 100, "default again": 100, "stream": 98, "exact": 80}, "stream", id="exact"
        ),
    ],
)
def test_choice(times: dict[str, float], best: str) -> None:
    candidates = [tune.BY_NAME[name] for name in times if name in tune.BY_NAME]
    chosen, gains, _ = tune.choose([lines(times), lines(times)], candidates)
    assert chosen.name == best
    assert gains["stream"] == pytest.approx(times["default"] / times["stream"])


def test_a_candidate_that_failed_once_is_not_chosen() -> None:
    fine = lines({"default": 100, "default again": 100, "stream": 50})
    failed = lines({"default": 100, "default again": 100, "stream": 50})
    failed[2].problem = "RuntimeError: out of luck"
    candidates = [tune.BY_NAME[name] for name in ("default", "stream")]
    chosen, gains, _ = tune.choose([fine, failed], candidates)
    assert (chosen, "stream" in gains) == (tune.DEFAULT, False)


def test_entry_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "launch_parameters", stored.launch_parameters.__wrapped__)
    text = stored.FILE.read_text()
    monkeypatch.setattr(stored, "FILE", tmp_path / "launch_parameters.json")
    stored.FILE.write_text(text)
    for candidate in tune.CANDIDATES:
        for name in ("sm_90", "gfx942"):
            stored.FILE.write_text(text)
            parameters = candidate.parameters(name)
            stored.FILE.write_text(tune.with_entry(text, name, parameters))
            assert stored.launch_parameters(name) == parameters
    assert tune.with_entry(text, "default", LaunchParameters()) == text  # keeps its form
