"""`transformers.pipeline("llm-to-slm", model=FOLDER)`: text in, text out, with the two tokenizers of a saved system.

The library's own task text-generation hands a model one stream of tokens, so it serves only systems whose two sides
share a tokenizer and whose slm is decoder-only, and knows nothing of a system's prompt template and limits.
"""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from llmslm.errors import UserError
from llmslm.models.modeling import LlmToSlm

TASK = "llm-to-slm"
_SETTINGS = {"max_new_tokens", "min_new_tokens"}


class LlmToSlmPipeline(Pipeline):
    """Answers prompts as `llmslm generate` does, by the decode engine.

    Called with a prompt it returns `[{"generated_text": answer}]`, with a list of prompts a list of these. Settings:
    `max_new_tokens` (the system's own limit where left out) and `min_new_tokens`. Adapters of the model are folded into
    its weights.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False  # the codec brings both

    def __init__(self, model: Any, **kwargs: Any) -> None:
        from llmslm.checkpoint import find_system, load_card, load_codec
        from llmslm.system import System

        super().__init__(model=model, **kwargs)
        folder = find_system(_local(model.name_or_path, getattr(model.config, "_commit_hash", None)))
        card = load_card(folder)
        if not isinstance(self.model, LlmToSlm):
            raise UserError(f"{folder} holds a system {card['system']}; expected llm_to_slm (task {TASK})")
        codec = load_codec(folder, self.model, card)
        self.model.make_whole()
        self.system = System(card["system"], self.model, codec, card)

    def _sanitize_parameters(self, **settings: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown := settings.keys() - _SETTINGS:
            raise UserError(f"the pipeline {TASK} has no {min(unknown)}; expected {' or '.join(sorted(_SETTINGS))}")
        return {}, settings, {}

    def preprocess(self, prompt: str) -> dict[str, Any]:
        """Pass the prompt on: the system tokenises it."""
        return {"prompt": prompt}

    def _forward(
        self, model_inputs: dict[str, Any], max_new_tokens: int | None = None, min_new_tokens: int = 0
    ) -> dict[str, Any]:
        limit = max_new_tokens or self.system.codec.text_format.max_target_tokens
        prompts = [model_inputs["prompt"]]
        generation = self.system.generate(prompts, max_new_tokens=limit, min_new_tokens=min_new_tokens)[0]
        return {"text": generation.text}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, str]]:
        """Return what the library's text-generation does."""
        return [{"generated_text": model_outputs["text"]}]


def _local(name_or_path: str, revision: str | None) -> Path:
    """Return a model's folder, fetched from the hub where it is not a local one."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name_or_path, revision=revision))


PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=LlmToSlmPipeline, pt_model=AutoModelForCausalLM)
