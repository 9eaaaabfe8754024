"""The ways of decoding that are timed side by side: the engine, those of transformers, and CTranslate2."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from evaluation.decoding import peer
from evaluation.decoding.shapes import Models
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.graphs import Captured
from llmslm.generation.products import fast_products

ARMS = ("engine", "generate", "static", "assisted", "prompt_lookup", "verified", "ctranslate2")
Run = Callable[[int], Any]


@dataclass(frozen=True)
class Batch:
    """Prompts of one length: ids and attention mask, (batch, length)."""

    ids: Tensor
    mask: Tensor


class Arms:
    """Makes what is timed.

    Args:
        models: of the systems.
        batch: what they decode from.
    """

    def __init__(self, models: Models, batch: Batch) -> None:
        self.models, self.batch = models, batch
        self.engines: dict[str, DecodeEngine] = {}

    def engine(self, system: str) -> DecodeEngine:
        """The engine of a system; llm_to_slm has that of its SLM."""
        name = "llm" if system == "llm" else "slm"
        if name not in self.engines:
            self.engines[name] = DecodeEngine(self.models.model(name))
        return self.engines[name]

    def reason_against(self, system: str, arm: str) -> str | None:
        """Say why an arm of a system is not timed, or None."""
        if arm in ("assisted", "prompt_lookup", "verified", "ctranslate2") and system != "llm":
            return f"{arm} decodes with the llm"
        if arm in ("assisted", "prompt_lookup") and self.batch.ids.shape[0] > 1:
            return "transformers takes one row at a time here"
        if arm == "assisted" and not self._one_vocabulary():
            return "the vocabularies of llm and slm differ, and random weights have no tokenizers to go between"
        if arm == "verified":
            return "drafts of random weights are kept by chance alone: see compare --peers verified"
        if arm == "ctranslate2":
            return peer.reason_against(self.models.device, self.models.dtype)
        if arm == "static" and self.models.dtype == "int8":
            return "8-bit weights are not compiled by transformers"
        return None

    def _one_vocabulary(self) -> bool:
        llm, slm = (self.models.model(name).config.vocab_size for name in ("llm", "slm"))
        return bool(llm == slm)

    def run(self, system: str, arm: str) -> Run:
        """A function that decodes exactly this many tokens."""
        if arm == "engine":
            return self._by_engine(system)
        if arm == "ctranslate2":
            return peer.run_of(self.models.float_model(system), self.batch.ids, self.models.dtype)
        options: dict[str, dict[str, Any]] = {
            "generate": {},
            "static": {"cache_implementation": "static"},
            "prompt_lookup": {"prompt_lookup_num_tokens": 10},
        }
        if arm == "assisted":
            options["assisted"] = {"assistant_model": self.models.model("slm")}
        return self._by_generate(system, options[arm])

    def _by_engine(self, system: str) -> Run:
        engine, ids, mask = self.engine(system), self.batch.ids, self.batch.mask
        if system != "llm_to_slm":
            return lambda new: engine.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new
            )
        front = Captured(self.models.front(), ids.device)
        name = "encoder_outputs" if engine.model.config.is_encoder_decoder else "inputs_embeds"

        @torch.no_grad()
        def decode(new: int) -> Tensor:
            with fast_products(ids.device):
                start = {name: front(ids, mask)}
            return engine.generate(**start, attention_mask=mask, max_new_tokens=new, min_new_tokens=new)

        return decode

    def _by_generate(self, system: str, options: dict[str, Any]) -> Run:
        model, ids, mask = self.models.model(system), self.batch.ids, self.batch.mask
        front = self.models.front() if system == "llm_to_slm" else None

        @torch.no_grad()
        def decode(new: int) -> Any:
            lengths = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            return model.generate(**_start(front, ids, mask), attention_mask=mask, **lengths, **options)

        return decode


def _start(front: Any, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    if front is None:
        return {"input_ids": ids}
    states = front(ids, mask)
    if front.slm.config.is_encoder_decoder:
        return {"encoder_outputs": transformers.modeling_outputs.BaseModelOutput(last_hidden_state=states)}
    return {"inputs_embeds": states}
