"""FusedAdamW: torch.optim.AdamW's contract in one Triton launch for every parameter."""

from .optimizer import FusedAdamW
from .release import release_gradients

__all__ = ["FusedAdamW", "release_gradients"]
__version__ = "0.1.0"
