"""From a training checkpoint of any kind to a system folder, on one CPU, without the recipe: `llmslm consolidate`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from llmslm.checkpoint import CARD, cast_to, save_system, written_aside
from llmslm.data.codec import Codec
from llmslm.errors import UserError
from llmslm.models.configuration import LlmToSlmConfig
from llmslm.models.language_model import ModelSource, load_config
from llmslm.models.modeling import LlmToSlm
from llmslm.models.source import SYSTEM_FOLDER, seen_from
from llmslm.models.trained import base_names, freeze, moved, save_adapters, with_tied
from llmslm.resume import CheckpointFiles, fault

FRAME = "frame"
"""In a run folder: its system folder without the weights, written when training begins."""


def save_frame(folder: Path, model: PreTrainedModel, codec: Codec, card: dict[str, Any]) -> None:
    """Write everything of a system folder but its weights."""
    save_system(folder / FRAME, model, codec, card, weights=False)


def consolidate(checkpoint: str | Path, output: str | Path | None = None) -> Path:
    """Turn a checkpoint, a file or the folder of a sharded run, into a system folder with one safetensors file.

    Args:
        checkpoint: in the `checkpoints` folder of a run, whose frame lies beside it.
        output: where to write; None takes the run's own system folder.

    Returns:
        The folder.

    Raises:
        UserError: if the checkpoint is broken, lacks weights, or has no frame; or if something else than a system is
            where to write, which would be gone.
    """
    path = Path(checkpoint)
    if output is not None and not _may_be_replaced(Path(output)):
        raise UserError(f"{output} is there and is no system; give a folder that is new, empty or a system (--output)")
    if problem := fault(path) if path.exists() else "it is not there":
        raise UserError(
            f"the checkpoint {path} cannot be used: {problem}; give a file or folder in the checkpoints folder of a "
            "run (--checkpoint)"
        )
    run = path.resolve().parent.parent
    frame = run / FRAME
    if not (frame / CARD).is_file():
        raise UserError(f"{frame} is missing: consolidate takes a checkpoint in the checkpoints folder of a run")
    found = CheckpointFiles().load_checkpoint(path, weights_only=True)
    card = json.loads((frame / CARD).read_text(encoding="utf-8"))
    model = rebuild(_config(frame, card), found["state_dict"])
    folder = run / SYSTEM_FOLDER if output is None else Path(output)
    dtype = getattr(torch, card.get("dtype", "float32"))  # frames of earlier versions do not say it
    with cast_to(model, dtype), written_aside(folder) as aside:
        shutil.copytree(frame, aside, dirs_exist_ok=True)
        model.generation_config = GenerationConfig.from_pretrained(frame)
        if "frozen_base" in card:
            card["frozen_base"]["source"] = seen_from(model.config.frozen_base["source"], aside)
            save_adapters(model, aside)
        else:
            model.save_pretrained(aside)
        text = json.dumps(card | {"steps": found["global_step"]}, indent=2)
        (aside / CARD).write_text(text + "\n", encoding="utf-8")
    return folder


def _may_be_replaced(folder: Path) -> bool:
    if not folder.exists():
        return True
    return folder.is_dir() and ((folder / CARD).is_file() or not any(folder.iterdir()))


def rebuild(config: Any, state_dict: Mapping[str, Tensor]) -> PreTrainedModel:
    """Build a model around whole weights, by name in the LightningModule; a frozen encoder is left out.

    Raises:
        UserError: if weights are missing.
    """
    with torch.device("meta"):
        if isinstance(config, LlmToSlmConfig):
            model: PreTrainedModel = LlmToSlm(config)
        else:
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model = auto.from_config(config)
            freeze(model)
    weights = {name.removeprefix("model."): value for name, value in state_dict.items()}
    model.load_state_dict(with_tied(weights, model), strict=False, assign=True)
    model.tie_weights()
    brought = base_names(model)
    if missing := [name for name, weight in model.named_parameters() if weight.is_meta and name not in brought]:
        raise UserError(f"the checkpoint lacks the weights of {', '.join(missing[:3])}; it is of another system")
    return model


def _config(frame: Path, card: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of a frame's model, with its sources as they are found from here."""
    if "frozen_base" in card:
        base = moved(card["frozen_base"], frame)
        config = load_config(ModelSource(base["source"], base["revision"]), None, f"{frame / CARD}: frozen_base")
        config.frozen_base = base
        return config
    config = AutoConfig.from_pretrained(frame)
    if isinstance(config, LlmToSlmConfig):
        config.resolve(frame)
    return config
