"""From a training checkpoint of any kind to a system folder, on one CPU, without the recipe: `llmslm consolidate`."""

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel

from llmslm.checkpoint import CARD, SYSTEM_FOLDER, save_system, written_aside
from llmslm.data.codec import Codec
from llmslm.errors import UserError
from llmslm.models.configuration import LlmToSlmConfig
from llmslm.models.modeling import LlmToSlm
from llmslm.models.source import beside
from llmslm.resume import CheckpointFiles, resolve

FRAME = "frame"
"""In a run folder: its system folder without the weights, written when training begins."""


def save_frame(folder: Path, model: PreTrainedModel, codec: Codec, card: dict[str, Any]) -> None:
    """Write everything of a system folder but its weights."""
    save_system(folder / FRAME, _Frame(model), codec, card)


def consolidate(checkpoint: str | Path, output: str | Path | None = None) -> Path:
    """Turn a checkpoint, a file or the folder of a sharded run, into a system folder with one safetensors file.

    Args:
        checkpoint: in the `checkpoints` folder of a run, whose frame lies beside it.
        output: where to write; None takes the run's own system folder.

    Returns:
        The folder.

    Raises:
        UserError: if the checkpoint is broken, lacks weights, or has no frame.
    """
    path = Path(checkpoint)
    resolve(str(path), path.parent)
    run = path.resolve().parent.parent
    frame = run / FRAME
    if not (frame / CARD).is_file():
        raise UserError(f"{frame} is missing: consolidate takes a checkpoint in the checkpoints folder of a run")
    found = CheckpointFiles().load_checkpoint(path, weights_only=True)
    config = AutoConfig.from_pretrained(frame)
    if isinstance(config, LlmToSlmConfig) and config.encoder_source is not None:
        config.encoder_source = beside(config.encoder_source, frame)
    model = rebuild(config, found["state_dict"])
    folder = run / SYSTEM_FOLDER if output is None else Path(output)
    with written_aside(folder) as aside:
        shutil.copytree(frame, aside, dirs_exist_ok=True)
        model.generation_config = GenerationConfig.from_pretrained(frame)
        model.save_pretrained(aside)
        card = json.loads((aside / CARD).read_text(encoding="utf-8")) | {"steps": found["global_step"]}
        (aside / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return folder


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
    weights = {name.removeprefix("model."): value for name, value in state_dict.items()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise UserError(f"the checkpoint lacks the weights of {', '.join(missing[:3])}; it is of another system")
    return model


class _Frame:
    """A model of which only the configuration is saved."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def save_pretrained(self, folder: Path) -> None:
        config = copy.deepcopy(self._model.config)
        if isinstance(config, LlmToSlmConfig) and config.encoder_source and Path(config.encoder_source).exists():
            config.encoder_source = os.path.relpath(Path(config.encoder_source).resolve(), folder.resolve())
        config.save_pretrained(folder)
        self._model.generation_config.save_pretrained(folder)
