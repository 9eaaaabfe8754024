"""The progress bar of a training run."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

_INTERVAL_S = 0.5


class TrainingProgress(RichProgressBar):
    """Lightning's bar with the newest training loss, drawn twice a second.

    Lightning draws it after each batch, and asks for the loss each time, as it does for all that is logged with
    prog_bar: a device that is asked must have finished, and idles until it is given the next step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw if it is time, or there is no later batch."""
        now, ends = time.monotonic(), trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if ends or now - self._drawn > _INTERVAL_S:
            self._drawn = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Add the loss to what Lightning shows."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        loss = trainer.callback_metrics.get("train/loss")
        return metrics if loss is None else {"train/loss": loss.item()} | metrics
