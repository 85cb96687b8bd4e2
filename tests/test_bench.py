"""bench/cases.py has the architectures' own shapes, and bench/step.py runs to its end."""

import dataclasses
import functools
import gc
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import host
import machine
import providers
import pytest
import step
import timing
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.parametrize(
    ("name", "tensors", "groups", "numel"),
    [
        # published: 124M, 25.6M, 86.6M, 1.24B and 8.03B parameters
        pytest.param("gpt2", 148, 2, 124_439_808, id="gpt2"),
        pytest.param("gpt2-unaligned", 148, 2, 124_439_808, id="gpt2-unaligned"),
        pytest.param("resnet50", 161, 2, 25_557_032, id="resnet50"),
        pytest.param("vit-b", 152, 2, 86_567_656, id="vit-b"),
        pytest.param("llama-1b", 146, 2, 1_235_814_400, id="llama-1b"),
        pytest.param("llama-1b-bf16", 146, 2, 1_235_814_400, id="llama-1b-bf16"),
        pytest.param("llama-1b-mixed", 146, 2, 1_235_814_400, id="llama-1b-mixed"),
        pytest.param("llama-8b-fsdp8", 291, 2, 8_030_261_248 // 8, id="llama-8b-fsdp8"),
        pytest.param("moe-10000", 10_000, 2, None, id="moe-10000"),
        pytest.param("465-groups", 465, 465, None, id="465-groups"),
        pytest.param("10000x64", 10_000, 1, 640_000, id="10000x64"),
        pytest.param("200x1Mi", 200, 1, 200 * 2**20, id="200x1Mi"),
        pytest.param("10x16Mi", 10, 1, 10 * 2**24, id="10x16Mi"),
        pytest.param("1Gi", 1, 1, 2**30, id="1Gi"),
    ],
)
def test_totals(name: str, tensors: int, groups: int, numel: int | None) -> None:
    case = cases.CASES[name]
    assert (case.tensors, len(case.groups)) == (tensors, groups)
    assert numel is None or case.numel == numel


def test_names_are_unique() -> None:
    every = {**cases.CASES, **cases.TINY_CASES}
    assert len(every) == len(cases.CASES) + len(cases.TINY_CASES) == 18
    assert all(name == case.name for name, case in every.items())


@pytest.mark.parametrize(
    ("param", "formats", "each"),
    [
        # param and both moments read and written, the gradient read
        pytest.param(torch.float32, {}, 28, id="fp32"),
        pytest.param(torch.bfloat16, {"moments": torch.float32}, 22, id="bf16_fp32_moments"),
        pytest.param(torch.bfloat16, {}, 14, id="bf16"),
        pytest.param(torch.bfloat16, {"moments": torch.uint8}, 10.0625, id="bf16_8_bit_moments"),
        pytest.param(torch.float32, {"grad": torch.bfloat16}, 26, id="fp32_bf16_grads"),
    ],
)
def test_count_bytes(param: torch.dtype, formats: dict[str, torch.dtype], each: float) -> None:
    case = cases.Case("x", (cases.Group((cases.Leaf((3, 5), param), cases.Leaf((), param))),))
    assert cases.count_bytes(case, **formats) == 16 * each


def test_count_bytes_of_mixed_formats() -> None:
    case = cases.CASES["llama-1b-mixed"]
    norms = 33 * 2048  # two in each of 16 layers, and the last one
    assert cases.count_bytes(case) == 28 * norms + 14 * (case.numel - norms)
    # clipping reads each gradient once more
    assert cases.count_bytes(case, clips=True) == 32 * norms + 16 * (case.numel - norms)
    half = cases.count_bytes(case, grad=torch.bfloat16, clips=True)
    assert half == 28 * norms + 16 * (case.numel - norms)
    residue = cases.count_bytes(case, residue=1)  # of 16-bit params alone, read and written
    assert residue == 28 * norms + 16 * (case.numel - norms)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", providers.FORMATS)
def test_bytes_of_formats_are_those_that_are_kept(name: str) -> None:
    """What a step is said to move, against what the optimizer's tensors hold."""
    case, device = cases.TINY_CASES["tiny-mixed"], machine.Device()
    provider = providers.PROVIDERS["fused_adamw" + name]
    groups = cases.make(case, device.device)
    params = [p for group in groups for p in group["params"]]
    grads = timing.Gradients(case, params, device.device)
    line = timing.Line(case.name, name, 0, case.numel, 0)
    timing.Entrant(provider, groups, grads, device, line)
    of_params = sum(p.nbytes for p in params)
    assert line.state_bytes is not None
    steps = 4 * len(params)
    moved = 2 * (of_params + line.state_bytes - steps) + of_params
    # exponents are counted by the element, not by the block
    assert cases.count_bytes(case, options=provider.options) == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("unaligned", [False, True], ids=["aligned", "unaligned"])
def test_made_as_described(unaligned: bool) -> None:
    case = dataclasses.replace(cases.TINY_CASES["tiny-mixed"], unaligned=unaligned)
    groups = cases.make(case, torch.device("cpu"))
    params = [p for group in groups for p in group["params"]]
    grads, buffers = cases.gradients(case, torch.device("cpu"))
    assert [(p.shape, p.dtype) for p in params] == [(x.shape, x.dtype) for x in case.leaves]
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in case.leaves]
    assert [len(group["params"]) for group in groups] == [len(x.leaves) for x in case.groups]
    assert all(p.is_leaf and p.is_contiguous() for p in params)
    if unaligned:
        assert len({p.untyped_storage().data_ptr() for p in params}) == 2  # one buffer a dtype
    for tensors in params, grads:
        offsets = {x.data_ptr() % 16 // x.itemsize for x in tensors if x.numel()}
        assert offsets == {int(unaligned)}
    for buffer in buffers:
        buffer.zero_()
    for i, grad in enumerate(grads):  # they share no element
        assert not grad.count_nonzero()
        grad.fill_(i + 1)
    assert all(bool((grad == i + 1).all()) for i, grad in enumerate(grads))


def test_random_everywhere() -> None:
    for case in cases.TINY_CASES.values():
        for group in cases.make(case, torch.device("cpu")):
            for p in group["params"]:
                assert p.numel() < 2 or p.std() > 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Folder, numbers and output of bench/step.py on the tiny cases, on the CPU."""
    out = tmp_path_factory.mktemp("step")
    command = [sys.executable, str(BENCH / "step.py"), "--rounds", "2", "--out", str(out)]
    command += ["--cases", "tiny", "tiny-mixed", "tiny"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, json.loads((out / "step.json").read_text()), done.stdout


def test_step_times_all_on_cpu(run: tuple[Path, dict[str, Any], str]) -> None:
    _, numbers, _ = run
    lines = {(line["case"], line["provider"]): line for line in numbers["lines"]}
    torchs = "torch-fused", "torch-foreach", "torch-loop"
    clipped = "fused_adamw+clip", "torch-fused+clip"
    for case in "tiny", "tiny-mixed":
        for provider in ("fused_adamw", "fused_adamw again", *torchs, *clipped):
            line = lines[case, provider]
            assert not line["problem"]
            assert len(line["wall"]) == 2
            assert min(line["wall"]) > 0
            assert line["tbs"] > 0
            assert not line["gpu"]
            assert line["launches"] is None
            assert line["syncs"] is None
    # two moments, and a step of 4 bytes for each of 6 tensors
    fused = lines["tiny", "torch-fused"]
    assert fused["state_bytes"] == 8 * fused["numel"] + 4 * 6
    assert lines["tiny", "fused_adamw"]["state_bytes"] == fused["state_bytes"]
    assert fused["times_rival"]["wall"] == 1
    clip = lines["tiny", "torch-fused+clip"]
    assert clip["bytes_moved"] == fused["bytes_moved"] + 4 * fused["numel"]
    ours = lines["tiny", "fused_adamw+clip"]
    assert ours["rival"] == "torch-fused+clip"
    ratios = [b / a for a, b in zip(ours["wall"], clip["wall"], strict=True)]
    assert ours["times_rival"]["wall"] == pytest.approx(sum(ratios) / 2)  # median of two
    assert len(numbers["noise"]) == 2
    assert math.isfinite(numbers["geometric_means"]["fused_adamw"]["wall"])
    assert all(value > 0 for value in numbers["ceilings"].values())


def test_step_prints_and_draws(run: tuple[Path, dict[str, Any], str]) -> None:
    out, numbers, printed = run
    assert printed.splitlines()[0].startswith(numbers["machine"]["device"])
    for line in numbers["lines"]:
        assert line["provider"] in printed
    for name in "throughput.png", "host.png", "memory.png":
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_gradients_are_fresh() -> None:
    """New values in new tensors at the old addresses; one of them elsewhere if so wanted."""
    case = cases.TINY_CASES["tiny-mixed"]
    params = [p for group in cases.make(case, torch.device("cpu")) for p in group["params"]]
    grads = timing.Gradients(case, params, torch.device("cpu"))
    grads.refresh()
    before, values = [p.grad for p in params], [p.grad.clone() for p in params]
    grads.refresh()
    for p, old, value in zip(params, before, values, strict=True):
        assert p.grad is not old
        assert p.grad.data_ptr() == old.data_ptr()
        assert not p.numel() or not torch.equal(p.grad, value)
    grads.move_one()
    moved = [p.grad.data_ptr() != old.data_ptr() for p, old in zip(params, before, strict=True)]
    assert sum(moved) == 1
    assert params[moved.index(True)].grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_stream_kernel(device: torch.device, dtype: torch.dtype) -> None:
    p, g, m, v = (torch.randn(2 * machine.BLOCK, device=device).to(dtype) for _ in range(4))
    wanted = [(x / 2).to(dtype) for x in (p.float() + g, m.float() - g, v.float() + g)]
    read_only = g.clone()
    machine.stream_kernel()[(2,)](p, g, m, v, BLOCK=machine.BLOCK)
    assert torch.equal(g, read_only)
    for x, want in zip((p, m, v), wanted, strict=True):
        assert torch.equal(x, want)  # one rounding, and halves are exact


def test_clipping_rows_run_in_some_cases_and_where_named() -> None:
    every, _ = providers.find_providers(None, cuda=True)
    clipped = {"fused_adamw+clip", "torch-fused+clip"}
    assert clipped <= every.keys()
    for case in "llama-1b", "moe-10000":  # those with a bar
        assert clipped <= providers.entering(every, case, None).keys()
    formats = {"fused_adamw" + name for name in providers.FORMATS}
    assert formats <= providers.entering(every, "llama-1b-bf16", None).keys()
    everywhere = providers.entering(every, "1Gi", None).keys()
    assert everywhere == every.keys() - clipped - formats
    named = providers.entering(every, "1Gi", ["torch-fused", "torch-fused+clip"])
    assert clipped & named.keys() == {"torch-fused+clip"}


@pytest.mark.usefixtures("no_gpu")
def test_both_clipping_rows_do_the_same() -> None:
    """And what they do is clip: gradients far beyond the norm, and steps that see their size."""
    case, device = cases.TINY_CASES["tiny"], machine.Device()
    weights = []
    for name in "fused_adamw+clip", "torch-fused+clip", "torch-fused":
        torch.manual_seed(0)
        groups = [{**group, "lr": 1.0} for group in cases.make(case, device.device)]
        params = [p for group in groups for p in group["params"]]
        grads = timing.Gradients(case, params, device.device)
        provider = providers.PROVIDERS[name]
        # with the usual eps steps of Adam are the same for gradients of any size
        provider = provider._replace(build=functools.partial(provider.build, eps=1.0))
        timing.Entrant(provider, groups, grads, device, timing.Line("tiny", name, 0, 0, 0))
        weights.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=1e-6)
    assert not torch.allclose(weights[1], weights[2], rtol=0, atol=1e-1)


@pytest.mark.usefixtures("no_gpu")
def test_each_step_is_timed_with_another_lr(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a scheduler; a compiled step keeps its own, or would be compiled again."""
    case, device = cases.TINY_CASES["tiny"], machine.Device()
    for compiled in (False, True):
        groups = cases.make(case, device.device)
        params = [p for group in groups for p in group["params"]]
        grads, line = timing.Gradients(case, params, device.device), timing.Line("", "", 0, 0, 0)
        rates: list[float] = []

        class Noting(torch.optim.SGD):
            def step(self, closure: Any = None, noted: list[float] = rates) -> None:
                noted.append(self.param_groups[0]["lr"])

        monkeypatch.setattr(torch, "compile", lambda step: step)
        provider = providers.Provider(functools.partial(Noting, lr=1.0), compiled=compiled)
        entrant = timing.Entrant(provider, groups, grads, device, line)
        rates.clear()
        for _ in range(3):
            entrant.time(device, grads, line)
        assert len(set(rates)) == (1 if compiled else 3)


class Counting(machine.Device):
    """A GPU by its memory alone: that of all CPU tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.cuda = self.profiles = True

    def synchronize(self) -> None: ...

    def allocated(self) -> int:
        gc.collect()
        storages = (
            x.untyped_storage()
            for x in gc.get_objects()
            if type(x) in (torch.Tensor, torch.nn.Parameter)
        )
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.usefixtures("no_gpu")
def test_memory_is_that_of_each_optimizer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the gradient that the profiled step of the one before has found elsewhere."""
    case, device = cases.Case("x", (cases.Group((cases.Leaf((64, 64)),)),)), Counting()
    groups = cases.make(case, device.device)
    grads = timing.Gradients(case, groups[0]["params"], device.device)
    for name in "synchronize", "reset_peak_memory_stats":
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", device.allocated)
    monkeypatch.setattr(timing, "count_syncs", lambda step: step() or 0)
    monkeypatch.setattr(timing, "count_launches", lambda step: (step() or 1, 0))
    kept = []
    for provider in (providers.PROVIDERS["torch-fused"],) * 3:
        line = timing.Line("x", "", 1, case.numel, 0)
        entrant = timing.Entrant(provider, groups, grads, device, line)
        kept.append((entrant, line.state_bytes, line.peak_bytes))
    assert [sizes for _, *sizes in kept] == [[8 * case.numel + 4] * 2] * 3


class SlowHost(machine.Device):
    """A GPU that gets to a step before the host is done, so many times."""

    def __init__(self, waits: int) -> None:
        self.waits, self.ahead = waits, list[float]()
        super().__init__()
        self.cuda = True

    def synchronize(self) -> None: ...

    def flush(self, seconds: float = 0.0) -> None:
        self.ahead += [seconds] if seconds else []

    def time(self, call: Callable[[], object]) -> tuple[float, bool]:
        self.waits -= 1
        return 1e-6, self.waits >= 0


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("waits", "times", "known"), [(0, 1, True), (2, 3, True), (3, 3, False)])
def test_what_waited_for_the_host_is_timed_again(waits: int, times: int, known: bool) -> None:
    case, device = cases.TINY_CASES["tiny"], machine.Device()
    groups = cases.make(case, device.device)
    params = [p for group in groups for p in group["params"]]
    grads, line = timing.Gradients(case, params, device.device), timing.Line("", "", 0, 0, 1)
    provider = providers.Provider(functools.partial(torch.optim.SGD, lr=1.0))
    entrant = timing.Entrant(provider, groups, grads, device, line)
    slow = SlowHost(waits)
    entrant.time(slow, grads, line)
    assert len(slow.ahead) == times
    assert [b / a for a, b in itertools.pairwise(slow.ahead)] == [pytest.approx(1.5)] * (times - 1)
    assert line.gpu == [1.0]
    assert line.waited == (not known)
    assert line.device_times == ([1.0] if known else [])


