"""Parameter lists as optimizers meet them: shapes, dtypes and groups, for benchmarks and tests.

A case can be described without allocating anything: its tensors, elements, groups and bytes follow
from its shapes. `make` allocates the parameters, `gradients` the memory of their gradients.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adamw.kernels.table import Signature
from fused_adamw.storage import storage_of

Shape = tuple[int, ...]
Ki, Mi, Gi = 2**10, 2**20, 2**30


class Leaf(NamedTuple):
    """One parameter."""

    shape: Shape
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        """Elements; 1 for a 0-dim parameter."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Group:
    """One param group."""

    leaves: tuple[Leaf, ...]
    weight_decay: float = 0.1
    lr: float = 1e-4


@dataclass(frozen=True)
class Case:
    """Groups of parameters; `unaligned` ones are views of one buffer, one element off 16 bytes."""

    name: str
    groups: tuple[Group, ...]
    unaligned: bool = False

    @property
    def leaves(self) -> list[Leaf]:
        """All parameters, in the order of the groups."""
        return [leaf for group in self.groups for leaf in group.leaves]

    @property
    def tensors(self) -> int:
        """Number of parameters, as tensors."""
        return len(self.leaves)

    @property
    def numel(self) -> int:
        """Number of parameters, as elements."""
        return sum(leaf.numel for leaf in self.leaves)

    @property
    def formats(self) -> str:
        """Dtypes of the parameters, such as "bf16+fp32"."""
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return "+".join(sorted({names[leaf.dtype] for leaf in self.leaves}))


def signature(
    leaf: Leaf,
    *,
    grad: torch.dtype | None = None,
    moments: torch.dtype | None = None,
    options: Mapping[str, Any] | None = None,
) -> Signature:
    """How a parameter is stored: by FusedAdamW with these options, or with moments of that dtype.

    Gradients and moments have the parameter's dtype unless given otherwise.
    """
    group = {"amsgrad": False, **(options or {})}
    storage = storage_of(group, torch.empty(leaf.shape, dtype=leaf.dtype, device="meta"))
    return Signature(
        leaf.dtype,
        grad or leaf.dtype,
        moments or storage.exp_avg or leaf.dtype,
        moments or storage.exp_avg_sq or leaf.dtype,
        amsgrad=False,
        master=storage.master,
        stochastic=storage.stochastic,
    )


def count_bytes(case: Case, *, clips: bool = False, residue: int = 0, **stored: Any) -> int:
    """Bytes that a step must read and write: each stored value once, gradients twice if it clips.

    residue: bytes kept of what rounding takes off a 16-bit parameter, where that is no option of
    ours. stored: as for `signature`. 8-bit moments count with our scales, 1/64 byte each.
    """
    moved = 0.0
    for leaf, times in Counter(case.leaves).items():
        each = signature(leaf, **stored)
        kept = residue if leaf.dtype.itemsize == 2 else 0
        of_element = each.bytes_per_element + clips * each.grad.itemsize + 2 * kept
        moved += times * leaf.numel * of_element
    return round(moved)


