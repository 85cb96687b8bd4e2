"""FusedAdamW: torch.optim.AdamW's contract in one Triton launch for every parameter."""

from .convert import convert_to_bf16_
from .optimizer import FusedAdamW

__all__ = ["FusedAdamW", "convert_to_bf16_"]
__version__ = "0.1.0"
