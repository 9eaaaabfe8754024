"""`llmslm features`: a run that stops before its first step, when the frozen encoder's states are on disk."""

from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from llmslm.data import features
from llmslm.data.datamodule import TextDataModule
from llmslm.data.sources import Split
from llmslm.models.modeling import LlmToSlm
from llmslm.module import SystemModule

SPLITS: tuple[Split, ...] = ("train", "validation")


class Written(Exception):
    """All features are on disk: there is nothing to train."""


class WriteFeatures(Callback):
    """Encodes training and validation prompts into a feature cache; all ranks take part, each with its own shards.

    Args:
        folder: of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and stop the run.

        Raises:
            Written: always, at the end.
            UserError: if the folder holds the states of something else.
        """
        module = cast(SystemModule, pl_module)
        data = cast(TextDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        encoder = cast(LlmToSlm, module.model).encoder
        assert encoder is not None
        rows = {split: data.prompt_rows(split) for split in SPLITS}
        shards = {split: features.shards_of(encoder, lengths) for split, (_, lengths) in rows.items()}
        splits: dict[str, Any] = {
            split: data.feature_identity(split) | {"shards": len(shards[split])} for split in SPLITS
        }
        if trainer.is_global_zero:
            source, revision = module.encoder_source(), module.encoder_options.revision
            features.write_manifest(self.folder, encoder, source, revision, splits)
        trainer.strategy.barrier("manifest")
        dealt: dict[str, Any] = {"rank": trainer.global_rank, "world_size": trainer.world_size}
        with trainer.precision_plugin.forward_context():  # as in training
            for split in SPLITS:
                features.write_features(encoder, data.codec, rows[split][0], shards[split], self.folder, split, **dealt)
        trainer.strategy.barrier("features")
        raise Written