def make(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Random parameters as param groups, ready for an optimizer's constructor."""
    if case.unaligned:
        values = _views(case.leaves, device, shift=1)
    else:
        values = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in case.leaves]
    params = iter([torch.nn.Parameter(value.normal_(std=0.02)) for value in values])
    return [
        {
            "params": [next(params) for _ in group.leaves],
            "lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for group in case.groups
    ]


def gradients(case: Case, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Uninitialised gradients, and the buffers they are views of, one a dtype.

    A few buffers are filled by a few kernels, where 10,000 tensors would take 10,000.
    """
    views = _views(case.leaves, device, shift=int(case.unaligned))
    buffers = {view.dtype: view._base for view in views}
    return views, [buffer for buffer in buffers.values() if buffer is not None]


def _views(leaves: Sequence[Leaf], device: torch.device, shift: int) -> list[Tensor]:
    """Contiguous views of one buffer a dtype, each `shift` elements behind a 512-byte boundary.

    512 bytes are what torch's CUDA allocator aligns to.
    """
    starts, ends = [], defaultdict[torch.dtype, int](int)
    for leaf in leaves:
        step = 512 // leaf.dtype.itemsize
        starts.append(ends[leaf.dtype] + shift)
        ends[leaf.dtype] = -(-(starts[-1] + leaf.numel) // step) * step
    buffers = {dtype: torch.empty(end, dtype=dtype, device=device) for dtype, end in ends.items()}
    return [
        buffers[leaf.dtype][start : start + leaf.numel].view(leaf.shape)
        for leaf, start in zip(leaves, starts, strict=True)
    ]


def _decayed(shapes: Iterable[Shape], dtype: torch.dtype = torch.float32) -> tuple[Group, ...]:
    """Matrices decay; norms and biases do not."""
    leaves = [Leaf(shape, dtype) for shape in shapes]
    return (
        Group(tuple(leaf for leaf in leaves if len(leaf.shape) >= 2)),
        Group(tuple(leaf for leaf in leaves if len(leaf.shape) < 2), weight_decay=0.0),
    )


def _one(shapes: Iterable[Shape], dtype: torch.dtype = torch.float32) -> tuple[Group, ...]:
    return (Group(tuple(Leaf(shape, dtype) for shape in shapes)),)


def _gpt2() -> list[Shape]:
    """GPT-2 124M: 12 layers, width 768, head tied to the embedding (openai/gpt-2, src/model.py)."""
    d = 768
    block: list[Shape] = [
        *[(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,)],  # norm, qkv, out
        *[(d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)],  # norm, MLP
    ]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


def _llama(
    layers: int, d: int, kv: int, ff: int, tied: bool, shards: int = 1, vocabulary: int = 128256
) -> list[Shape]:
    """Llama 3 (arXiv:2407.21783, table 3; meta-llama/Llama-3.2-1B, config.json).

    With `shards`, what one rank of FSDP2 holds: dim 0 cut evenly.
    """
    block: list[Shape] = [
        *[(d, d), (kv, d), (kv, d), (d, d)],  # q, k, v, out
        *[(ff, d), (ff, d), (d, ff), (d,), (d,)],  # gate, up, down, norms
    ]
    ends: list[Shape] = [(vocabulary, d)] * (1 if tied else 2)
    return [(s[0] // shards, *s[1:]) for s in [*ends, *block * layers, (d,)]]


def _resnet50() -> list[Shape]:
    """ResNet-50 (arXiv:1512.03385, table 1), with torchvision's batch norms after each conv."""

    def conv(out: int, channels: int, kernel: int) -> list[Shape]:
        return [(out, channels, kernel, kernel), (out,), (out,)]

    shapes, channels = conv(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(width, channels, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            if block == 0:  # the projection of the shortcut
                shapes += conv(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def _vit_block(d: int) -> list[Shape]:
    return [
        *[(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,)],  # norm, qkv, out
        *[(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)],  # norm, MLP
    ]


def _vit_b() -> list[Shape]:
    """ViT-B/16 at 224 pixels (arXiv:2010.11929, table 1; torchvision's vit_b_16)."""
    d = 768
    stem: list[Shape] = [(1, 1, d), (d, 3, 16, 16), (d,), (1, 197, d)]
    return [*stem, *_vit_block(d) * 12, (d,), (d,), (1000, d), (1000,)]


def _moe() -> list[Shape]:
    """A fine-grained mixture as DeepSeekMoE's (arXiv:2401.06066), small enough to be host-bound.

    13 layers of 252 routed and 2 shared experts, width 256, experts of 128: 10,000 tensors.
    """
    d, ff, routed, shared = 256, 128, 252, 2
    expert: list[Shape] = [(ff, d), (ff, d), (d, ff)]
    attention: list[Shape] = [(d, d), (d, d), (d, d), (d, d), (d,), (d,)]
    layer = [*attention, (routed, d), *expert * (routed + shared)]
    return [(32000, d), *layer * 13, (d,), (32000, d)]


def _vitdet() -> list[tuple[int, Shape]]:
    """ViTDet-L with a cascade of 3 box heads (arXiv:2203.16527): layer number and shape.

    449 tensors as in detectron2; a second mask head of 16 makes them 465.
    """
    d, c = 1024, 256
    window: list[Shape] = [(27, 64), (27, 64)]  # relative positions, width and height
    whole: list[Shape] = [(127, 64), (127, 64)]  # every 6th block attends to the whole image
    shapes: list[tuple[int, Shape]] = [(0, s) for s in [(1, 197, d), (d, 3, 16, 16), (d,)]]
    for block in range(24):
        relative = whole if block % 6 == 5 else window
        shapes += [(block + 1, s) for s in [*_vit_block(d), *relative]]

    def conv(channels: int, kernel: int) -> list[Shape]:  # without bias, then a norm
        return [(c, channels, kernel, kernel), (c,), (c,)]

    def up(channels: int) -> list[Shape]:
        return [(channels, channels // 2, 2, 2), (channels // 2,)]

    out3 = conv(c, 3)
    pyramid = [*up(d), (d // 2,), (d // 2,), *up(d // 2), *conv(d // 4, 1), *out3]
    pyramid += [*up(d), *conv(d // 2, 1), *out3, *(conv(d, 1) + out3) * 2]
    proposals: list[Shape] = [(c, c, 3, 3), (c,)] * 2 + [(3, c, 1, 1), (3,), (12, c, 1, 1), (12,)]
    box = [*out3 * 4, (1024, 49 * c), (1024,), (81, 1024), (81,), (4, 1024), (4,)]
    mask = [*out3 * 4, (c, c, 2, 2), (c,), (80, c, 1, 1), (80,)]
    return [*shapes, *((25, s) for s in [*pyramid, *proposals, *box * 3, *mask * 2])]


def _layerwise() -> tuple[Group, ...]:
    """One group a tensor, as mmengine makes them; lr falls by 0.8 a layer, as ViTDet-L's."""
    return tuple(
        Group((Leaf(shape),), 0.0 if len(shape) < 2 else 0.1, 1e-4 * 0.8 ** (25 - layer))
        for layer, shape in _vitdet()
    )


def _with_dtype(groups: tuple[Group, ...], dtype: torch.dtype, least_dims: int) -> list[Group]:
    """Groups whose parameters of at least that many dims have another dtype."""
    return [
        dataclasses.replace(
            group,
            leaves=tuple(
                Leaf(x.shape, dtype) if len(x.shape) >= least_dims else x for x in group.leaves
            ),
        )
        for group in groups
    ]


_BF16 = torch.bfloat16
_LLAMA_1B = _decayed(_llama(16, 2048, 512, 8192, tied=True))
# a scalar, a tail of 1 to 7 behind whole vectors, one block and one more, empty, a matrix
_TINY: list[Shape] = [(), (7,), (1025,), (0,), (33, 65), (128, 128)]

CASES = {
    case.name: case
    for case in (
        Case("gpt2", _decayed(_gpt2())),
        Case("gpt2-unaligned", _decayed(_gpt2()), unaligned=True),
        Case("resnet50", _decayed(_resnet50())),
        Case("vit-b", _decayed(_vit_b())),
        Case("llama-1b", _LLAMA_1B),
        Case("llama-1b-bf16", tuple(_with_dtype(_LLAMA_1B, _BF16, least_dims=0))),
        Case("llama-1b-mixed", tuple(_with_dtype(_LLAMA_1B, _BF16, least_dims=2))),
        Case("llama-8b-fsdp8", _decayed(_llama(32, 4096, 1024, 14336, tied=False, shards=8))),
        Case("moe-10000", _decayed(_moe())),
        Case("465-groups", _layerwise()),
        Case("10000x64", _one([(64,)] * 10000)),
        Case("200x1Mi", _one([(Mi,)] * 200)),
        Case("200x1Mi-bf16", _one([(Mi,)] * 200, _BF16)),
        Case("10x16Mi", _one([(16 * Mi,)] * 10)),
        Case("10x16Mi-bf16", _one([(16 * Mi,)] * 10, _BF16)),
        Case("1Gi", _one([(Gi,)])),
    )
}
# what CI runs: every format and path, no size
TINY_CASES = {
    case.name: case
    for case in (
        Case("tiny", _decayed(_TINY)),
        Case("tiny-mixed", tuple(_with_dtype(_decayed(_TINY), _BF16, 2)), unaligned=True),
    )
}
