"""bench/floors.py: torch's launches by its sources, ours as made, and the tables in place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cases
import floors
import pytest
import torch

from fused_adamw import FusedAdamW
from fused_adamw.kernels.table import Signature


@pytest.mark.parametrize(
    ("numels", "launches"),
    [
        # 36 tensors or 320 chunks of 65,536 elements end a launch
        pytest.param([], 0, id="none"),
        pytest.param([0, 0], 0, id="empty-tensors"),
        pytest.param([1] * 36, 1, id="as-many-tensors"),
        pytest.param([1] * 37, 2, id="a-tensor-more"),
        pytest.param([0] + [1] * 36, 1, id="empty-tensors-take-no-room"),
        pytest.param([65536 * 320], 1, id="as-many-chunks"),
        pytest.param([65536 * 320 + 1], 2, id="a-chunk-more"),
        pytest.param([65536 * 319 + 1, 1], 2, id="full-before-the-next-tensor"),
        # a cut tensor takes a place of the next launch, too: 1 + 35 there, then 1
        pytest.param([65536 * 320 + 1] + [1] * 35, 2, id="cut-tensor-and-35"),
        pytest.param([65536 * 320 + 1] + [1] * 36, 3, id="cut-tensor-and-36"),
        # both limits at once, in the middle of the last tensor: chunks end the launch, not tensors
        pytest.param([1] * 35 + [65536 * 286], 2, id="last-tensor-cut"),
    ],
)
def test_multi_tensor_apply(numels: list[int], launches: int) -> None:
    assert floors.applied(numels, 36, 320) == launches


def test_published_launches() -> None:
    """384 + 3 for Llama 3 8B in one group, published for torch 2.11 on an H200."""
    case = cases.Case("8b", cases._one(cases._llama(32, 4096, 1024, 14336, tied=False)))
    assert floors.torch_launches(case, floors.SMALL) == (384, 3)


def test_at_least_two_a_group() -> None:
    case = cases.CASES["465-groups"]
    assert floors.torch_launches(case, floors.LARGE)[1] == 465
    assert sum(floors.torch_launches(case, floors.LARGE)) >= 2 * 465


def test_groups_are_split_by_dtype() -> None:
    leaves = tuple(cases.Leaf((5,), dtype) for dtype in (torch.float32, torch.bfloat16) * 3)
    case = cases.Case("x", (cases.Group(leaves),))
    assert floors.torch_launches(case, floors.LARGE) == (2, 2)
    # norms 1 + 1 a dtype; then float32 in one launch, and each of three bf16 gradients in its own
    assert floors.clip_launches(case, floors.LARGE) == 4 + 1 + 3


def test_limits_are_those_of_the_installed_torch() -> None:
    header = Path(torch.__file__).parent / "include/ATen/native/cuda/MultiTensorApply.cuh"
    if not header.exists():
        pytest.skip("this torch came without its CUDA headers")
    text = header.read_text()

    def numbers(name: str) -> list[list[int]]:
        found = re.findall(rf"\b{name}\[5\]\s*=\s*\{{([\d,\s]*)\}}", text)
        return [[int(x) for x in one.split(",")] for one in found]

    known = [floors.LARGE, floors.SMALL][-len(numbers("depth_to_max_tensors")) :]
    for limits, tensors, chunks in zip(
        known, numbers("depth_to_max_tensors"), numbers("depth_to_max_blocks"), strict=True
    ):
        assert (tensors[0], tensors[3]) == (limits.tensors_of_1_list, limits.tensors_of_4_lists)
        assert chunks[0] == chunks[3] == limits.chunks
    assert f"kChunkSize = {floors.CHUNK};" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_cuda.py counts them there")
@pytest.mark.parametrize("clips", [False, True], ids=["plain", "clipping"])
def test_our_launches(monkeypatch: pytest.MonkeyPatch, clips: bool) -> None:
    from triton.runtime.interpreter import GridExecutor

    launches: list[object] = []
    launch = GridExecutor.__call__

    def count(self: Any, *arguments: Any, **options: Any) -> Any:
        launches.append(self)
        return launch(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", count)
    case = cases.TINY_CASES["tiny-mixed"]
    groups = cases.make(case, torch.device("cpu"))
    for group in groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    FusedAdamW(groups, backend="triton", max_grad_norm=1.0 if clips else None).step()
    assert len(launches) == (floors.OURS_WITH_CLIPPING if clips else floors.OURS)


@pytest.mark.parametrize("index", range(3), ids=lambda i: floors.FORMATS[i].name)
def test_bytes_are_those_of_the_kernels(index: int) -> None:
    fp32, bf16 = torch.float32, torch.bfloat16
    param, moments = [(fp32, fp32), (bf16, fp32), (bf16, bf16)][index]
    case = cases.Case("x", (cases.Group((cases.Leaf((1000,), param),)),))
    form = floors.FORMATS[index]
    assert 1000 * form.moved == cases.count_bytes(case, moments=moments)
    clips = cases.count_bytes(case, moments=moments, clips=True)
    assert 1000 * (form.moved + form.grad) == clips


def test_bytes_of_storage_formats_are_those_of_the_kernels() -> None:
    """26, 14.1 and 10.1 bytes a parameter, the latter two with their scales."""
    bf16, fp32, int8 = torch.bfloat16, torch.float32, torch.uint8
    signatures = [
        Signature(bf16, bf16, fp32, fp32, False, torch.int16),
        Signature(bf16, bf16, int8, int8, False, torch.int16),
        Signature(bf16, bf16, int8, int8, False),
    ]
    moved = [form.moved for form in floors.FORMATS[3:]]
    assert moved == [signature.bytes_per_element for signature in signatures]
    assert [round(x, 1) for x in moved] == [26, 14.1, 10.1]


def test_readme_holds_the_tables() -> None:
    """Or `python bench/floors.py` was forgotten, or someone wrote into them."""
    text = floors.README.read_text()
    assert floors.tabulate_formats() in text
    assert floors.tabulate_launches() in text
