"""The prompt's passes of verified decoding: the LLM's, which feeds the projector too, and the slm's."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.generation.prefill import causal_mask
from llmslm.generation.sampling import start_token
from llmslm.generation.side import Side
from llmslm.models.modeling import LlmToSlm
from llmslm.models.packing import document_positions
from llmslm.models.shared_encoder import Reading, SharedEncoder


class ReadPrompt(NamedTuple):
    """What is known once the LLM has read the prompt and its states have been fused: the slm's inputs."""

    prompt_ids: Tensor
    reading: Reading
    slm_inputs: dict[str, Any]

    @property
    def lengths(self) -> tuple[int, int]:
        """Of both models' prompts."""
        return self.reading.mask.shape[1], self.slm_inputs["attention_mask"].shape[1]


class PromptReader:
    """Reads prompts once for both models; nothing of it depends on the host.

    Args:
        llm: the whole LLM.
        encoder: the part of it that feeds the draft.
        draft: the composition.
    """

    def __init__(self, llm: PreTrainedModel, encoder: SharedEncoder, draft: LlmToSlm) -> None:
        self.llm, self.encoder, self.draft = llm, encoder, draft
        self._takes_positions = "position_ids" in inspect.signature(draft.slm.base_model.forward).parameters

    def read(self, prompt_ids: Tensor, prompt_attention_mask: Tensor, **slm_side: Tensor) -> ReadPrompt:
        """Pass right-padded prompts through the LLM, the projector and the fusion.

        Args:
            prompt_ids: (batch, prompt_len), in the LLM's tokenizer.
            prompt_attention_mask: (batch, prompt_len), 1 = a real token.
            slm_side: the rest of the batch: what `LlmToSlm.slm_inputs` takes for the slm.
        """
        reading = self.encoder.read(prompt_ids, prompt_attention_mask, one_mask=True)
        inputs = self.draft.slm_inputs(
            prompt_ids=prompt_ids,
            prompt_attention_mask=reading.mask,
            hidden_states=reading.hidden_states,
            prompt_documents=reading.mask - 1,
            **slm_side,
        )
        return ReadPrompt(prompt_ids, reading, inputs)

    def begin(self, prompt: ReadPrompt, llm: Side, draft: Side) -> None:
        """Let both sides stand behind the prompt."""
        reading = prompt.reading
        if reading.past_key_values is None:
            llm.take_states(reading.last_hidden_state, reading.mask, start_token(self.llm) or 0)
        else:
            llm.take_prompt(reading.past_key_values, reading.mask, prompt.prompt_ids)
            llm.next_logits.copy_(_logits_behind(self.llm, reading.last_hidden_state, llm))
        self._begin_draft(draft, prompt.slm_inputs)

    def _begin_draft(self, side: Side, inputs: dict[str, Any]) -> None:
        slm, mask = self.draft.slm, inputs["attention_mask"]
        if "encoder_outputs" in inputs:
            side.take_states(inputs["encoder_outputs"].last_hidden_state, mask, start_token(slm) or 0)
            return
        order = mask.argsort(dim=1, descending=True, stable=True)  # rows without gaps, from position 0
        embeds, mask = inputs["inputs_embeds"], mask.gather(1, order)
        embeds = embeds.gather(1, order[..., None].expand_as(embeds))
        positions = {"position_ids": document_positions(mask - 1)} if self._takes_positions else {}
        seen = causal_mask(mask.bool(), slm.dtype)  # in full, as for `SharedEncoder.read`
        output = slm.base_model(inputs_embeds=embeds, attention_mask=seen, use_cache=True, **positions)
        side.take_prompt(output.past_key_values, mask)
        side.next_logits.copy_(_logits_behind(slm, output.last_hidden_state, side))


def _logits_behind(model: PreTrainedModel, states: Tensor, side: Side) -> Tensor:
    """(batch, vocabulary): of what follows a prompt, from the last states of all its tokens."""
    last = states[torch.arange(len(states), device=states.device), side.base]
    logits: Tensor = model.get_output_embeddings()(last)
    return logits
