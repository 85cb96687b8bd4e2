"""kernels/launch_parameters.py: which entry counts, and that the shipped file can be launched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fused_adamw.kernels import launch_parameters as tuned
from fused_adamw.kernels.launch_parameters import LaunchParameters


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for the one in the package."""
    monkeypatch.setattr(tuned, "FILE", tmp_path / "launch_parameters.json")
    monkeypatch.setattr(tuned, "launch_parameters", tuned.launch_parameters.__wrapped__)
    return tuned.FILE


def test_the_most_exact_name_counts(file: Path) -> None:
    file.write_text(
        '{"default": {"block": 512}, "gfx": {"num_warps": 2}, "sm_90": {"block": 2048}}'
    )
    get = tuned.launch_parameters
    assert get("sm_90") == LaunchParameters(block=2048)
    assert get("sm_80") == get("") == LaunchParameters(block=512)
    assert get("gfx942") == get("gfx90a") == LaunchParameters(num_warps=2)


def test_a_misspelt_parameter_is_an_error(file: Path) -> None:
    file.write_text('{"default": {"blocks": 512}}')
    with pytest.raises(TypeError, match="blocks"):
        tuned.launch_parameters("sm_90")


def test_the_file_in_the_package_can_be_launched() -> None:
    entries = json.loads(tuned.FILE.read_text())
    assert "default" in entries
    for name in entries:
        p = tuned.launch_parameters(name)
        lanes = 64 if name.startswith("gfx") else 32
        assert p.block & (p.block - 1) == 0, "tl.arange wants a power of two"
        assert p.block // (p.num_warps * lanes) == 8, "elements a thread: 128 bits of bf16"
        assert p.blocks_per_program >= 1


def test_uncapped_keeps_all_but_the_caps() -> None:
    caps = dict.fromkeys(tuned.CAPS, 40)
    assert set(caps) == {name for name in LaunchParameters._fields if "maxnreg" in name}
    free = LaunchParameters(block=512, **caps).uncapped()
    assert free == LaunchParameters(block=512, **dict.fromkeys(caps, 0))


def test_architecture_of_the_device(device: torch.device) -> None:
    name = tuned.architecture(device)
    assert name.startswith(("sm_", "gfx")) if device.type == "cuda" else name == ""
