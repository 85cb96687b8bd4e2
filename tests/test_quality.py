"""bench/quality.py trains in every format, compares in pairs, and says which bars are met."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import maps
import pytest
import quality
import torch
from quality import BF16, FP32, MASTER_INT8, STOCHASTIC, Run, Settings
from torch import nn

from fused_adamw import formats

MACHINE = {"device": "made-up", "torch": "9.9", "commit": "1a2b3c4"}


def _runs(losses: dict[str, list[float]]) -> list[Run]:
    return [
        Run(name, seed, loss, curve=[loss], bytes_a_parameter=8.0, machine=MACHINE)
        for name, own in losses.items()
        for seed, loss in enumerate(own)
    ]


def test_gaps_are_taken_between_runs_of_one_seed() -> None:
    # Between seeds the losses differ by 0.5, within a pair by 0.01 and 0.03.
    rows = quality.compare(_runs({FP32: [2.0, 2.5, 3.0], BF16: [2.01, 2.53]}))
    fp32, bf16 = rows
    assert fp32.gaps == [0.0, 0.0, 0.0]
    assert fp32.noise == pytest.approx(0.5)
    assert bf16.gaps == pytest.approx([0.01, 0.03])
    assert bf16.gap == pytest.approx(0.02)
    assert bf16.gap_error == pytest.approx(0.01)  # 0.01 * sqrt(2) / sqrt(2)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        pytest.param([2.0, 2.4], "met", id="less_than_the_noise"),
        pytest.param([2.1, 2.9], "missed", id="more"),
    ],
)
def test_int8_with_masters_is_held_to_the_seeds_noise(own: list[float], said: str) -> None:
    # noise: stdev(2.0, 2.2) = 0.141
    sentences = quality.judge(quality.compare(_runs({FP32: [2.0, 2.2], MASTER_INT8: own})))
    (sentence,) = sentences
    assert sentence.endswith(said)


@pytest.mark.parametrize(
    ("plain", "rounded", "said"),
    [
        pytest.param(0.10, 0.009, "91.0%", id="most"),
        pytest.param(0.10, 0.020, "missed", id="too_little"),
        pytest.param(0.04, 0.001, "4.0 standard deviations here; 5 are wanted", id="no_gap"),
    ],
)
def test_stochastic_rounding_is_held_to_a_clear_gap(
    plain: float, rounded: float, said: str
) -> None:
    fp32 = [2.0 - 0.01 / math.sqrt(2), 2.0 + 0.01 / math.sqrt(2)]  # noise: 0.01
    runs = _runs(
        {FP32: fp32, BF16: [x + plain for x in fp32], STOCHASTIC: [x + rounded for x in fp32]}
    )
    (sentence,) = quality.judge(quality.compare(runs))
    assert said in sentence


def test_the_forward_pass_is_in_float32_whatever_the_weights() -> None:
    stored = nn.Linear(64, 64).bfloat16()
    x = torch.randn(3, 64)
    expected = x @ stored.weight.float().T + stored.bias.float()
    assert torch.allclose(quality.InFloat32(stored)(x), expected, rtol=1e-6, atol=1e-6)
    quality.InFloat32(stored)(x).sum().backward()
    assert stored.weight.grad is not None
    assert stored.weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "expected"),
    # weight, gradient, moments, and what masters take: exponents are a byte for 64 elements
    [(FP32, 16.0), (BF16, 8.0), ("bf16 + master", 14.0), (MASTER_INT8, 8.0 + 2 / 64)],
)
def test_bytes_a_parameter(name: str, expected: float) -> None:
    held = quality.measure_bytes(name, quality.SIZES["small"], torch.device("cpu"))
    # and steps; 1 % of the parameters are in norms and biases, whose moments are not in 8 bits
    assert expected <= held <= expected + 0.07


def test_every_format_is_trained_and_what_is_there_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "in_processes", lambda _, calls: (call() for call in calls))
    options = ["--size", "tiny", "--steps", "3", "--out", str(tmp_path)]
    assert quality.main([*options, "--seeds", "1"]) == 0
    first = json.loads((tmp_path / "quality.json").read_text())["runs"]
    assert [run["format"] for run in first] == list(quality.FORMATS)
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert all(5.0 < run["validation"] < 6.0 for run in first)  # log 256 = 5.5 at the start
    assert len({run["validation"] for run in first}) >= 4  # formats do differ

    assert quality.main([*options, "--seeds", "2", "--formats", FP32, BF16]) == 0
    runs = json.loads((tmp_path / "quality.json").read_text())["runs"]
    assert runs[: len(first)] == first
    assert [(run["format"], run["seed"]) for run in runs[len(first) :]] == [(FP32, 1), (BF16, 1)]
    assert runs[-2]["validation"] != first[0]["validation"]  # a seed of its own

    capsys.readouterr()
    with pytest.raises(SystemExit):
        quality.main([*options, "--lr", "1e-3"])
    assert "pass another --out" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_fails(tmp_path: Path) -> None:
    settings = Settings("tiny", 3, 3e-4, 0.95)
    runs = _runs({FP32: [2.0], BF16: [math.nan]})
    quality.save(tmp_path / "quality.json", settings, runs)
    options = ["--size", "tiny", "--steps", "3", "--seeds", "0", "--out", str(tmp_path)]
    assert quality.main(options) == 1


def test_readme_has_the_table_of_what_was_measured(tmp_path: Path) -> None:
    runs = _runs({FP32: [2.0, 2.2], MASTER_INT8: [2.01, 2.23]})
    runs[1] = replace(runs[1], machine={**MACHINE, "commit": "5d6e7f8"})
    quality.save(tmp_path / "quality.json", Settings("tiny", 3, 3e-4, 0.95), runs)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- quality: written -->\nold\n<!-- /quality -->\n")
    options = ["--size", "tiny", "--steps", "3", "--seeds", "0", "--out", str(tmp_path)]
    assert quality.main([*options, "--readme", str(readme)]) == 0
    text = readme.read_text()
    for fact in "made-up", "torch 9.9", "1a2b3c4, 5d6e7f8", "--size tiny --steps 3 --lr 0.0003":
        assert fact in text
    assert "| bf16 + master + int8 | 8.00 | 2.1200 | ± 0.1556 | +0.0200 ± 0.0100 | +0.14 |" in text
    assert "old" not in text


def test_maps_are_what_formats_ship() -> None:
    # Blocks of the largest 1.0 to 1.5: above, the shipped encoder takes the next exponent, where
    # the study's lets the largest be the last level.
    x = torch.rand(64, 64) + 0.5
    x[:, 0] = 1.5
    x *= torch.randn(64, 64).sign()
    levels = maps.quantised(maps.logarithmic(4, 32), stochastic=False)
    assert torch.equal(levels(x.view(-1)), maps.shipped_signed(x.view(-1)))
    codes = formats.decode_unsigned(
        torch.arange(256, dtype=torch.uint8), torch.full((4,), 127, dtype=torch.uint8)
    )
    assert torch.equal(codes, maps.logarithmic(16, 16))


@pytest.mark.parametrize("kind", maps.maps(first=False), ids=lambda kind: kind.name)
def test_no_map_of_second_moments_falls_to_zero(kind: maps.Map) -> None:
    x = torch.full((256,), 1e-12)
    x[::64] = 1.0
    for store in (kind.nearest, kind.stochastic):
        if store is not None:
            assert bool((store(x) > 0).all())


def test_errors_of_an_exact_map_are_those_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = maps.Map("exact", lambda x: x, None)
    coarse = maps.Map("coarse", lambda x: x * 1.01, None)
    monkeypatch.setattr(maps, "maps", lambda first: [exact, coarse] if first else [])
    study = maps.Study(256)
    for _ in range(3):
        study.feed(torch.randn(256))
    errors = study.errors()
    assert errors[True, "exact", False] < 1e-6
    assert errors[True, "coarse", False] > 0.005
