"""The prompt's passes of verified decoding: the LLM's, which feeds the projector too, and the slm's.

Where there are fused kernels for a decoder-only model, they put its keys and values straight into its side's caches.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.generation.dispatch import projector_pass_for, reader_for
from llmslm.generation.graphs import MOST_TOKENS
from llmslm.generation.plan import Decoder
from llmslm.generation.prefill import Passed, causal_mask
from llmslm.generation.sampling import start_token
from llmslm.generation.self_check import (
    ReadingPass,
    projected_difference,
    reading_difference,
    reason_against,
    tolerance_for,
    tolerance_of,
)
from llmslm.generation.side import Side
from llmslm.models.modeling import LlmToSlm
from llmslm.models.packing import document_positions
from llmslm.models.shared_encoder import SharedEncoder

if TYPE_CHECKING:
    from llmslm.generation.fused_prefill import FusedReader
    from llmslm.generation.fused_projector import FusedProjector


class ReadPrompt(NamedTuple):
    """What is known once the LLM has read the prompt and its states have been fused: the slm's inputs."""

    prompt_ids: Tensor
    mask: Tensor
    passed: Passed
    """Of the LLM."""
    slm_inputs: dict[str, Any]

    @property
    def lengths(self) -> tuple[int, int]:
        """Of both models' prompts."""
        return self.mask.shape[1], self.slm_inputs["attention_mask"].shape[1]


