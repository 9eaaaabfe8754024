"""A pair of systems as one: an llm_to_slm system drafts, the llm that it was made with decides about each token."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from llmslm.checkpoint import find_system, load_parts
from llmslm.data.tokenizer import same_tokenizer
from llmslm.errors import UserError
from llmslm.generation.acceptance import Acceptance
from llmslm.generation.verified import VerifiedEngine
from llmslm.load_llm import load_llm
from llmslm.models.modeling import LlmToSlm
from llmslm.system import System

_SAME_PROMPTS = ("prompt_template", "max_prompt_tokens", "truncate_prompt")


class VerifiedSystem(System):
    """Predicts what the llm predicts, sooner where the draft is good. Likelihoods are the llm's.

    Args:
        llm: the LLM-only system.
        draft: the llm_to_slm system whose encoder is (part of) that LLM; from now on they share its weights.

    Raises:
        UserError: if the two do not belong together: another LLM, other prompts, or another target vocabulary.
    """

    def __init__(self, llm: System, draft: System) -> None:
        _check_pair(llm, draft)
        super().__init__("verified", llm.model, llm.codec, llm.card | {"system": "verified", "draft": draft.card})
        self.draft = draft
        self.acceptance = Acceptance()
        """Counts over all calls of `generate` so far."""
        self.verified_engine = VerifiedEngine(llm.model, draft.model)

    @classmethod
    def load_pair(
        cls,
        draft_folder: str | Path,
        llm_source: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load both; the LLM's weights are kept once.

        Args:
            draft_folder: run or system folder of an llm_to_slm system.
            llm_source: run or system folder of the llm, or the model that the encoder was taken from: a folder in the
                hub's format or a hub name.
            device: where both go.
            dtype: of the weights; float32 if not given.

        Raises:
            UserError: if one of them cannot be loaded, or they do not belong together.
        """
        model, codec, card = load_parts(
            draft_folder, dtype=dtype, load_encoder=False, encoder_source=str(_model_folder(llm_source))
        )
        draft = System(card["system"], model.to(device), codec, card)
        key = "the LLM to verify with (--verify): model"
        llm = load_llm(llm_source, draft.codec.text_format, key, device=device, dtype=dtype)
        return cls(llm, draft)

    def parameters(self) -> dict[str, int]:
        """Count parameters: of both, of the draft's trained part, and those of both decoders."""
        llm, draft = super().parameters(), self.draft.parameters()
        return {
            "total": llm["total"] + draft["trained"],
            "trained": draft["trained"],
            "decoding": llm["decoding"] + draft["decoding"],
        }

    def _new_tokens(self, prompts: Any, **settings: Any) -> Tensor:
        codec = self.draft.codec
        settings |= codec.collate_prompts(codec.encode(prompts))  # on the host, where it is small and padded further
        result = self.verified_engine.generate(**settings)
        self.acceptance.add(result.acceptance)
        return result.tokens


def _model_folder(source: str | Path) -> str | Path:
    """Return the system folder of a run folder; anything else as it is."""
    try:
        return find_system(source)
    except UserError:
        return source


def _check_pair(llm: System, draft: System) -> None:
    if not isinstance(draft.model, LlmToSlm):
        raise UserError(f"a {draft.name} system cannot draft; give the checkpoint of an llm_to_slm system")
    if isinstance(llm.model, LlmToSlm):
        raise UserError("an llm_to_slm system cannot verify; give the llm that its encoder was taken from (--verify)")
    reads = draft.codec.encoder_tokenizer or draft.codec.slm_tokenizer
    if not same_tokenizer(llm.codec.slm_tokenizer, reads):
        raise UserError(
            "the llm's tokenizer is not the one that the draft's encoder reads; give the llm of its encoder (--verify)"
        )
    if llm.codec.slm_tokenizer.get_vocab() != draft.codec.slm_tokenizer.get_vocab():
        raise UserError(
            "the draft writes in another vocabulary than the llm, which cannot verify it token by token; "
            "train the slm with the llm's tokenizer, or decode without --verify"
        )
    for name in _SAME_PROMPTS:
        one, other = getattr(llm.codec.text_format, name), getattr(draft.codec.text_format, name)
        if one != other:
            raise UserError(
                f"the llm reads prompts with {name}={one!r}, the draft with {name}={other!r}; "
                f"train both with the same data.{name}"
            )
