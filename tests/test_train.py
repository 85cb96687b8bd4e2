"""bench/train.py and train_fsdp.py run to their end, and tell curves that part from others."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from twins import TORCH_VERSION

SCRIPT = Path(__file__).parents[1] / "bench" / "train.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A second thread gains `tiny` nothing; on 2 busy cores it made this file 103 s, not 26 s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_tiny_runs_to_its_end(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "loss.json").read_text())
    assert numbers["fine"]
    assert {len(run["losses"]) for run in numbers["runs"].values()} == {numbers["size"]["steps"]}
    for run in numbers["runs"].values():
        assert run["losses"][-1] < run["losses"][0] - 1  # it learns: log 256 = 5.5 at the start


CURVE = [5.5 - 0.01 * step for step in range(100)]
NOISE = [loss + 1e-6 for loss in CURVE]  # the yardstick: its limit is MARGIN * 1e-6 everywhere


@pytest.mark.parametrize(
    ("step", "offset", "parts_at"),
    [
        pytest.param(50, 0.0, None, id="same"),
        pytest.param(50, 0.9e-6, None, id="within_noise"),
        pytest.param(50, 29e-6, None, id="within_margin"),
        pytest.param(50, 31e-6, 50, id="above"),
        pytest.param(50, -31e-6, 50, id="below"),
        pytest.param(1, 1e-3, 1, id="first_step"),
        pytest.param(100, 1e-3, 100, id="last_step"),
        pytest.param(50, math.nan, 50, id="nan"),
        pytest.param(50, math.inf, 50, id="inf"),
    ],
)
def test_compare(bench: ModuleType, step: int, offset: float, parts_at: int | None) -> None:
    candidate = [loss + offset * (i >= step) for i, loss in enumerate(CURVE, 1)]
    if not math.isfinite(offset):  # 0 * nan is nan
        candidate = CURVE[: step - 1] + [offset] * (len(CURVE) - step + 1)
    assert bench.compare(CURVE, candidate, NOISE).parts_at == parts_at


def test_limit_is_never_below_what_the_loss_resolves(bench: ModuleType) -> None:
    assert min(bench.compare(CURVE, CURVE, CURVE).limits) >= 5.5 * 2**-23


def test_limit_grows_with_the_noise_and_never_shrinks(bench: ModuleType) -> None:
    noisy = [loss + 1e-3 * (i == 50) for i, loss in enumerate(CURVE, 1)]
    limits = bench.compare(CURVE, CURVE, noisy).limits
    assert limits[48] < 1e-4
    assert limits[49] == limits[-1] == pytest.approx(bench.MARGIN * 1e-3)


def test_one_optimizer_has_nothing_to_compare_with(bench: ModuleType, tmp_path: Path) -> None:
    options = ["--size", "tiny", "--steps", "2", "--optimizer", "fused", "--out", str(tmp_path)]
    assert bench.main(options) == 0
    numbers = json.loads((tmp_path / "loss.json").read_text())
    assert list(numbers["runs"]) == [bench.OURS]
    assert numbers["verdict"] is None


def wrong_beta2(params: Any, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr, (betas[0], betas[1] + 0.01))


def no_weight_decay(params: Any, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{**group, "weight_decay": 0.0} for group in params], lr, betas)


def coupled_weight_decay(
    params: Any, lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr, betas)


def no_bias_correction(params: Any, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW whose lr undoes both corrections (its decay, too: far below the effect)."""
    optimizer = torch.optim.AdamW(params, lr, betas)
    step = 0

    def undo(*_: object) -> None:
        nonlocal step
        step += 1
        for group in optimizer.param_groups:
            group["lr"] *= (1 - betas[0] ** step) / math.sqrt(1 - betas[1] ** step)

    optimizer.register_step_pre_hook(undo)
    return optimizer


def no_number(params: Any, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr * math.inf, betas)


@pytest.mark.parametrize(
    "defect",
    [wrong_beta2, no_weight_decay, coupled_weight_decay, no_bias_correction, no_number],
    ids=lambda defect: defect.__name__,
)
def test_a_defect_exits_with_1(
    bench: ModuleType,
    defect: Callable[..., torch.optim.Optimizer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(bench.OPTIMIZERS, bench.OURS, defect)
    assert bench.main(["--size", "tiny", "--out", str(tmp_path)]) == 1
    assert not json.loads((tmp_path / "loss.json").read_text())["fine"]


def test_torch_against_itself_exits_with_0(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is the defect, not the exchange, that the test above sees."""

    def foreach(params: Any, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, foreach=True, **options)

    monkeypatch.setitem(bench.OPTIMIZERS, bench.OURS, foreach)
    assert bench.main(["--size", "tiny", "--out", str(tmp_path)]) == 0


def torchrun(ranks: int, *options: str) -> subprocess.CompletedProcess[str]:
    """bench/train_fsdp.py on CPU ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command = [*launcher, str(SCRIPT.with_name("train_fsdp.py")), "--size", "tiny", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed or gloo",
)
def test_fsdp_stops_and_goes_on(tmp_path: Path) -> None:
    """On 2 ranks, and then its second half once more on 1: the checkpoint is laid out anew."""
    if TORCH_VERSION < (2, 7):
        pytest.skip("torch 2.6 has no FSDP2 on a CPU")
    options = ["--steps", "12", "--out", str(tmp_path)]
    done = torchrun(2, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "fsdp.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "fsdp.json").read_text())
    assert numbers["ranks"] == 2
    assert numbers["resumed"] == [0.0] * 6, "bit for bit"
    runs = numbers["runs"]
    assert [len(run["losses"]) for run in runs.values()] == [12, 12, 12, 6]
    assert runs["FusedAdamW"]["losses"][-1] < runs["FusedAdamW"]["losses"][0] - 0.5  # it learns

    # steps 7 to 11 are as they were, and a 12th that was not so is told
    numbers["runs"]["FusedAdamW"]["losses"][-1] += 1e-3
    (tmp_path / "fsdp.json").write_text(json.dumps(numbers))
    done = torchrun(1, *options, "--resume")
    assert done.returncode == 1
    assert "FAIL resumed after step 6: largest difference 1.00e-03" in done.stdout
    assert "beyond its limit at step 12" in done.stdout
