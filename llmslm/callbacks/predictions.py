"""Predictions as JSON lines: `llmslm predict` writes them as they come, one file a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning_utilities.core.rank_zero import rank_zero_info

FILE = "predictions.jsonl"


class WritePredictions(BasePredictionWriter):
    """Appends id, prompt, reference and prediction of each example to <default_root_dir>/predictions.jsonl.

    With several ranks each writes its own file, predictions.<rank>.jsonl.
    """

    def __init__(self) -> None:
        super().__init__("batch")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self.path(trainer).parent.mkdir(parents=True, exist_ok=True)
        self.path(trainer).write_text("", encoding="utf-8")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch."""
        with self.path(trainer).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where they are."""
        rank_zero_info(f"predictions: {self.path(trainer)}")

    def path(self, trainer: Trainer) -> Path:
        """The file of this rank."""
        name = FILE if trainer.world_size == 1 else f"predictions.{trainer.global_rank}.jsonl"
        return Path(trainer.default_root_dir) / name
