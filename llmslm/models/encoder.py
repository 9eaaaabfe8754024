"""The frozen encoder: a large language model, cut to the layers that are needed, that reads each prompt once."""

import contextlib
import copy
import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from llmslm.errors import UserError
from llmslm.models.packing import document_mask, document_positions
from llmslm.models.quantization import Quantization, quantization_config
from llmslm.models.source import LOAD_ERRORS, pretrained_model, why_not

Layer = Literal["last"] | int | float
Layers = Layer | list[Layer]

# Where the weights of an encoder stack lie in a checkpoint of the whole encoder-decoder model.
_STACK_KEYS = {
    r"^(?:model\.|transformer\.)?encoder\.": "",
    r"^(?:model\.|transformer\.)?shared\.": "embed_tokens.",
}


class Encoder(nn.Module):
    """Frozen text encoder: (batch, prompt_len) ids to (batch, prompt_len, hidden_size) states.

    It has no gradient and no dropout: parameters do not require one, `train()` leaves it in eval mode, and `forward`
    keeps no activation.

    Args:
        model: an encoder stack, an encoder-only model or a decoder-only base model (no language-model head).
        layer: whose output is used: "last" (after the final norm), an index into hidden_states (0 = embeddings,
            negative from the end), or a fraction of the depth in (0, 1]; or a list of these, whose states are put side
            by side. Layers above the highest are removed. States of inner layers are taken before the final norm.
        full_depth: layers of the whole model, where `model` was already shortened at load.
        quantization: how the weights of `model` were quantised at load, to be named in a composition's config.
    """

    main_input_name = "input_ids"

    def __init__(
        self,
        model: PreTrainedModel,
        layer: Layers = "last",
        *,
        full_depth: int | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        self.quantization = quantization
        layers = layer_list(model)
        self._follow(model, layer, full_depth or len(layers))
        self._set_hooks()
        del layers[max(self.depth, 1) :]
        self.requires_grad_(False)
        self.eval()

    def _follow(self, model: PreTrainedModel, layer: Layers, full_depth: int) -> None:
        """Note which layers are wanted of a model of this depth."""
        self.model = model
        self.layer = layer
        self.depths = layer_depths(layer, full_depth)
        self._kept: dict[int, Tensor] = {}
        takes = inspect.signature(model.forward).parameters
        self._takes_use_cache, self._takes_positions = "use_cache" in takes, "position_ids" in takes
        self._is_causal = any(getattr(module, "is_causal", False) for module in model.modules())
        self._inner_depths = set(self.depths) - {full_depth}

    def _set_hooks(self) -> list[RemovableHandle]:
        """Keep the states of the wanted inner layers at each pass."""
        layers, handles = layer_list(self.model), []
        for depth in self._inner_depths:
            if depth == 0:
                handles.append(layers[0].register_forward_pre_hook(self._keep_input, with_kwargs=True))
            else:
                handles.append(layers[depth - 1].register_forward_hook(functools.partial(self._keep_output, depth)))
        return handles

    @property
    def depth(self) -> int:
        """The highest layer that is read."""
        return max(self.depths)

    @property
    def is_inner(self) -> bool:
        """Whether states of inner layers are read, which no final norm has seen."""
        return bool(self._inner_depths)

    @classmethod
    def from_source(
        cls,
        source: str,
        *,
        revision: str | None = None,
        layer: Layers = "last",
        dtype: torch.dtype | str | None = None,
        quantization: Quantization | None = None,
    ) -> Self:
        """Load the encoder part of a hub name, a local folder or a GGUF file (see `llmslm.models.source`).

        Of an encoder-decoder model only the encoder stack is loaded; of a decoder-only or encoder-only model the base
        model without its head; of either no layer above the highest that `layer` names.

        Raises:
            UserError: if there is no such model, its weights are missing, the layer does not exist, or the weights
                cannot be quantised here.
        """
        kwargs: dict[str, Any] = {"revision": revision, "output_loading_info": True}
        if dtype is not None:
            kwargs["dtype"] = dtype
        if quantization is not None:
            kwargs["quantization_config"] = quantization_config(quantization)
        try:
            place, file = pretrained_model(source)
            config = AutoConfig.from_pretrained(place, revision=revision, **file)
            empty = empty_encoder(config)
            full_depth = len(layer_list(empty))
            kwargs |= file | _part_of(config, empty) | {"config": _shorten(empty.config, layer, full_depth)}
            with without_load_report():
                model, info = type(empty).from_pretrained(place, **kwargs)
        except UserError:
            raise
        except (*LOAD_ERRORS, ImportError, RuntimeError) as error:
            raise UserError(_not_loaded(source, quantization, error)) from error
        if quantization is not None and not _is_quantised(model):
            raise UserError(
                f"encoder source {source!r} has no layer that the quantiser stores in {quantization}, which takes "
                "widths in whole groups; leave model.encoder.quantization out"
            )
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"encoder source {source!r} lacks the weights of {', '.join(missing[:3])}"
                f"{' and more' if len(missing) > 3 else ''}; they would be random (model.encoder.source)"
            )
        return cls(model, layer, full_depth=full_depth, quantization=quantization)

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the loaded part."""
        config: PreTrainedConfig = self.model.config
        return config

    @property
    def hidden_size(self) -> int:
        """Width of the states."""
        return int(self.config.hidden_size)

    @functools.cached_property  # a search through all modules, which takes longer than a prompt's tokens
    def max_positions(self) -> int | None:
        """The longest prompt that absolute positions allow; None where positions are relative or unbounded."""
        table = next((m for n, m in self.model.named_modules() if _is_position_table(n, m)), None)
        return None if table is None else int(table.num_embeddings) - int(getattr(table, "offset", 0))

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a frozen encoder has no dropout, also while the rest is trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, prompt_ids: Tensor, prompt_attention_mask: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts padded on either side.

        Args:
            prompt_ids: (batch, prompt_len) ids of the encoder's tokenizer.
            prompt_attention_mask: (batch, prompt_len), 1 = a real token.
            documents: (batch, prompt_len), the prompt that each token of a packed row belongs to, -1 = padding, which
                is then on the right; None where a row is a prompt.

        Returns:
            hidden_states (batch, prompt_len, hidden_size, times the number of layers if that is a list) and their mask
            (batch, prompt_len), both right-padded: models with absolute positions read a prompt from position 0, as
            they were trained to.
        """
        kwargs: dict[str, Any] = {"use_cache": False} if self._takes_use_cache else {}
        if documents is None:
            prompt_ids, mask = pad_right(prompt_ids, prompt_attention_mask)
            kwargs["attention_mask"] = mask
        else:
            mask = prompt_attention_mask
            kwargs["attention_mask"] = document_mask(documents, documents, causal=self._is_causal)
            if self._takes_positions:
                kwargs["position_ids"] = document_positions(documents)
        output = self.model(input_ids=prompt_ids, **kwargs)
        return self._wanted(output.last_hidden_state), mask

    @torch.no_grad()
    def embed_tokens(
        self, prompt_ids: Tensor, prompt_attention_mask: Tensor, documents: Tensor | None = None
    ) -> Tensor:
        """Return the encoder's own token embeddings (batch, prompt_len, hidden_size), right-padded; see `forward`."""
        if documents is None:
            prompt_ids = pad_right(prompt_ids, prompt_attention_mask)[0]
        embeds: Tensor = self.model.get_input_embeddings()(prompt_ids)
        return embeds

    def content_hash(self) -> str:
        """Hash names and values of all weights; see `weights_hash`."""
        return weights_hash(self._read_weights())

    def _read_weights(self) -> dict[str, Tensor]:
        """The weights that decide about the states, by name."""
        weights: dict[str, Tensor] = self.model.state_dict()
        return weights

    def _wanted(self, last_hidden_state: Tensor) -> Tensor:
        """Return the states of the wanted layers, side by side, after the model has run."""
        kept, self._kept = self._kept, {}
        states = [kept.get(depth, last_hidden_state) for depth in self.depths]
        return states[0] if len(states) == 1 else torch.cat(states, dim=-1)

    def _keep_output(self, depth: int, _module: nn.Module, _args: Any, output: Any) -> None:
        self._kept[depth] = output if isinstance(output, Tensor) else output[0]

    def _keep_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._kept[0] = args[0] if args else kwargs["hidden_states"]


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Hash names and values, rounded to bfloat16 so that the loading dtype does not matter."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(_plain(tensor).to("cpu", torch.bfloat16).reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pad_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of (batch, len) ids to the right, wherever it was; the order of real tokens stays."""
    order = mask.argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def layer_list(model: nn.Module) -> nn.ModuleList:
    """Find the stack's list of layers: the first module list on the way down."""
    found = next((m for m in model.modules() if isinstance(m, nn.ModuleList)), None)
    if found is None:
        raise UserError(f"{type(model).__name__} has no list of layers, so it cannot be an encoder (model.encoder)")
    return found


