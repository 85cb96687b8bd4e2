"""A stream capture, played: nothing here can record one without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fused_adamw import FusedAdamW, launch, optimizer, telemetry


class Recording:
    """Plays a stream capture: launches run at once, and can be replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def __enter__(self) -> None:
        for module in (launch, optimizer, telemetry):
            self._patch.setattr(module, "is_capturing", lambda device: True)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def refused_until_a_step(
    adamw: FusedAdamW, params: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """A capture is refused with these words and changes nothing; after an eager step it is not."""
    before = [p.detach().clone() for p in params]
    with Recording(monkeypatch), pytest.raises(RuntimeError, match=words):
        adamw.step()
    assert all(map(torch.equal, params, before))
    adamw.step()
    with Recording(monkeypatch):
        adamw.step()
