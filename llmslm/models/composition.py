"""The parts of a composition: how they are put together, saved and loaded; `modeling.py` says what they compute."""

import copy
import inspect
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedModel

from llmslm.errors import UserError
from llmslm.models.alignment import Alignment, PromptLayout, SameTokenizer
from llmslm.models.configuration import LlmToSlmConfig
from llmslm.models.encoder import Encoder, without_load_report
from llmslm.models.fusion import Fusion
from llmslm.models.language_model import ModelSource, load_language_model
from llmslm.models.layer_mix import LayerMix
from llmslm.models.projector import Projector
from llmslm.models.source import beside
from llmslm.models.trained import FrozenBase, adapters, check_base, freeze, frozen_base, make_whole


class Composition(PreTrainedModel, GenerationMixin):
    """The parts of `LlmToSlm` as one model of transformers.

    The encoder is not part of the saved weights: `from_pretrained` fetches it from its source and checks its content
    hash. A model built from a config alone has no encoder until `attach_encoder` is called.
    """

    config: LlmToSlmConfig
    config_class = LlmToSlmConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LlmToSlmConfig) -> None:
        super().__init__(config)
        self.encoder: Encoder | None = None
        widths = (config.encoder_config.hidden_size, config.slm_config.hidden_size)
        self.projector = Projector.from_spec(config.projector, *widths)
        self.alignment = Alignment.from_spec(config.alignment, *widths)
        self.fusion = Fusion.from_spec(config.fusion, *widths)
        self.layer_mix = LayerMix.of_layer(config.encoder_layer)
        _check_parts(self.projector, self.alignment, self.fusion)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        self.slm: PreTrainedModel = auto.from_config(config.slm_config)
        freeze(self.slm)
        self.fusion.attach(self.slm)
        if frozen_base(config.slm_config) is not None:
            self._keys_to_ignore_on_load_missing = [r"^slm\."]
        self._find_slm_inputs()
        self.post_init()

    @classmethod
    def compose(
        cls,
        encoder: Encoder,
        slm: PreTrainedModel,
        *,
        projector: Projector,
        alignment: Alignment,
        fusion: Fusion,
        encoder_source: str | None = None,
        encoder_revision: str | None = None,
    ) -> Self:
        """Put parts together that exist already; the projector starts at the scale of the slm's embeddings."""
        encoder_config = copy.deepcopy(encoder.config)
        vars(encoder_config).pop("quantization_config", None)  # named by encoder_quantization; the slm has none
        config = LlmToSlmConfig(
            encoder_config=encoder_config,
            slm_config=copy.deepcopy(slm.config),
            encoder_source=encoder_source,
            encoder_revision=encoder_revision,
            encoder_layer=encoder.layer,
            encoder_quantization=encoder.quantization,
            projector=projector.spec(),
            fusion=fusion.spec(),
            alignment=alignment.spec(),
        )
        with torch.device("meta"):
            model = cls(config)
        model.projector, model.alignment, model.fusion, model.slm = projector, alignment, fusion, slm
        model.layer_mix = LayerMix.of_layer(encoder.layer)
        model.generation_config = slm.generation_config
        projector.match_scale(fusion.reference(slm))
        fusion.attach(slm)
        model.attach_encoder(encoder)
        model.config.encoder_hash = encoder.content_hash()  # after attaching: there is nothing to compare it with
        return model

    def attach_encoder(self, encoder: Encoder) -> None:
        """Use this encoder.

        Raises:
            UserError: if its width is not what the projector takes, or its content is not what the config names.
        """
        if encoder.hidden_size != self.projector.encoder_hidden_size:
            raise UserError(
                f"the encoder's states are {encoder.hidden_size} wide, the projector takes "
                f"{self.projector.encoder_hidden_size}; train this projector with its own encoder (model.encoder)"
            )
        expected, quantization = self.config.encoder_hash, self.config.encoder_quantization
        if expected and (found := encoder.content_hash()) != expected:
            quantiser = f", or install the quantiser that made its {quantization} weights" if quantization else ""
            raise UserError(
                f"the encoder from {self.config.encoder_source!r} is not the one that this system was trained with "
                f"(content {found}, expected {expected}); give the right one with encoder_source{quantiser}"
            )
        self.encoder = encoder

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        encoder_source: str | None = None,
        load_encoder: bool = True,
        **kwargs: Any,
    ) -> Self:
        """Load the trained part from a folder or the hub, and the encoder from its own source.

        Args:
            pretrained_model_name_or_path: folder or hub name.
            args: see transformers.
            encoder_source: where the encoder lies now, if not where the config says.
            load_encoder: False leaves the encoder out, for training or decoding from cached hidden_states.
            kwargs: see transformers; `dtype` goes to the encoder too.

        Raises:
            UserError: if the encoder cannot be found or is a different one.
        """
        kwargs.setdefault("use_safetensors", True)
        with without_load_report() if _has_frozen_slm(pretrained_model_name_or_path, kwargs) else nullcontext():
            model: Self = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config, folder = model.config, Path(pretrained_model_name_or_path, kwargs.get("subfolder", ""))
        config.resolve(folder)
        if (base := frozen_base(config.slm_config)) is not None:
            model._stand_on(base)
        if encoder_source:
            config.encoder_source, config.encoder_revision = beside(encoder_source, folder), None
        if load_encoder:
            if config.encoder_source is None:
                raise UserError(f"{pretrained_model_name_or_path} names no encoder; give encoder_source")
            try:
                encoder = Encoder.from_source(
                    config.encoder_source,
                    revision=config.encoder_revision,
                    layer=config.encoder_layer,
                    dtype=kwargs.get("dtype", kwargs.get("torch_dtype")),
                    quantization=config.encoder_quantization,
                )
            except UserError as error:
                lay = Path(config.encoder_source)
                if encoder_source or not lay.is_absolute() or lay.exists():
                    raise
                where = folder / "config.json"
                raise UserError(f"{error}; if it lies elsewhere now, say so in {where} (encoder_source)") from error
            model.attach_encoder(encoder.to(model.device))
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save what was trained and name the encoder; a local encoder is named relative to this folder."""
        state_dict = kwargs.pop("state_dict", None) or self.state_dict()
        frozen = ("encoder.",) if frozen_base(self.config.slm_config) is None else ("encoder.", "slm.")
        trained = {name: tensor for name, tensor in state_dict.items() if not name.startswith(frozen)}
        config, self.config = self.config, self.config.seen_from(Path(save_directory))
        try:
            super().save_pretrained(save_directory, state_dict=trained | adapters(state_dict), **kwargs)
        finally:
            self.config = config

    def make_whole(self) -> None:
        """Fold the slm's adapters into its weights, which are from now on its own and saved with the rest."""
        make_whole(self.slm)
        self.config.slm_config = copy.deepcopy(self.slm.config)

    def _stand_on(self, base: FrozenBase) -> None:
        """Load the slm's frozen weights from their source, under the adapters that are loaded already."""
        source = ModelSource(base["source"], base["revision"])
        slm = load_language_model(source, None, "frozen_base", self.slm.dtype)
        check_base(slm, base)
        slm.load_state_dict(adapters(self.slm.state_dict()), strict=False)
        self.slm = slm.to(self.device)
        self.fusion.attach(slm)

    def get_input_embeddings(self) -> nn.Module:
        """Return the slm's token embeddings."""
        return self.slm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the slm's token embeddings."""
        self.slm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the slm's language-model head."""
        return self.slm.get_output_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Change the size of the slm's vocabulary; arguments as for every transformers model."""
        table: nn.Embedding = self.slm.resize_token_embeddings(*args, **kwargs)
        self.config.slm_config = copy.deepcopy(self.slm.config)
        return table

    def get_encoder(self, *_args: Any, **_kwargs: Any) -> nn.Module:
        """Return the slm's own encoder, which generation looks for; the frozen LLM is `self.encoder`."""
        encoder: nn.Module = self.slm.get_encoder()
        return encoder

    def get_decoder(self) -> nn.Module:
        """Return the slm's decoder."""
        decoder: nn.Module = self.slm.get_decoder()
        return decoder

    @property
    def prompt_layout(self) -> PromptLayout:
        """What the codec writes on the slm's prompt positions: the fusion's layout, or the alignment's."""
        return self.fusion.prompt_layout or self.alignment.prompt_layout

    @property
    def can_pack(self) -> bool:
        """Whether several examples may share a row of a training batch."""
        keeps_states = self.projector.keeps_positions and self.alignment.can_pack
        return keeps_states and self.fusion.can_pack(self.slm)

    def metrics(self) -> dict[str, Tensor]:
        """Return the scalars that the parts between the models have learned, by name, for a log."""
        parts = [part for part in (self.layer_mix, self.projector, self.alignment, self.fusion) if part is not None]
        return {name: value for part in parts for name, value in part.metrics().items()}

    def _find_slm_inputs(self) -> None:
        self._slm_takes_positions = "position_ids" in inspect.signature(self.slm.forward).parameters

    def _init_weights(self, module: nn.Module) -> None:
        """Leave projector, fusion and alignment as their constructors made them."""


def _has_frozen_slm(place: str | os.PathLike[str], kwargs: dict[str, Any]) -> bool:
    """Look ahead whether a folder or hub name leaves most of the slm to be fetched, so that its lack is no news."""
    config = kwargs.get("config")
    if not isinstance(config, LlmToSlmConfig):
        where = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
        config = LlmToSlmConfig.from_pretrained(place, **{name: kwargs[name] for name in where if name in kwargs})
    return frozen_base(config.slm_config) is not None


def _check_parts(projector: Projector, alignment: Alignment, fusion: Fusion) -> None:
    """Refuse parts that do not go together."""
    name = type(fusion).__name__
    if fusion.prompt_layout is None and not projector.keeps_positions:
        raise UserError(
            f"{type(projector).__name__} compresses the prompt, so its states have no place on the slm's tokens, where "
            f"fusion {name} puts them; set model.fusion to Prefix, PrefixOnly or CrossAttend (llmslm.models.fusion)"
        )
    if fusion.prompt_layout is not None and type(alignment) is not SameTokenizer:
        raise UserError(f"fusion {name} aligns nothing: remove model.alignment {type(alignment).__name__}")