@pytest.mark.usefixtures("no_gpu")
def test_hosts_steps_have_what_they_say_is_new() -> None:
    p = torch.nn.Parameter(torch.zeros(8, 8))
    p.grad = torch.zeros_like(p)
    for what, changes in host.CHANGES.items():
        optimizer = torch.optim.SGD([p], lr=0.1)
        before = optimizer.param_groups[0]["lr"], p.grad.data_ptr()
        kept = p.grad
        for change in changes:
            change(optimizer)
        after = optimizer.param_groups[0]["lr"], p.grad.data_ptr()
        new = [a != b for a, b in zip(before, after, strict=True)]
        assert new == [what in ("lr", "both"), what in ("gradients", "both")]
        del kept
    table = host.as_trained(3, 2, torch.device("cpu"), lambda: None)
    assert table.row_count == 2 * len(host.CHANGES)


def test_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's warnings alone, however often one place warns; and the mode is put back."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        assert modes == ["warn"]
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=1)

    assert machine.count_syncs(step) == 2
    assert modes == ["warn", "default"]
    modes.clear()
    with pytest.raises(ZeroDivisionError):
        machine.count_syncs(lambda: 1 / 0)
    assert modes == ["warn", "default"]


@pytest.mark.usefixtures("no_gpu")
def test_step_reports_a_provider_that_fails(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = {"4R3W fp32": [1.0], "copy fp32": [1.0]}

    def broken(*_: object) -> torch.optim.Optimizer:
        raise RuntimeError("no such luck\nand a second line")

    def too_large(*_: object) -> torch.optim.Optimizer:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(step, "measure_ceilings", lambda _, into, __: into.update(one))
    monkeypatch.setitem(providers.PROVIDERS, "torch-loop", providers.Provider(broken))
    monkeypatch.setitem(providers.PROVIDERS, "fused_adamw", providers.Provider(too_large))
    options = ["--cases", "tiny", "--rounds", "1", "--out", str(tmp_path), "--providers"]
    everyone = "fused_adamw", "torch-fused", "torch-loop", "apex"
    assert step.main([*options, *everyone]) == 0  # too little memory is no failure of ours
    printed = capsys.readouterr().out
    assert "RuntimeError: no such luck" in printed
    assert "OutOfMemoryError: CUDA out of memory." in printed
    lines = {x["provider"]: x for x in json.loads((tmp_path / "step.json").read_text())["lines"]}
    assert len(lines["torch-fused"]["wall"]) == len(lines["torch-fused again"]["wall"]) == 1
    assert not lines["torch-loop"]["wall"]

    monkeypatch.setitem(providers.PROVIDERS, "fused_adamw", providers.Provider(broken))
    assert step.main([*options, *everyone]) == 1


def stub(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_the_gpu_script_runs_dry(tmp_path: Path) -> None:
    """So that it is not found broken when a GPU is there; a part that fails stops no other.

    NVIDIA's tools are played: what they would look at is run.
    """
    (tmp_path / "bin").mkdir()
    stub(tmp_path / "bin" / "compute-sanitizer", 'exec "${@:5}"')  # behind its 4 options
    few = 'until [[ $1 == */python3 ]]; do shift; done; exec "$@" --numel 100'
    stub(tmp_path / "bin" / "ncu", few)
    script = Path(__file__).parents[1] / "bench" / "gpu.sh"
    folders = tmp_path / "bin", Path(sys.executable).parent, os.environ["PATH"]
    parts = "sanitizer fsdp accuracy tests step host train ncu"
    assert f"parts=${{2:-{parts}}}" in script.read_text().replace('"', "")
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "gpu"), f"no-such-part {parts}", "tiny", "1a2b3c4"],
        env={**os.environ, "PATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    summary = (tmp_path / "gpu" / "summary.txt").read_text()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no part is called no-such-part" in summary
    ran = dict(re.findall(r"^(\S+) +exit (\d+)", summary, re.MULTILINE))
    formats = ("fp32", "bf16", "bf16+int8", "bf16+master+int8")
    expected = {"memcheck", "racecheck", "phases", *parts.split()}
    expected |= {f"ncu-{name}" for name in formats}
    assert ran == dict.fromkeys(expected - {"sanitizer", "ncu"}, "0"), done.stdout
    numbers = json.loads((tmp_path / "gpu" / "step.json").read_text())
    assert numbers["machine"]["commit"] == "1a2b3c4"
    assert numbers["command"].startswith("python bench/step.py --out ")
    files = {path.name for path in (tmp_path / "gpu").iterdir()}
    assert {"step.json", "loss.json", "logs.tar.gz"} <= files
    assert len(files) <= 8  # what the device machine gives back
    with tarfile.open(tmp_path / "gpu" / "logs.tar.gz") as logs:
        assert {"./accuracy.log", "./accuracy/accuracy.json"} <= set(logs.getnames())
        numbers = json.load(logs.extractfile("./accuracy/accuracy.json"))
        few_steps = logs.extractfile("./memcheck.log").read().decode()
        phases = logs.extractfile("./phases.log").read().decode()
    assert numbers["machine"]["commit"] == "1a2b3c4"
    assert few_steps.count("finite: True") == 7
    number = r"[\d,]+"
    for name in "fused_adamw", r"fused_adamw\+clip":
        start = rf"tiny, {name}: wall {number}, host {number}, _update {number}, _asked {number}, "
        assert re.search(start, phases), phases
    assert re.search(rf"tiny, torch-fused: wall {number}, host {number}\n", phases), phases


def test_the_gpu_script_ends_in_time(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "bench" / "gpu.sh"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script), str(tmp_path), "step host", "tiny"],
        env={**os.environ, "PATH": path, "SECONDS": "456"},  # bash counts on from there
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    ended = "exit 124 not run: the time is over"
    assert [" ".join(line.split()) for line in summary] == [
        f"{name} {ended}" for name in ("step", "host", "phases")
    ]


def test_the_gpu_script_wants_a_folder(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "bench" / "gpu.sh"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode
    assert "usage: bash bench/gpu.sh FOLDER" in done.stderr
    assert not done.stdout


def test_the_gpu_script_tells_when_it_would_time_another_checkout(tmp_path: Path) -> None:
    here = Path(__file__).parents[1]
    (tmp_path / "bench").mkdir()
    shutil.copy(here / "bench" / "gpu.sh", tmp_path / "bench")
    (tmp_path / "fused_adamw").mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(tmp_path / "bench" / "gpu.sh"), str(tmp_path / "gpu"), "step"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"pip install -e {tmp_path} first" in done.stderr
