"""FusedAdamW: torch.optim.AdamW's contract in one Triton launch for every parameter."""

from .convert import convert_to_bf16_, convert_to_fp32_
from .optimizer import FusedAdamW
from .release import release_gradients

__all__ = ["FusedAdamW", "convert_to_bf16_", "convert_to_fp32_", "release_gradients"]
__version__ = "0.1.0"
