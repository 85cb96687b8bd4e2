"""The optimizers that bench/step.py times: ours, torch's, and those of other packages."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fused_adamw import FusedAdamW

OURS, FUSED, CLIP = "fused_adamw", "torch-fused", "+clip"
MAX_GRAD_NORM = 1.0  # far below the norm of the cases' gradients: what is read is multiplied, too
# Norms are one more read of the gradients, so a few cases tell: a small model, 1B parameters in
# both formats, many tensors.
CLIP_CASES = ("gpt2", "llama-1b", "llama-1b-bf16", "moe-10000", "tiny", "tiny-mixed")
# Storage formats, by what is put behind our name: FusedAdamW's options, and cases that tell.
FORMATS: dict[str, tuple[dict[str, Any], Sequence[str]]] = {
    "+sr": ({"stochastic_rounding": True}, ("llama-1b-bf16", "tiny-mixed")),
    "+master": (
        {"master_weights": True, "state_dtype": torch.float32},
        ("llama-1b-bf16", "tiny-mixed"),
    ),
    "+master+int8": (
        {"master_weights": True, "state_dtype": "int8"},
        ("llama-1b-bf16", "tiny-mixed"),
    ),
    "+int8": ({"state_dtype": "int8"}, ("llama-1b", "llama-1b-bf16", "tiny-mixed")),
}
LARGEST_ON_CPU = 150_000_000  # elements of the cases that a CPU runs unless they are named


class Provider(NamedTuple):
    """An optimizer to time."""

    build: Callable[..., torch.optim.Optimizer]
    moments: torch.dtype | None = None  # what each is stored in; None: as the parameter
    options: Mapping[str, Any] | None = None  # FusedAdamW's storage options
    residue: int = 0  # bytes kept of what rounding takes off a 16-bit parameter
    scratch: int = 0  # copies of all parameters that a step may need
    compiled: bool = False
    small: bool = False  # for cases of at most 500 tensors and 150M elements only
    cases: Sequence[str] | None = None  # unless the provider is named; None: all
    clips: bool = False
    step: Callable[[torch.optim.Optimizer], object] | None = None  # if not optimizer.step

    @property
    def stored(self) -> dict[str, Any]:
        """How it stores, as `count_bytes` takes it."""
        return {"moments": self.moments, "options": self.options, "residue": self.residue}


class External(NamedTuple):
    """An optimizer of another package."""

    module: str
    name: str
    options: dict[str, Any]
    moments: torch.dtype | None
    residue: int = 0


def clip_and_step(optimizer: torch.optim.Optimizer) -> None:
    """torch's clipping before torch's step, as training loops have it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
    optimizer.step()


ADAMW = torch.optim.AdamW
PROVIDERS = {
    OURS: Provider(FusedAdamW),
    FUSED: Provider(functools.partial(ADAMW, fused=True)),
    "torch-foreach": Provider(functools.partial(ADAMW, foreach=True), scratch=2),
    "torch-loop": Provider(functools.partial(ADAMW, foreach=False), scratch=1, small=True),
    "torch-compiled": Provider(
        functools.partial(ADAMW, foreach=True, capturable=True), compiled=True, small=True
    ),
    OURS + CLIP: Provider(
        functools.partial(FusedAdamW, max_grad_norm=MAX_GRAD_NORM), cases=CLIP_CASES, clips=True
    ),
    FUSED + CLIP: Provider(
        functools.partial(ADAMW, fused=True), cases=CLIP_CASES, clips=True, step=clip_and_step
    ),
    **{
        OURS + name: Provider(
            functools.partial(FusedAdamW, **options), options=options, cases=cases
        )
        for name, (options, cases) in FORMATS.items()
    },
}
OPT_IN = "torch-compiled"
EXTERNALS = {
    "torchao-8bit": External("torchao.optim", "AdamW8bit", {}, torch.uint8),
    "bitsandbytes": External("bitsandbytes.optim", "AdamW", {}, torch.float32),
    "bitsandbytes-8bit": External("bitsandbytes.optim", "AdamW8bit", {}, torch.uint8),
    "apex": External("apex.optimizers", "FusedAdam", {"adam_w_mode": True}, torch.float32),
    "transformer-engine": External(
        "transformer_engine.pytorch.optimizers", "FusedAdam", {"adam_w_mode": True}, torch.float32
    ),
    "optimi": External("optimi", "AdamW", {"lr": 1e-3}, None, residue=2),  # Kahan's
    "flashoptim": External("flashoptim", "FlashAdamW", {}, torch.uint8, residue=1),
}


def find_providers(
    names: Sequence[str] | None, cuda: bool
) -> tuple[dict[str, Provider], dict[str, str]]:
    """Providers that can be imported, in the order of the names, and why the others cannot."""
    wanted = names or [name for name in (*PROVIDERS, *EXTERNALS) if name != OPT_IN]
    found: dict[str, Provider] = {}
    missing = {} if names else {OPT_IN: "compiles for minutes: to be named"}
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
            functools.partial(build, **external.options),
            moments=external.moments,
            residue=external.residue,
            scratch=1,
        )
    return found, missing


def entering(
    providers: dict[str, Provider], case: str, named: Sequence[str] | None
) -> dict[str, Provider]:
    """Those that run on a case: of the ones not named, some have a few cases only."""
    return {
        name: provider
        for name, provider in providers.items()
        if provider.cases is None or case in provider.cases or name in (named or ())
    }


def rival(provider: str) -> str:
    """Whom a provider is compared with: torch's fused AdamW, which clips if the provider does."""
    return FUSED + CLIP if CLIP in provider else FUSED
