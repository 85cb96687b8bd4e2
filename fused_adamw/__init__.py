"""FusedAdamW: torch.optim.AdamW's contract in one Triton launch for every parameter."""

from .optimizer import FusedAdamW

__all__ = ["FusedAdamW"]
__version__ = "0.1.0"
