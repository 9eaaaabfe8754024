"""At the end of training: the best weights become a system folder that evaluation and `llmslm generate` load."""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from llmslm import provenance
from llmslm.checkpoint import cast_to, save_system
from llmslm.consolidate import rebuild, save_frame
from llmslm.models.source import SYSTEM_FOLDER
from llmslm.models.trained import count_parameters
from llmslm.module import SystemModule
from llmslm.parallel import Fsdp
from llmslm.resume import CheckpointFiles


class SaveSystem(Callback):
    """Writes <default_root_dir>/system from the best checkpoint (the last weights where none was kept).

    Args:
        recipe: name of the recipe, for the card; the command line sets it.
        dtype: of the weights in the folder; in bfloat16 an LLM that will be frozen takes half the room. What is trained
            further is loaded in float32 all the same.
    """

    def __init__(self, recipe: str | None = None, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
        self.recipe, self.dtype = recipe, dtype

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what belongs to the weights, so that any checkpoint can become a system without the recipe."""
        module = cast(SystemModule, pl_module)
        if trainer.fast_dev_run or not trainer.is_global_zero or module.model is None or module.codec is None:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir)
        if trainer.ckpt_path is None and (folder / SYSTEM_FOLDER).is_dir():
            rank_zero_info(
                f"{folder / SYSTEM_FOLDER} is of an earlier run and will be replaced; --ckpt_path last goes on with "
                "that run, and another trainer.default_root_dir keeps it"
            )
        save_frame(folder, module.model, module.codec, self.card(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save once, on rank 0."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module = cast(SystemModule, pl_module)
        state = best_weights(trainer)
        if module.model is None or module.codec is None or not trainer.is_global_zero:
            return
        model = module.model
        if isinstance(trainer.strategy, Fsdp):
            model = rebuild(model.config, state)
            model.generation_config = module.model.generation_config
        else:
            module.load_state_dict(state, strict=False)
        with cast_to(model, getattr(torch, self.dtype)):
            save_system(Path(trainer.default_root_dir) / SYSTEM_FOLDER, model, module.codec, self.card(trainer))

    def card(self, trainer: Trainer) -> dict[str, Any]:
        """Say what the system is and how it came to be."""
        head, dirty = provenance.commit()
        module = cast(SystemModule, trainer.lightning_module)
        return {
            "system": module.system,
            "recipe": self.recipe,
            "seed": torch.initial_seed(),
            "dtype": self.dtype,
            "steps": trainer.global_step,
            "trained_parameters": None if module.model is None else count_parameters(module.model)["trained"],
            "commit": head,
            "dirty": dirty,
            "data": data_fingerprint(trainer),
            "versions": provenance.versions(),
        }


def best_weights(trainer: Trainer) -> dict[str, Tensor]:
    """Read the weights of the best checkpoint, or gather the last ones where there is none; all ranks take part."""
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if best and trainer.is_global_zero:
        weights: dict[str, Tensor] = CheckpointFiles().load_checkpoint(best, weights_only=True)["state_dict"]
        return weights
    if isinstance(trainer.strategy, Fsdp) and not best:
        return trainer.strategy.full_state_dict()
    return {}


def data_fingerprint(trainer: Trainer) -> str:
    """Return the content hash of the trainer's data source, "unknown" without a data module of ours."""
    source = getattr(getattr(trainer, "datamodule", None), "source", None)
    return source.fingerprint() if source is not None else "unknown"
