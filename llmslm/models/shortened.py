"""A small model from some of a large model's layers: an slm that knows what the LLM knows before it is trained.

A student that begins with layers of its teacher learns from little data what a random one does not: DistilBERT (Sanh et
al., arXiv 1910.01108) takes every other layer, "shrink and fine-tune" (Shleifer & Rush, arXiv 2010.13002) layers at
equal distances.
"""

import copy
import re
from collections.abc import Sequence

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from llmslm.errors import UserError
from llmslm.models.blocks import blocks

_COUNTS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")


def shortened_config(config: PreTrainedConfig, layers: int | Sequence[int], key: str) -> PreTrainedConfig:
    """Return the config of a model that has some of another one's layers; of an encoder-decoder, decoder layers.

    Args:
        config: of the whole model.
        layers: their numbers, from 0; or how many, at equal distances from the first to the last.
        key: the recipe's key, for messages.

    Raises:
        UserError: if the model does not have these layers, or keeps their number elsewhere.
    """
    count = _count(config, key)
    chosen = _chosen(count, layers, key)
    short = copy.deepcopy(config)
    for name in _names(config):
        setattr(short, name, len(chosen))
    if not config.is_encoder_decoder:  # what is said of each layer, as the kinds of their attention
        for name, value in vars(config).items():
            if isinstance(value, list) and len(value) == count:
                setattr(short, name, [value[number] for number in chosen])
    return short


def shortened(model: PreTrainedModel, layers: int | Sequence[int], key: str) -> PreTrainedModel:
    """Return a model with some of another one's layers and all of its other weights, in the same dtype.

    Args:
        model: decoder-only or encoder-decoder, whose encoder stays whole.
        layers: see `shortened_config`.
        key: the recipe's key, for messages.

    Raises:
        UserError: if the model does not have these layers, or cannot do without the others.
    """
    chosen = _chosen(_count(model.config, key), layers, key)
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    short: PreTrainedModel = auto.from_config(shortened_config(model.config, layers, key), dtype=model.dtype)
    stack = _stack(model)
    place = re.compile(rf"{re.escape(stack)}\.(\d+)\.")
    weights = {}
    for name, weight in model.state_dict().items():
        number = place.match(name)
        if number is None:
            weights[name] = weight
        elif (old := int(number[1])) in chosen:
            weights[f"{stack}.{chosen.index(old)}.{name[number.end() :]}"] = weight
    if lacking := sorted(set(short.state_dict()) - set(weights)):
        raise UserError(f"{key}.layers leaves out a layer that others need ({lacking[0]}); add layer 0")
    short.load_state_dict(weights)
    short.generation_config = copy.deepcopy(model.generation_config)
    return short


def _count(config: PreTrainedConfig, key: str) -> int:
    if not (names := _names(config)):  # it is put together of other models' configs
        raise UserError(f"{key}.layers cannot take layers of a {config.model_type}, whose config does not number them")
    return int(getattr(config, names[0]))


def _names(config: PreTrainedConfig) -> list[str]:
    wanted = _COUNTS[:2] if config.is_encoder_decoder else _COUNTS[2:]
    return [name for name in wanted if hasattr(config, name)]


def _chosen(count: int, layers: int | Sequence[int], key: str) -> list[int]:
    if isinstance(layers, int):
        if not 1 <= layers <= count:
            raise UserError(f"{key}.layers is {layers}; expected 1 to {count}, the layers of the model")
        return [round(number * (count - 1) / max(1, layers - 1)) for number in range(layers)]
    chosen = list(layers)
    if not chosen or sorted(set(chosen)) != chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise UserError(f"{key}.layers is {chosen}; expected numbers in ascending order from 0 to {count - 1}")
    return chosen


def _stack(model: PreTrainedModel) -> str:
    """Name the list of layers that `generate` runs for each token."""
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model
    found = {id(block) for block in blocks(decoder)}
    return next(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and all(id(child) in found for child in module) and len(module)
    )
