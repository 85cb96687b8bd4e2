"""Trainers that wrap an optimizer, with torch's AdamW and with ours in its place.

Transformers, Accelerate and Lightning are no dependencies: what is not installed is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from fused_adamw import FusedAdamW

pytestmark = pytest.mark.filterwarnings("default")  # theirs are no errors of ours
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}
Maker = Callable[..., torch.optim.Optimizer]


class Regression(nn.Module):
    """Two layers; the loss is of its forward, as Transformers wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of a batch."""
        return {"loss": nn.functional.mse_loss(self.layers(x), labels)}


def examples(count: int = 64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 8, generator=generator)
    return [{"x": x, "labels": x.sum(0, keepdim=True).sin()} for x in inputs]


def assert_alike(ours: nn.Module, theirs: nn.Module, mixed: bool = False) -> None:
    """Equal but for rounding, after some steps of training; in mixed precision forward's, too."""
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if mixed else {"rtol": 1e-4, "atol": 1e-6}
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize("saver", [torch.optim.AdamW, FusedAdamW])
def test_transformers(device: torch.device, tmp_path: Path, saver: Maker) -> None:
    """Accumulation, clipping, a schedule; then resumed from a checkpoint, torch's as well."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def train(maker: Maker, folder: str, resume: str | None = None) -> nn.Module:
        model = Regression()
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path / folder,
            max_steps=8,
            save_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            lr_scheduler_type="cosine",
            use_cpu=device.type == "cpu",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=examples(),
            optimizer_cls_and_kwargs=(maker, OPTIONS),
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    straight = train(saver, "straight")
    assert_alike(train(FusedAdamW, "ours"), straight)
    resumed = train(FusedAdamW, "resumed", str(tmp_path / "straight" / "checkpoint-4"))
    assert_alike(resumed, straight)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_accelerate(device: torch.device, tmp_path: Path, precision: str) -> None:
    """Mixed precision, accumulation, clipping, and states that are saved and loaded."""
    accelerate = pytest.importorskip("accelerate")
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("Accelerate's float16 wants a GPU")

    def train(maker: Maker) -> nn.Module:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(
            cpu=device.type == "cpu", mixed_precision=precision, gradient_accumulation_steps=2
        )
        model = Regression()
        model, optimizer, batches = accelerator.prepare(
            model, maker(model.parameters(), **OPTIONS), DataLoader(examples(), batch_size=4)
        )
        for number, batch in enumerate(batches):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            if number == 7:
                accelerator.save_state(str(tmp_path / maker.__name__))
                accelerator.load_state(str(tmp_path / maker.__name__))
        return accelerator.unwrap_model(model)  # type: ignore[no-any-return]

    assert_alike(train(FusedAdamW), train(torch.optim.AdamW), mixed=precision != "no")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_lightning(device: torch.device, tmp_path: Path, precision: str) -> None:
    """Clipping, for which it refuses what unscales by itself, and a schedule; saved and resumed."""
    lightning = pytest.importorskip("lightning")
    if precision == "16-mixed" and device.type == "cpu":
        pytest.skip("Lightning's float16 wants a GPU")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, maker: Maker, **options: Any) -> None:
            super().__init__()
            self.model, self.maker, self.options = Regression(), maker, options

        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            loss: Tensor = self.model(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = self.maker(self.parameters(), **OPTIONS, **self.options)
            return [optimizer], [
                {"scheduler": OneCycleLR(optimizer, 1e-2, total_steps=40), "interval": "step"}
            ]

    def train(module: Any, steps: int, start: Path | None = None) -> Any:
        trainer = lightning.Trainer(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=1,
            precision=precision,
            max_steps=steps,
            gradient_clip_val=0.5,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, DataLoader(examples(), batch_size=4), ckpt_path=start)
        return trainer

    ours, theirs = Module(FusedAdamW, fused=False), Module(torch.optim.AdamW, foreach=False)
    for module in (ours, theirs):
        checkpoint = tmp_path / f"{module.maker.__name__}.ckpt"
        train(module, 6).save_checkpoint(checkpoint)
        train(module, 12, checkpoint)
    assert_alike(ours, theirs, mixed=precision != "32-true")
    if precision == "16-mixed":
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            train(Module(FusedAdamW), 1)