def layer_depths(layer: Layers, depth: int) -> list[int]:
    """Turn what an encoder's `layer` may be into numbers of layers to run, see `layer_index`."""
    if layer == []:
        raise UserError('the list of encoder layers is empty: name one or more, or give "last" (model.encoder.layer)')
    return [layer_index(item, depth) for item in (layer if isinstance(layer, list) else [layer])]


def layer_index(layer: Layer, depth: int) -> int:
    """Turn "last", an index or a fraction into the number of layers to run, 0 to depth.

    Raises:
        UserError: if there is no such layer.
    """
    if layer == "last":
        return depth
    if isinstance(layer, float) and 0 < layer <= 1:
        return max(1, round(layer * depth))
    if isinstance(layer, int) and -depth - 1 <= layer <= depth:
        return layer if layer >= 0 else depth + 1 + layer
    raise UserError(
        f'encoder layer {layer!r} does not exist in a model of {depth} layers: give "last", an index from '
        f"{-depth - 1} to {depth}, or a fraction in (0, 1] (model.encoder.layer)"
    )


def empty_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the part of a model that encodes, without memory for its weights."""
    with torch.device("meta"):
        model = AutoModel.from_config(copy.deepcopy(config))
    return model.get_encoder() if config.is_encoder_decoder else model


def _part_of(config: PreTrainedConfig, empty: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `from_pretrained` that leave out what an encoder does not need."""
    if config.is_encoder_decoder:
        return {"key_mapping": _STACK_KEYS}
    pools = "add_pooling_layer" in inspect.signature(type(empty).__init__).parameters
    return {"add_pooling_layer": False} if pools else {}


