"""Language models by hub name, folder or config: the LLM and the slm on their own, as transformers builds them."""

import copy
import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmslm.errors import UserError
from llmslm.models.shortened import shortened
from llmslm.models.source import LOAD_ERRORS, pretrained_model, why_not
from llmslm.models.trained import Trained

_READ_ANYWAY = ("decoder_start_token_id",)
"""What an architecture reads of its config though its class has no field for it."""


@dataclass
class ModelSource:
    """Where a language model comes from: give `source`, or `config` for random weights."""

    source: str | None = None
    """Hub name, a folder in the hub's format, or a GGUF file (a path, or package:NAME)."""
    revision: str | None = None
    """Commit, tag or branch of the hub repository."""
    config: dict[str, Any] | None = None
    """A transformers config with its `model_type`; vocabulary and special ids come from the tokenizer."""
    layers: int | list[int] | None = None
    """Of the source, take some layers alone: so many at equal distances from the first to the last, or those of these
    numbers. Of an encoder-decoder they are the decoder's. An llm that is read as encoder is read whole."""
    train: Trained = "full"
    """What training changes: all ("full"), low-rank adapters (their settings: rank, alpha, dropout, dora,
    target_modules), or nothing, so that projector, fusion and alignment alone are trained."""

    def check(self, key: str) -> None:
        """Raise a UserError that names `key` unless exactly one of source and config is given, and layers fit them."""
        if (self.source is None) == (self.config is None):
            given = "neither" if self.source is None else "both"
            how = "" if self.source is None else f": --{key}.config null leaves out the recipe's"
            raise UserError(
                f"{key} has {given} of source and config; give exactly one of {key}.source and {key}.config{how}"
            )
        if self.layers is not None and (self.source is None or self.train != "full"):
            reason = "there is no source" if self.source is None else "the others are not trained"
            raise UserError(f"{key}.layers takes layers of {key}.source and trains them ({key}.train full); {reason}")


def load_config(model_source: ModelSource, tokenizer: PreTrainedTokenizerBase | None, key: str) -> PreTrainedConfig:
    """Return the transformers config that a model source names.

    Raises:
        UserError: if the source does not exist, or the config is not one that transformers knows.
    """
    model_source.check(key)
    if model_source.source is not None:
        try:
            place, file = pretrained_model(model_source.source)
            return _with_decoder_layers(AutoConfig.from_pretrained(place, revision=model_source.revision, **file))
        except LOAD_ERRORS as error:
            raise UserError(_not_loaded(model_source.source, key, error)) from error
    values = copy.deepcopy(model_source.config or {})
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise UserError(f"{key}.config has no model_type; name one of transformers, for example llama or t5")
    given = [*values]
    if tokenizer is not None:
        values.setdefault("vocab_size", len(tokenizer))
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            values.setdefault(name, getattr(tokenizer, name))
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.pad_token_id
        values.setdefault("decoder_start_token_id", start)
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{key}.config is not a valid {model_type!r} config: {' '.join(str(error).split())}") from error
    _check_keys(config, given, key)
    return _with_decoder_layers(config)


def _check_keys(config: PreTrainedConfig, given: Sequence[str], key: str) -> None:
    """Refuse a misspelt key, and warn of others that transformers has no use for: it keeps any, and says nothing.

    Raises:
        UserError: with the key that was probably meant.
    """
    known = {*type(config)().to_dict(), *config.attribute_map, *_READ_ANYWAY}
    for name in (name for name in config.to_dict() if name in given and name not in known):
        problem = f"{key}.config has {name}, which {type(config).__name__} does not know"
        if close := difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8):
            raise UserError(f"{problem}; did you mean {close[0]}?")
        warnings.warn(f"{problem}: it has no effect", UserWarning, stacklevel=3)


def _with_decoder_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """Say under the name that transformers looks for how many layers the decoder has.

    T5 calls them otherwise, and `generate` would make a cache of as many layers as the encoder has.
    """
    layers = getattr(config, "num_decoder_layers", None)
    if layers is not None and not hasattr(config, "decoder_layers"):
        config.decoder_layers = layers
    return config


def load_language_model(
    model_source: ModelSource, tokenizer: PreTrainedTokenizerBase | None, key: str, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load or build a language model with its head; encoder-decoder or decoder-only as its config says.

    Args:
        model_source: where it comes from.
        tokenizer: gives vocabulary size and special ids to a model built from a config.
        key: the recipe's key, for messages.
        dtype: of the weights; training keeps them in float32 and computes in the Trainer's precision.

    Raises:
        UserError: if there is no such model or its weights are missing.
    """
    config = load_config(model_source, tokenizer, key)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if model_source.source is None:
        return auto.from_config(config, dtype=dtype)
    known = {"config": config} if config.is_encoder_decoder else {}
    try:
        place, file = pretrained_model(model_source.source)
        model, info = auto.from_pretrained(
            place, revision=model_source.revision, dtype=dtype, output_loading_info=True, **known, **file
        )
    except LOAD_ERRORS as error:
        raise UserError(_not_loaded(model_source.source, key, error)) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{key}.source {model_source.source!r} lacks the weights of {', '.join(missing[:3])}")
    return model if model_source.layers is None else shortened(model, model_source.layers, key)


def _not_loaded(source: str, key: str, error: Exception) -> str:
    return (
        f"{key}.source {source!r} cannot be loaded: {why_not(source, error)}; "
        "expected a hub name or a folder with config.json and weights"
    )
