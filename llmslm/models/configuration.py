"""LlmToSlmConfig: sub-configs of the two models, specs of the parts between them, source of the encoder."""

import copy
from pathlib import Path
from typing import Any, Self

from transformers import AutoConfig, PreTrainedConfig

from llmslm.models.components import Spec
from llmslm.models.encoder import Layers
from llmslm.models.quantization import Quantization
from llmslm.models.source import beside, seen_from
from llmslm.models.trained import frozen_base, moved

DEFAULT_PROJECTOR: Spec = {"class_path": "llmslm.models.projector.MlpProjector", "init_args": {}}
DEFAULT_FUSION: Spec = {"class_path": "llmslm.models.fusion.Add", "init_args": {}}
DEFAULT_ALIGNMENT: Spec = {"class_path": "llmslm.models.alignment.SameTokenizer", "init_args": {}}


class LlmToSlmConfig(PreTrainedConfig):
    """Configuration of `LlmToSlm`.

    Args:
        encoder_config: config of the LLM that encodes.
        slm_config: config of the slm that decodes; its `frozen_base`, if any, names what of the slm was not trained.
        encoder_source: of the LLM (see `llmslm.models.source`); a relative path is looked up beside this file first.
        encoder_revision: commit of the hub repository.
        encoder_layer: the layer whose states are used: "last", an index into hidden_states, or a fraction of the depth;
            or a list of these, of which a mix is learned.
        encoder_quantization: "8bit" or "4bit" where the encoder's weights are quantised at load.
        encoder_hash: content hash of the encoder's weights, checked at load.
        projector: class path and arguments of the projector.
        fusion: class path and arguments of the fusion.
        alignment: class path and arguments of the alignment.
        kwargs: what every transformers config takes.
    """

    model_type = "llm_to_slm"
    sub_configs = {"encoder_config": AutoConfig, "slm_config": AutoConfig}  # noqa: RUF012 (transformers' own idiom)
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder_config: PreTrainedConfig | dict[str, Any] | None = None,
        slm_config: PreTrainedConfig | dict[str, Any] | None = None,
        encoder_source: str | None = None,
        encoder_revision: str | None = None,
        encoder_layer: Layers = "last",
        encoder_quantization: Quantization | None = None,
        encoder_hash: str | None = None,
        projector: Spec | None = None,
        fusion: Spec | None = None,
        alignment: Spec | None = None,
        **kwargs: Any,
    ) -> None:
        self.encoder_config = _sub_config(encoder_config)
        self.slm_config = _sub_config(slm_config)
        self.encoder_source = encoder_source
        self.encoder_revision = encoder_revision
        self.encoder_layer = encoder_layer
        self.encoder_quantization = encoder_quantization
        self.encoder_hash = encoder_hash
        self.projector = projector or DEFAULT_PROJECTOR
        self.fusion = fusion or DEFAULT_FUSION
        self.alignment = alignment or DEFAULT_ALIGNMENT
        for name in ("is_encoder_decoder", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(name, getattr(self.slm_config, name, None))
        kwargs.setdefault("decoder_start_token_id", getattr(self.slm_config, "decoder_start_token_id", None))
        super().__init__(**kwargs)

    def resolve(self, folder: Path) -> None:
        """Look local sources up beside the folder that this config was read from: the reverse of `seen_from`."""
        if self.encoder_source is not None:
            self.encoder_source = beside(self.encoder_source, folder)
            if self.encoder_source.startswith("..") and not Path(self.encoder_source).exists():
                self.encoder_source = str((folder / self.encoder_source).resolve())  # where it was, for messages
        if (base := frozen_base(self.slm_config)) is not None:
            self.slm_config.frozen_base = moved(base, folder)

    def seen_from(self, folder: Path) -> Self:
        """Return a copy whose local sources are named relative to `folder`."""
        config = copy.deepcopy(self)
        if config.encoder_source is not None:
            config.encoder_source = seen_from(config.encoder_source, folder)
        if (base := frozen_base(config.slm_config)) is not None:
            config.slm_config.frozen_base = base | {"source": seen_from(base["source"], folder)}
        return config

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the slm's config: it decides caches and vocabulary in generation."""
        config: PreTrainedConfig = self.slm_config.get_text_config(decoder=decoder, encoder=encoder)
        return config


def _sub_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """Turn a config.json's dict into the config class that its model_type names."""
    if isinstance(config, PreTrainedConfig):
        return config
    if config is None:
        return PreTrainedConfig()
    values = dict(config)
    model_type = values.pop("model_type", None)
    return AutoConfig.for_model(model_type, **values) if model_type else PreTrainedConfig(**values)
