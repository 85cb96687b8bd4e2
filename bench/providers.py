"""The optimizers that bench/step.py times: ours, torch's, and those of other packages."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fused_adamw import FusedAdamW

OURS, FUSED = "fused_adamw", "torch-fused"
LARGEST_ON_CPU = 150_000_000  # elements of the cases that a CPU runs unless they are named


class Provider(NamedTuple):
    """An optimizer to time."""

    build: Callable[..., torch.optim.Optimizer]
    moments: torch.dtype | None = None  # what each is stored in; None: as the parameter
    scratch: int = 0  # copies of all parameters that a step may need
    compiled: bool = False
    small: bool = False  # for cases of at most 500 tensors and 150M elements only


class External(NamedTuple):
    """An optimizer of another package."""

    module: str
    name: str
    options: dict[str, Any]
    moments: torch.dtype | None


ADAMW = torch.optim.AdamW
PROVIDERS = {
    OURS: Provider(FusedAdamW),
    FUSED: Provider(functools.partial(ADAMW, fused=True)),
    "torch-foreach": Provider(functools.partial(ADAMW, foreach=True), scratch=2),
    "torch-loop": Provider(functools.partial(ADAMW, foreach=False), scratch=1, small=True),
    "torch-compiled": Provider(
        functools.partial(ADAMW, foreach=True, capturable=True), compiled=True, small=True
    ),
}
OPT_IN = "torch-compiled"  # compiles for minutes
EXTERNALS = {
    "torchao-8bit": External("torchao.optim", "AdamW8bit", {}, torch.uint8),
    "bitsandbytes": External("bitsandbytes.optim", "AdamW", {}, torch.float32),
    "bitsandbytes-8bit": External("bitsandbytes.optim", "AdamW8bit", {}, torch.uint8),
    "apex": External("apex.optimizers", "FusedAdam", {"adam_w_mode": True}, torch.float32),
    "transformer-engine": External(
        "transformer_engine.pytorch.optimizers", "FusedAdam", {"adam_w_mode": True}, torch.float32
    ),
    "optimi": External("optimi", "AdamW", {}, None),
    "flashoptim": External("flashoptim", "FlashAdamW", {}, torch.uint8),
}


def find_providers(
    names: Sequence[str] | None, cuda: bool
) -> tuple[dict[str, Provider], dict[str, str]]:
    """Providers that can be imported, in the order of the names, and why the others cannot."""
    wanted = names or [name for name in (*PROVIDERS, *EXTERNALS) if name != OPT_IN]
    found: dict[str, Provider] = {}
    missing: dict[str, str] = {}
    for name in wanted:
        if name in PROVIDERS:
            if PROVIDERS[name].compiled and not cuda:
                missing[name] = "on CUDA only"
            else:
                found[name] = PROVIDERS[name]
            continue
        external = EXTERNALS[name]
        try:
            build = getattr(importlib.import_module(external.module), external.name)
        except Exception as error:  # a broken native library raises whatever it likes
            no_such = isinstance(error, ModuleNotFoundError)
            missing[name] = "not installed" if no_such else f"{type(error).__name__}: {error}"
            continue
        found[name] = Provider(
            functools.partial(build, **external.options), moments=external.moments, scratch=1
        )
    return found, missing
