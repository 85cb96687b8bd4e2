"""The 8-bit maps that were tried for the moments, and what each does to the update.

    python bench/maps.py                         # the table of fused_adamw/formats.py
    python bench/maps.py --size tiny --steps 20  # seconds

train.py's small model is trained in float32; every map keeps one moment of its own in 8 bits, fed
by the same gradients, and the other moment is float64. Shown is the error of the update, relative,
in the 2-norm over all parameters, against float64 moments. beta2 is 0.999, where second moments
move least in a step and so depend most on how they are rounded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from train import CLIP, GPT, SIZES, Text, Training, machine

from fused_adamw import FusedAdamW, formats
from fused_adamw.kernels.table import QUANT_BLOCK

BETAS, EPS = (0.9, 0.999), 1e-8
Store = Callable[[Tensor], Tensor]  # a moment, float32 [n], as what is read back of it


def logarithmic(binades: int, codes: int) -> Tensor:
    """Levels in [0, 2): so many codes in each binade from a floor up, linear below the floor."""
    floor = 2.0 ** (1 - binades)
    code = torch.arange(binades * codes)
    steps = 1 + (code % codes) / codes
    return floor * steps * 2.0 ** (code // codes) - floor


def power(codes: int, exponent: int) -> Tensor:
    """Levels in [0, 1], equally spaced in their root of that degree."""
    return (torch.arange(codes) / (codes - 1)) ** exponent


def hyperbolic(codes: int) -> Tensor:
    """Levels in [0, 1] that 2y / (1 + y) makes equally spaced."""
    z = torch.arange(codes) / (codes - 1)
    return z / (2 - z)


def quantised(levels: Tensor, stochastic: bool, block: int = QUANT_BLOCK) -> Store:
    """Round to levels times a factor of each block, which makes its largest fit.

    The factor is a power of two if the levels go beyond 1, else the largest itself. Where zero is
    the only level below, second moments must not fall to it: they are those without a sign.
    """
    middles = (levels[1:] + levels[:-1]) / 2
    gaps = torch.cat([levels.diff(), levels.new_ones(1)])
    signed = len(levels) == 128

    def store(x: Tensor) -> Tensor:
        blocks = x.view(-1, block)
        largest = blocks.abs().amax(1, keepdim=True)
        scale = largest if levels[-1] <= 1 else 2.0 ** largest.log2().floor()
        y = (blocks.abs() / scale).nan_to_num_(0.0)
        if stochastic:
            code = torch.bucketize(y, levels, right=True) - 1
            code += torch.rand_like(y) < (y - levels[code]) / gaps[code]
            code.clamp_(max=len(levels) - 1)
        else:
            code = torch.bucketize(y, middles)
        if not signed:
            code = torch.maximum(code, (y > 0).long())
        return torch.where(scale > 0, levels[code] * scale, 0.0).copysign(blocks).view(-1)

    return store


def shipped_signed(x: Tensor) -> Tensor:
    """What FusedAdamW keeps of first moments."""
    return formats.decode_signed(*formats.encode_signed(x))


def shipped_unsigned(x: Tensor) -> Tensor:
    """What FusedAdamW keeps of second moments."""
    random = torch.randint(2**32, x.shape)
    return formats.decode_unsigned(*formats.encode_unsigned(x, random))


def bf16(x: Tensor, stochastic: bool) -> Tensor:
    """16 bits, to compare with."""
    if not stochastic:
        return x.bfloat16().float()
    return formats.round_stochastic(x, torch.randint(2**32, x.shape)).float()


@dataclass(frozen=True)
class Map:
    """One way to keep a moment, rounded to nearest and stochastically; None where not tried."""

    name: str
    nearest: Store | None
    stochastic: Store | None


def _both(name: str, levels: Tensor, block: int = QUANT_BLOCK) -> Map:
    return Map(name, quantised(levels, False, block), quantised(levels, True, block))


def maps(first: bool) -> list[Map]:
    """Maps tried for first or second moments, the shipped one first."""
    if first:
        return [
            Map("as shipped", shipped_signed, None),
            _both("4 binades of 32", logarithmic(4, 32)),
            _both("the same, blocks of 32", logarithmic(4, 32), 32),
            _both("the same, blocks of 256", logarithmic(4, 32), 256),
            _both("8 binades of 16", logarithmic(8, 16)),
            _both("linear, by the largest", power(128, 1)),
            _both("2y / (1 + y), by the largest", hyperbolic(128)),
        ]
    return [
        Map("as shipped", None, shipped_unsigned),
        _both("16 binades of 16", logarithmic(16, 16)),
        _both("the same, blocks of 32", logarithmic(16, 16), 32),
        _both("the same, blocks of 256", logarithmic(16, 16), 256),
        _both("8 binades of 32", logarithmic(8, 32)),
        _both("32 binades of 8", logarithmic(32, 8)),
        _both("linear in the root", power(256, 2)),
        _both("linear in the fourth root", power(256, 4)),
        Map("bfloat16", partial(bf16, stochastic=False), partial(bf16, stochastic=True)),
    ]


class Study:
    """All maps side by side on one stream of gradients."""

    def __init__(self, numel: int) -> None:
        self.exact = (
            torch.zeros(numel, dtype=torch.float64),
            torch.zeros(numel, dtype=torch.float64),
        )
        self.step = 0
        self.kept: dict[tuple[bool, str, bool], tuple[Store, Tensor]] = {}
        for first in (True, False):
            for kind in maps(first):
                for stochastic, store in ((False, kind.nearest), (True, kind.stochastic)):
                    if store is not None:
                        self.kept[first, kind.name, stochastic] = store, torch.zeros(numel)

    def feed(self, g: Tensor) -> None:
        """One step. g: float32 [numel]."""
        self.step += 1
        m, v = self.exact
        m.lerp_(g.double(), 1 - BETAS[0])
        v.lerp_(g.double().square_(), 1 - BETAS[1])
        squared = g.square()
        for key, (store, x) in self.kept.items():
            first = key[0]
            x.lerp_(g if first else squared, 1 - BETAS[not first])
            self.kept[key] = store, store(x)

    def update(self, m: Tensor, v: Tensor) -> Tensor:
        first, second = (1 - beta**self.step for beta in BETAS)
        return m / first / ((v / second).sqrt_().add_(EPS))

    def errors(self) -> dict[tuple[bool, str, bool], float]:
        """Relative error of the update with each map, now."""
        m, v = self.exact
        exact = self.update(m, v)
        errors = {}
        for key, (_, x) in self.kept.items():
            own = self.update(x.double(), v) if key[0] else self.update(m, x.double())
            errors[key] = float((own - exact).norm() / exact.norm())
        return errors


def line(gradients: Sequence[Tensor], block: int) -> Tensor:
    """All gradients behind each other, each filled up to whole blocks with zeros."""
    flat = [g.reshape(-1) for g in gradients]
    return torch.cat([torch.nn.functional.pad(g, (0, -len(g) % block)) for g in flat])


def tabulate(found: dict[int, dict[tuple[bool, str, bool], float]]) -> Table:
    """Errors by map, in percent, after each number of steps."""
    after = ", ".join(map(str, found))
    table = Table(
        "map", f"nearest, after {after}", f"stochastic, after {after} steps", box=box.SIMPLE_HEAD
    )
    for first, head in ((True, "first moments"), (False, "second moments")):
        table.add_row(head)
        for kind in maps(first):
            row = [f"  {kind.name}"]
            for stochastic in (False, True):
                errors = [e.get((first, kind.name, stochastic)) for e in found.values()]
                row.append(", ".join(f"{100 * e:.2g}" for e in errors if e is not None))
            table.add_row(*row)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    args = parser.parse_args(argv)
    size, device = SIZES[args.size], torch.device("cpu")
    console = Console(highlight=False)
    console.print(" | ".join(f"{fact} {value}" for fact, value in machine(device).items()))
    torch.manual_seed(0)
    text = Text(size, args.steps, device)
    make = partial(FusedAdamW, max_grad_norm=CLIP)
    training = Training(GPT(size), make, size, args.steps, device, max_norm=None, betas=BETAS)
    block = 256  # the largest that is tried
    study = Study(sum(p.numel() + -p.numel() % block for p in training.model.parameters()))
    # before the update: `step` drops the gradients after it
    params = list(training.model.parameters())
    training.optimizer.register_step_pre_hook(
        lambda *_: study.feed(line([p.grad for p in params if p.grad is not None], block))
    )
    shown = {args.steps // 10, args.steps // 4, args.steps // 2, args.steps}
    found = {}
    for step in track(range(args.steps), "steps", console=console):
        training.step(text.batch(step))
        if step + 1 in shown:
            found[step + 1] = study.errors()
    console.print("Relative error of the update, %", tabulate(found), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
