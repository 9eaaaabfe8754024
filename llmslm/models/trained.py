"""What of a language model is trained: all of it, nothing, or low-rank adapters on a frozen base.

A frozen base stays as its source gave it, so it is not saved: a system names it by source and content hash, as it does
the encoder. In memory the name is `frozen_base` of the model's config.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmslm.errors import UserError
from llmslm.models.encoder import weights_hash
from llmslm.models.source import beside

ADAPTERS = "adapter_model.safetensors"
"""peft's file of the adapters of a language model."""
_PREFIX = "base_model.model."
_MARK = ".lora_"
"""What peft's names of adapters have in them."""


@dataclass
class Lora:
    """Low-rank adapters: LoRA (arXiv 2106.09685), or DoRA (arXiv 2402.09353)."""

    rank: int = 16
    """Columns of the matrices whose product is added to a layer's weights."""
    alpha: int = 32
    """The product is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that become 0 in training."""
    dora: bool = False
    """Train the size of each weight's rows apart from their direction (DoRA)."""
    target_modules: str | list[str] = "all-linear"
    """Ends of layers' names, a regular expression for their whole names, or all linear layers but the head."""

    def check(self) -> None:
        """Raise a UserError where a number cannot be; not when it is made, since a parser of unions would hide it."""
        if self.rank < 1 or self.alpha < 1:
            raise UserError(f"rank is {self.rank} and alpha {self.alpha}; expected 1 or more of both")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; expected at least 0 and less than 1")


Trained = Literal["full", "nothing"] | Lora


class FrozenBase(TypedDict):
    """The weights beside which a model was trained, as a config or a card holds it."""

    source: str
    revision: str | None
    hash: str
    lora: dict[str, Any] | None


def frozen_base(config: PreTrainedConfig) -> FrozenBase | None:
    """Return what a model's config says of its frozen base; None where all of the model is its own."""
    return cast(FrozenBase | None, getattr(config, "frozen_base", None))


def restrict(model: PreTrainedModel, trained: Trained, source: str | None, revision: str | None, key: str) -> None:
    """Freeze what is not trained of a model that has just been loaded, and add the adapters if any.

    Args:
        model: a language model.
        trained: what is trained of it.
        source: where it comes from.
        revision: commit of the hub repository.
        key: the recipe's key of the model, for messages.

    Raises:
        UserError: if the frozen weights would be random ones, or the adapters' settings do not fit.
    """
    if trained == "full":
        return
    if source is None:
        raise UserError(
            f"{key}.train leaves the weights of {key} as they are, and {key}.config makes random ones; "
            f"give {key}.source"
        )
    lora = asdict(trained) if isinstance(trained, Lora) else None
    base = FrozenBase(source=source, revision=revision, hash=weights_hash(model.state_dict()), lora=lora)
    model.config.frozen_base = base
    try:
        freeze(model)
    except ValueError as error:
        raise UserError(f"{key}.train: {' '.join(str(error).split())}") from error


def freeze(model: PreTrainedModel) -> None:
    """Prepare a model as the `frozen_base` of its config says: no gradients but those of new adapters."""
    base = frozen_base(model.config)
    if base is None:
        return
    model.requires_grad_(False)
    if base["lora"] is not None:
        _add_adapters(model, Lora(**base["lora"]), base["source"])


def check_base(model: PreTrainedModel, base: FrozenBase) -> None:
    """Take a model that was just loaded as the base, with adapters that are yet to be filled.

    Raises:
        UserError: if its content is not what `base` names.
    """
    if (found := weights_hash(model.state_dict())) != base["hash"]:
        raise UserError(
            f"the model from {base['source']!r} is not the one that this system was trained on (content {found}, "
            f"expected {base['hash']}); give the right one in frozen_base.source"
        )
    model.config.frozen_base = base
    freeze(model)


def moved(base: FrozenBase, folder: Path) -> FrozenBase:
    """Resolve a base's relative path against the folder whose file names it."""
    return base | {"source": beside(base["source"], folder)}


def save_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Write a language model's adapters as peft does, so that peft and transformers can read them too."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    # Without the argument peft asks the hub whether the vocabulary has grown; adapters never change it.
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({_PREFIX + n: w.contiguous() for n, w in weights.items()}, folder / ADAPTERS, {"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def load_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Fill the adapters of a language model from what `save_adapters` wrote."""
    from peft import set_peft_model_state_dict

    weights = {name.removeprefix(_PREFIX): weight for name, weight in load_file(folder / ADAPTERS).items()}
    set_peft_model_state_dict(model, weights)


def adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters among weights."""
    return {name: tensor for name, tensor in weights.items() if _MARK in name}


def make_whole(model: PreTrainedModel) -> None:
    """Fold a language model's adapters into its weights: plain layers, whose decoding costs no more than the base's."""
    base = frozen_base(model.config)
    if base is None:
        return
    del model.config.frozen_base
    if base["lora"] is None:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            cast(Any, module).merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False


def base_names(model: nn.Module) -> set[str]:
    """Name the weights that a frozen base brings to a model or to one inside it, tied ones by all of their names."""
    names: set[str] = set()
    for prefix, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and frozen_base(part.config) is not None:
            weights = part.named_parameters(prefix, remove_duplicate=False)
            names |= {name for name, weight in weights if not weight.requires_grad}
    return names


def tied_names(model: nn.Module) -> dict[str, str]:
    """Map each further name of a tied weight to its first one."""
    first = {id(weight): name for name, weight in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(weight)] for name, weight in every if name != first[id(weight)]}


def with_tied(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state with the other names of tied weights, where it has the first one."""
    missing = {name: one for name, one in tied_names(model).items() if name not in state and one in state}
    return dict(state) | {name: state[one] for name, one in missing.items()}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count a model's weights, all and those that are trained."""
    weights = list(model.parameters())
    return {"trained": sum(w.numel() for w in weights if w.requires_grad), "total": sum(w.numel() for w in weights)}


def _add_adapters(model: PreTrainedModel, lora: Lora, source: str) -> None:
    from peft import LoraConfig

    lora.check()
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=lora.target_modules,
        fan_in_fan_out=any(type(module) is Conv1D for module in model.modules()),
    )
    model.add_adapter(config)
    model.peft_config["default"].base_model_name_or_path = source
    model.train(model.training)  # the adapters too