def _shorten(config: PreTrainedConfig, layer: Layers, depth: int) -> PreTrainedConfig:
    """Ask for the needed layers alone, so that the others are not even read from disk."""
    wanted = max(1, *layer_depths(layer, depth))
    short = copy.deepcopy(config)
    if wanted < depth:
        for name in ("num_hidden_layers", "encoder_layers"):
            if hasattr(short, name):
                setattr(short, name, wanted)
        if getattr(short, "layer_types", None):
            short.layer_types = short.layer_types[:wanted]
    return short


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor's values, those of a quantised one as they are computed with."""
    tensor = tensor.detach()
    return tensor if type(tensor) is Tensor else tensor.dequantize()


def _is_quantised(model: PreTrainedModel) -> bool:
    weights = [parameter.detach() for parameter in model.parameters()]
    return any(type(weight) is not Tensor or not weight.is_floating_point() for weight in weights)


def _not_loaded(source: str, quantization: Quantization | None, error: Exception) -> str:
    """Say why, and what to change; a file that is not there is no matter of the quantiser."""
    start = f"encoder source {source!r} cannot be loaded"
    if quantization is None or isinstance(error, OSError):
        expected = "expected a hub name, a folder with config.json and weights, or a GGUF file (model.encoder.source)"
        return f"{start}: {why_not(source, error)}; {expected}"
    return (
        f"{start} in {quantization} on this machine: {why_not(source, error)}; "
        "give the other number of bits, install another quantiser, or leave model.encoder.quantization out"
    )


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Silence transformers' table of weights that were left out, where leaving them out is the aim."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _is_position_table(name: str, module: nn.Module) -> bool:
    """Recognise a learned table of absolute positions."""
    return isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe")) and "relative" not in name
