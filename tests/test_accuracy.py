"""bench/accuracy.py runs to its end and judges rightly; bench/emulated.py has the kernel's bits."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import accuracy
import emulated
import pytest
import torch
from torch import Tensor
from truth import same_bits

from fused_adamw import FusedAdamW
from fused_adamw import plan as planning
from fused_adamw.kernels.launch_parameters import LaunchParameters

OPTIONS: dict[str, dict[str, Any]] = {
    "default": accuracy.OPTIONS,
    "no_decay": {**accuracy.OPTIONS, "weight_decay": 0.0},
    # so large that a second rounding of the decay would show
    "large_decay": {**accuracy.OPTIONS, "lr": 0.3, "weight_decay": 0.9},
    "betas_below_half": {**accuracy.OPTIONS, "betas": (0.3, 0.4)},
}


@pytest.fixture
def _fma_rounds_once(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Triton 3.6's interpreter rounds the product, too; 3.9's calls the C library's fma."""
    if device.type == "cuda":
        return
    from triton.runtime import interpreter

    if hasattr(getattr(interpreter, "_interpreter", None), "fma_fp32"):
        return

    def create_fma(_: object, x: Any, y: Any, z: Any) -> Any:
        wide = x.data.astype("float64") * y.data + z.data
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


@pytest.mark.usefixtures("_fma_rounds_once")
@pytest.mark.parametrize("name", OPTIONS)
def test_emulation_has_the_bits_of_the_kernel(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p, m and v of all formats; the kernel with IEEE division, interpreted if there is no GPU."""
    monkeypatch.setattr(
        planning, "launch_parameters", lambda _: LaunchParameters(exact=True, maxnreg=0)
    )
    start = torch.randn(300)
    build = functools.partial(FusedAdamW, backend="triton")
    monkeypatch.setattr(accuracy, "OPTIONS", OPTIONS[name])
    kernel = accuracy.Racer(build, accuracy.FORMATS, start, device)
    twin = accuracy.Racer(emulated.EmulatedKernel, accuracy.FORMATS, start, torch.device("cpu"))
    for grad in itertools.islice(accuracy.gradients(300, seed=0), 4):
        grads = {f.param: grad.to(f.param) for f in accuracy.FORMATS}
        kernel.step({dtype: x.to(device) for dtype, x in grads.items()})
        twin.step(grads)
        for f in accuracy.FORMATS:
            ours, its = kernel.values(f), twin.values(f)
            for of in ours:
                assert same_bits(ours[of], its[of]), (f.name, of)
            assert not torch.equal(its["p"], start.to(f.param).double())


@pytest.mark.parametrize(
    ("approximate", "bound"),
    [
        pytest.param(lambda noise, x: emulated.square_root(x, noise), 2**-23, id="square_root"),
        pytest.param(
            lambda noise, x: emulated.quotient(x.square(), x, noise), 2**-22, id="quotient"
        ),
    ],
)
def test_noise_fills_what_the_hardware_guarantees(approximate: Any, bound: float) -> None:
    x = torch.rand(10_000) + 0.5
    exact = approximate(None, x).double()
    off = (approximate(torch.Generator().manual_seed(0), x) - exact) / exact
    # and the roundings of both to float32: half an ULP each, of 2^-23 at most
    assert 0.9 * bound < off.abs().max() < bound + 2**-23
    assert off.min() < -0.9 * bound


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Folder, numbers and output of 10 steps on the CPU."""
    out = tmp_path_factory.mktemp("accuracy")
    script = Path(accuracy.__file__)
    command = [sys.executable, script, "--steps", "10", "--numel", "512", "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, json.loads((out / "accuracy.json").read_text()), done.stdout


def test_all_formats_after_1_2_and_10_steps(run: tuple[Path, dict[str, Any], str]) -> None:
    out, numbers, printed = run
    cells = numbers["cells"]
    names = {*accuracy.OURS_ON_CPU, *accuracy.TORCHS}
    assert [(c["format"], c["steps"], c["of"]) for c in cells] == [
        (f.name, steps, of) for steps in (1, 2, 10) for f in accuracy.FORMATS for of in "pmv"
    ]
    for cell in cells:
        assert cell["errors"].keys() == cell["step_errors"].keys() == names
        for name in names:
            assert 0 <= cell["errors"][name]["median"] <= cell["errors"][name]["p99"]
            assert cell["errors"][name]["p99"] <= cell["errors"][name]["max"] < float("inf")
            if cell["steps"] == 1:
                assert cell["errors"][name] == cell["step_errors"][name]
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for text in (*names, *(f.name for f in accuracy.FORMATS)):
        assert text in printed


def test_one_rounding_at_the_store(run: tuple[Path, dict[str, Any], str]) -> None:
    """A step of ours in bf16 is off by half an ULP; torch's for-loop rounds each operation."""
    for cell in run[1]["cells"]:
        stored_in_bf16 = cell["format"] == "bf16" or (
            cell["format"] == "bf16, fp32 moments" and cell["of"] == "p"
        )
        if stored_in_bf16:
            for name in accuracy.OURS_ON_CPU:
                assert cell["step_errors"][name]["max"] < 0.51
            if cell["of"] == "p":
                assert cell["step_errors"]["torch loop"]["max"] > 0.6


def test_every_figure_above_torchs_best_is_listed(run: tuple[Path, dict[str, Any], str]) -> None:
    _, numbers, _ = run
    listed = {
        (x["optimizer"], x["format"], x["steps"], x["of"], x["statistic"])
        for x in numbers["not_under"]
    }
    assert listed  # the worst case at least
    assert all(x["cause"] for x in numbers["not_under"])
    for cell, name, statistic in itertools.product(
        numbers["cells"], accuracy.OURS_ON_CPU, accuracy.Errors._fields
    ):
        mine = cell["errors"][name][statistic]
        under = [n for n in accuracy.TORCHS if mine <= cell["errors"][n][statistic]]
        assert cell["at_or_under"][name][statistic] == under
        key = (name, cell["format"], cell["steps"], cell["of"], statistic)
        assert (key in listed) == (len(under) < 3)


def test_a_defect_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A beta2 that is off by 1e-4 puts v, and the weight, far above torch; and the step tells."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def defect(params: Any, betas: tuple[float, float], **options: Any) -> torch.optim.Optimizer:
        return FusedAdamW(params, betas=(betas[0], betas[1] + 1e-4), **options)

    monkeypatch.setattr(accuracy, "OURS_ON_CPU", {"reference": defect})
    assert accuracy.main(["--steps", "2", "--numel", "256", "--out", str(tmp_path)]) == 0
    listed = json.loads((tmp_path / "accuracy.json").read_text())["not_under"]
    medians = {(x["format"], x["of"]): x for x in listed if x["statistic"] == "median"}
    assert medians["fp32", "v"]["mark"] == medians["bf16", "v"]["mark"] == ">"
    assert "the arithmetic itself" in medians["fp32", "v"]["cause"]


@pytest.mark.parametrize(
    ("value", "exact", "before", "dtype", "ulps"),
    [
        pytest.param(1 + 2**-23, 1.0, 0.0, torch.float32, 1.0, id="fp32"),
        pytest.param(1 + 2**-7, 1.0, 0.0, torch.bfloat16, 1.0, id="bf16"),
        pytest.param(1.0, 1 - 2**-24, 0.0, torch.float32, 1.0, id="below_a_power_of_two"),
        pytest.param(2**-23, 0.0, 4.0, torch.float32, 0.25, id="cancelled"),
    ],
)
def test_unit(value: float, exact: float, before: float, dtype: torch.dtype, ulps: float) -> None:
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (value, exact, before)]
    assert accuracy.summarize(*tensors, dtype) == (ulps,) * 3


def test_nan_is_above_all() -> None:
    nan = accuracy.summarize(*(torch.tensor([float("nan"), 1.0]).double(),) * 3, torch.float32)
    fine = {name: accuracy.Errors(1.0, 1.0, 1.0) for name in accuracy.TORCHS}
    cell = accuracy.Cell("fp32", 1, "p", {**fine, "reference": nan}, {**fine, "reference": nan})
    assert cell.mark("reference", "max") == ">"
    assert cell.cause("reference", "max") == "not finite"


def test_gradients_have_the_range_of_a_training() -> None:
    def first(seed: int) -> Tensor:
        return torch.stack(list(itertools.islice(accuracy.gradients(4096, seed), 20)))

    grads = first(0)
    assert same_bits(grads, first(0))
    assert not torch.equal(grads, first(1))
    sizes = grads.double().square().mean(0).sqrt().log10()
    sizes = sizes[sizes.isfinite()]  # a rare one may be silent in all 20
    low, high = sizes.quantile(torch.tensor([0.01, 0.99]).double())
    assert high - low > 4  # decades
    silent = (grads == 0).double().mean(0)
    assert abs(float((silent > 0.5).double().mean()) - 1 / 8) < 0.02