class PromptReader:
    """Reads prompts once for both models; nothing of it depends on the host.

    A pass by fused kernels is held against the model's own forward here, and done without if it differs.

    Args:
        llm: the whole LLM.
        encoder: the part of it that feeds the draft.
        draft: the composition.
        decoders: of the LLM and of the slm, where these can be read.
    """

    def __init__(
        self,
        llm: PreTrainedModel,
        encoder: SharedEncoder,
        draft: LlmToSlm,
        decoders: tuple[Decoder | None, Decoder | None],
    ) -> None:
        self.llm, self.encoder, self.draft = llm, encoder, draft
        self._takes_positions = "position_ids" in inspect.signature(draft.slm.base_model.forward).parameters
        decoder = decoders[0] if len(encoder.depths) == 1 else None  # states of several layers are its forward's
        self._fused_llm = _trusted(llm, decoder, self._llm_pass, encoder.depth)
        self._fused_slm = _trusted(draft.slm, decoders[1], self._slm_pass, None)
        self._fused_projector = _trusted_projector(draft)

    def kept_bytes(self, batch: int, length: int) -> int:
        """Bytes that the LLM's pass keeps beside what its own forward needs: states, and a first pass's own cache."""
        width, element_size = self.encoder.hidden_size * len(self.encoder.depths), self.llm.dtype.itemsize
        cache = 0 if self._fused_llm is None else self._fused_llm.decoder.shape.bytes(batch, length, 0, element_size)
        return batch * length * width * element_size + cache

    def read(
        self, prompt_ids: Tensor, prompt_attention_mask: Tensor, *, cache: Tensor | None = None, **slm_side: Tensor
    ) -> ReadPrompt:
        """Pass right-padded prompts, from any device, through the LLM, the projector and the fusion.

        Args:
            prompt_ids: (batch, prompt_len), in the LLM's tokenizer.
            prompt_attention_mask: (batch, prompt_len), 1 = a real token.
            cache: of the LLM's side, if there is one yet; a fused pass fills it.
            slm_side: the rest of the batch: what `LlmToSlm.slm_inputs` takes for the slm.
        """
        device = self.llm.device
        ids, mask = prompt_ids.to(device), prompt_attention_mask.to(device)
        passed = self._llm_pass(ids, mask) if self._fused_llm is None else self._fused_llm(ids, mask, cache)
        assert passed.states is not None
        return ReadPrompt(ids, mask, passed, self._slm_inputs(ids, mask, passed.states, slm_side))

    def begin(self, prompt: ReadPrompt, llm: Side, draft: Side) -> None:
        """Let both sides stand behind the prompt."""
        self._begin_llm(llm, prompt.passed, prompt.mask, prompt.prompt_ids)
        self._begin_draft(draft, prompt.slm_inputs)

    def read_into(
        self, llm: Side, draft: Side, prompt_ids: Tensor, prompt_attention_mask: Tensor, **slm_side: Tensor
    ) -> None:
        """Let both sides stand behind right-padded prompts, as `read` and `begin` do.

        On CUDA the draft reads its prompt while the layers above its states run: few multiprocessors have work from
        a short prompt, and each pass mostly waits.
        """
        if self._fused_llm is None or self._side_stream is None:
            prompt = {"prompt_ids": prompt_ids, "prompt_attention_mask": prompt_attention_mask, **slm_side}
            self.begin(self.read(**prompt, cache=llm.state.cache), llm, draft)
            return
        ids, mask = prompt_ids.to(self.llm.device), prompt_attention_mask.to(self.llm.device)
        main, beside = torch.cuda.current_stream(self.llm.device), self._side_stream

        def begin_draft(states: Tensor) -> None:
            beside.wait_stream(main)
            with torch.cuda.stream(beside):
                self._begin_draft(draft, self._slm_inputs(ids, mask, states, slm_side))

        passed = self._fused_llm(ids, mask, llm.state.cache, on_states=begin_draft)
        main.wait_stream(beside)  # before anything that the draft's pass reads is given up
        self._begin_llm(llm, passed, mask, ids)

    @functools.cached_property
    def _side_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self.llm.device) if self.llm.device.type == "cuda" else None

    def _slm_inputs(
        self, prompt_ids: Tensor, mask: Tensor, states: Tensor, slm_side: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """What the slm reads, of the LLM's states (batch, prompt_len, width)."""
        return self.draft.slm_inputs(
            prompt_ids=prompt_ids,
            prompt_attention_mask=mask,
            hidden_states=states,
            prompt_documents=mask - 1,
            projector=self._fused_projector if mask.shape[1] <= MOST_TOKENS else None,
            **{name: value.to(mask.device) for name, value in slm_side.items()},
        )

    def _begin_llm(self, side: Side, passed: Passed, mask: Tensor, prompt_ids: Tensor) -> None:
        if passed.cache is None:
            side.take_states(passed.last, mask, start_token(self.llm) or 0)
        else:
            side.take_prompt(passed, mask, prompt_ids)

    def _begin_draft(self, side: Side, inputs: dict[str, Any]) -> None:
        mask = inputs["attention_mask"]
        if "encoder_outputs" in inputs:
            side.take_states(inputs["encoder_outputs"].last_hidden_state, mask, start_token(self.draft.slm) or 0)
            return
        order = mask.argsort(dim=1, descending=True, stable=True)  # rows without gaps, from position 0
        embeds, mask = inputs["inputs_embeds"], mask.gather(1, order)
        embeds = embeds.gather(1, order[..., None].expand_as(embeds))
        fused, cache = self._fused_slm, side.state.cache
        side.take_prompt(self._slm_pass(embeds, mask) if fused is None else fused(embeds, mask, cache), mask)

    def _llm_pass(self, prompt_ids: Tensor, mask: Tensor) -> Passed:
        """The LLM's own pass, whatever its family."""
        reading = self.encoder.read(prompt_ids, mask, one_mask=True)
        if reading.past_key_values is None:
            return Passed(reading.hidden_states, reading.last_hidden_state, None)
        logits = _logits_behind(self.llm, reading.last_hidden_state, mask)
        return Passed(reading.hidden_states, logits, _by_layer(reading.past_key_values))

    def _slm_pass(self, inputs_embeds: Tensor, mask: Tensor) -> Passed:
        """The same of a decoder-only slm."""
        slm, positions = self.draft.slm, {"position_ids": document_positions(mask - 1)} if self._takes_positions else {}
        seen = causal_mask(mask.bool(), slm.dtype)  # in full, as for `SharedEncoder.read`
        output = slm.base_model(inputs_embeds=inputs_embeds, attention_mask=seen, use_cache=True, **positions)
        logits = _logits_behind(slm, output.last_hidden_state, mask)
        return Passed(None, logits, _by_layer(output.past_key_values))


def _trusted(
    model: PreTrainedModel, decoder: Decoder | None, own: ReadingPass, depth: int | None
) -> FusedReader | None:
    """The fused pass, unless it differs from the model's own; None where there is none."""
    fused = reader_for(decoder, depth)
    if decoder is None or fused is None:
        return None
    reason = reason_against(
        lambda: reading_difference(model, decoder, (fused, own), embedded=depth is None), tolerance_for(decoder)
    )
    if reason is None:
        return fused
    name = "slm" if depth is None else "LLM"
    warnings.warn(f"the {name} reads prompts to verify by its own forward, which is slower: {reason}", stacklevel=4)
    return None


def _trusted_projector(draft: LlmToSlm) -> FusedProjector | None:
    """The same of the projector."""
    fused = projector_pass_for(draft.projector, MOST_TOKENS)
    if fused is None:
        return None
    dtype = draft.slm.dtype
    tolerance = tolerance_of(dtype)
    reason = reason_against(lambda: projected_difference(draft.projector, fused, dtype), tolerance, "states")
    if reason is None:
        return fused
    warnings.warn(f"the projector runs by its own forward, which is slower: {reason}", stacklevel=3)
    return None


def _by_layer(past: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in past.layers]


def _logits_behind(model: PreTrainedModel, states: Tensor, mask: Tensor) -> Tensor:
    """(batch, vocabulary): of what follows a right-padded prompt, from the last states of all its tokens."""
    last = states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]
    logits: Tensor = model.get_output_embeddings()(last)
    return logits
