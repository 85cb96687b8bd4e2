"""Why weight decay is decoupled: README's small plot, made by the optimizer itself.

Weights start at 1 and see gradients that are pure noise, of three sizes; only the decay moves their
mean. In Adam with L2 the decay is part of the gradient, is divided by its size and averaged with
it: weights with large gradients hardly decay at all. Decoupled, all decay alike, as (1 - lr wd)^t.

    python bench/decoupling.py --out bench/results/decoupling.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch
from rich.progress import track

from fused_adamw import FusedAdamW

mpl.use("Agg")
import matplotlib.pyplot as plt

LR, WEIGHT_DECAY, STEPS = 1e-2, 0.1, 2000
NOISE = {0.01: "tab:green", 1.0: "tab:blue", 100.0: "tab:red"}  # size of the gradients


def mean_weights(decoupled: bool) -> dict[float, list[float]]:
    """Mean weight after each step, by size of the gradients."""
    torch.manual_seed(0)
    params = {noise: torch.nn.Parameter(torch.ones(10_000)) for noise in NOISE}
    optimizer = FusedAdamW(
        params.values(), lr=LR, weight_decay=WEIGHT_DECAY, decoupled_weight_decay=decoupled
    )
    means: dict[float, list[float]] = {noise: [] for noise in NOISE}
    for _ in track(range(STEPS), "decoupled" if decoupled else "L2", transient=True):
        for noise, p in params.items():
            p.grad = torch.randn_like(p) * noise
        optimizer.step()
        for noise, p in params.items():
            means[noise].append(p.detach().mean().item())
    return means


def main() -> None:
    """Draw both ways side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/decoupling.png"))
    out: Path = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True, layout="constrained")
    for axis, decoupled in zip(axes, (False, True), strict=True):
        for noise, means in mean_weights(decoupled).items():
            axis.plot(means, color=NOISE[noise], label=f"gradients of size {noise:g}", alpha=0.8)
        exact = [(1 - LR * WEIGHT_DECAY) ** t for t in range(1, STEPS + 1)]
        axis.plot(exact, "k:", label=r"$(1 - \mathrm{lr}\cdot\mathrm{wd})^t$")
        axis.set(title="decoupled (AdamW)" if decoupled else "L2 (Adam)", xlabel="step")
    axes[0].set_ylabel("mean weight")
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
