"""Verified mode: an llm_to_slm system drafts, its own LLM verifies a block in one pass and corrects.

The output is the LLM's: its greedy tokens, or, sampled, tokens distributed exactly as its own. The prompt is read once:
the LLM's pass feeds the projector and the LLM's own decoding.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.errors import UserError
from llmslm.generation import memory
from llmslm.generation.acceptance import LONGEST, Acceptance
from llmslm.generation.choice import Choice
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.graphs import Turns
from llmslm.generation.products import fast_products
from llmslm.generation.sampling import Sampling, start_token
from llmslm.generation.side import Side
from llmslm.generation.state import capacity_bucket, padded_batch, prompt_bucket
from llmslm.generation.verified_block import places
from llmslm.generation.verified_loop import VerifiedLoop, VerifiedTokens
from llmslm.generation.verified_prompt import PromptReader
from llmslm.generation.words import MOST_NEW
from llmslm.models.encoder import pad_right
from llmslm.models.modeling import LlmToSlm
from llmslm.models.shared_encoder import SharedEncoder

_KEEP = 4  # pairs of caches with their graphs, one for each size and choice of a call
_DRAWN = 32  # bytes of each place's scores, their order and their probabilities, where tokens are drawn


class VerifiedEngine:
    """Decodes an LLM's output with an llm_to_slm system whose encoder is (part of) that LLM.

    What cannot be verified is decoded by the LLM alone, with a warning that names the reason: the output is the same.
    Calls share buffers: those of several threads must wait for each other, as `System`'s do.

    Args:
        llm: the whole LLM with its head, in eval mode, on the draft's device.
        draft: the composition; from now on its encoder shares the LLM's weights.

    Raises:
        UserError: if the draft's encoder is not of this LLM.
    """

    def __init__(self, llm: PreTrainedModel, draft: LlmToSlm) -> None:
        self.llm, self.draft = llm, draft
        self.encoder = SharedEncoder(llm, draft.config.encoder_layer)
        try:
            draft.attach_encoder(self.encoder)
        except UserError as error:
            raise UserError(
                "the draft's encoder is not of this LLM; give the LLM that it was taken from (--verify)"
            ) from error
        self._alone = DecodeEngine(llm)
        self._slm = DecodeEngine(draft.slm)
        self.fixed = llm.device.type == "cuda"
        self._turns = Turns(llm.device)
        self._reader = PromptReader(llm, self.encoder, draft, (self._alone.decoder, self._slm.decoder))
        self._loops: OrderedDict[tuple[Any, ...], VerifiedLoop] = OrderedDict()
        self._lengths: dict[tuple[Any, ...], tuple[int, int]] = {}  # of both prompts, by the shapes of a batch

    @torch.no_grad()
    def generate(
        self,
        *,
        prompt_ids: Tensor,
        prompt_attention_mask: Tensor,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        sampling: Sampling | None = None,
        on_first_token: Callable[[], None] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
        **slm_side: Tensor,
    ) -> VerifiedTokens:
        """Decode a batch of prompts, padded on either side, from any device: what is on the host costs fewer launches.

        Args:
            prompt_ids: (batch, prompt_len), in the LLM's tokenizer.
            prompt_attention_mask: (batch, prompt_len), 1 = a real token.
            max_new_tokens: number of tokens after which a row ends in any case.
            min_new_tokens: number of tokens before which no row ends; 0 leaves it to the LLM's generation_config.
            sampling: how the LLM's tokens are drawn; its most probable ones are taken if not given.
            on_first_token: called once the first tokens of the batch are known.
            on_tokens: called with (batch, n) tokens on the CPU as they come; put side by side, they are the result.
            slm_side: the rest of the batch: what `LlmToSlm.slm_inputs` takes for the slm; input_ids of an
                encoder-decoder are padded on the right.
        """
        if not 1 <= max_new_tokens <= MOST_NEW:
            raise UserError(
                f"max_new_tokens={max_new_tokens} was given; it must be at least 1, verified at most {MOST_NEW}"
            )
        self._turns.take()
        prompt_ids, prompt_mask = pad_right(prompt_ids, prompt_attention_mask)
        start = 1 if self.llm.config.is_encoder_decoder else prompt_ids.shape[1]
        reason = self._reason(start + max_new_tokens)
        if reason is not None:
            warnings.warn(f"the LLM decodes alone: {reason}", stacklevel=2)
            keywords: dict[str, Any] = {"min_new_tokens": min_new_tokens, "sampling": sampling}
            keywords |= {"on_first_token": on_first_token, "on_tokens": on_tokens}
            tokens = self._llm_alone(prompt_ids, prompt_mask, max_new_tokens=max_new_tokens, **keywords)
            return VerifiedTokens(tokens, Acceptance())
        min_new = min_new_tokens or self._alone.configured_minimum(start)
        prompt = {"prompt_ids": prompt_ids, "prompt_attention_mask": prompt_mask, **slm_side}
        with fast_products(self.llm.device):
            loop = self._started(prompt, min_new, max_new_tokens, sampling)
        loop.choice.start(prompt_ids, prompt_mask, 0 if sampling is None else sampling.seed)
        return loop.run(on_first_token, on_tokens)

    @property
    def engines(self) -> tuple[DecodeEngine, DecodeEngine]:
        """Those of the LLM and of the slm."""
        return self._alone, self._slm

    @property
    def loops(self) -> tuple[VerifiedLoop, ...]:
        """Those that are kept, the last one used last."""
        return tuple(self._loops.values())

    def forget(self) -> None:
        """Give up the caches and graphs that are kept for further calls."""
        self._loops.clear()
        for engine in self.engines:
            engine.forget()

    def _reason(self, positions: int) -> str | None:
        for engine, name in ((self._alone, "LLM"), (self._slm, "slm")):
            if engine.decoder is None:
                return f"the {name} cannot be read in blocks ({engine.reason})"
            if engine.model.config.is_encoder_decoder and start_token(engine.model) is None:
                return f"the {name} has no single decoder_start_token_id of its vocabulary"
        return self._alone.reason_for_generate(positions)

    def _require_memory(self, prompt: dict[str, Tensor], max_new: int, sampling: Sampling | None) -> None:
        """Refuse what cannot fit, after giving up what is kept for other sizes."""
        batch, length = prompt["prompt_ids"].shape
        decoder, slm = self._alone.decoder, self._slm.decoder
        assert decoder is not None
        assert slm is not None
        decoder = replace(decoder, reads_prompts=False)  # its own forward may read the prompt, and needs more
        call = self._alone.call_sizes(batch, length, places(max_new))
        own = prompt["input_ids"].shape[1]
        draft = self._slm.call_sizes(batch, length + own, places(max_new), embedded=True)
        kept = memory.state_bytes(slm.shape, draft, slm.embedding.element_size()) + memory.step_bytes(slm, draft)
        kept += LONGEST * memory.step_bytes(decoder, call) + self._reader.kept_bytes(batch, call.length)
        if sampling is not None:  # logits, scores, their order and the odds, of both, at each place
            kept += _DRAWN * (LONGEST + 1) * batch * (decoder.shape.vocabulary + slm.shape.vocabulary)

        def require_it() -> None:
            free = memory.available_bytes(self.llm.device)
            memory.require(self.llm, decoder, call, None if free is None else free - kept)

        try:
            require_it()
        except UserError:
            if not self._loops:
                raise
            self._loops.clear()
            require_it()

    def _llm_alone(self, prompt_ids: Tensor, mask: Tensor, **keywords: Any) -> Tensor:
        if not self.llm.config.is_encoder_decoder:
            prompt_ids, mask = prompt_ids.flip(1), mask.flip(1)
            prompt_ids, mask = pad_right(prompt_ids, mask)
            prompt_ids, mask = prompt_ids.flip(1), mask.flip(1)
        return self._alone.generate(input_ids=prompt_ids, attention_mask=mask, **keywords)

    def _started(
        self, prompt: dict[str, Tensor], min_new: int, max_new: int, sampling: Sampling | None
    ) -> VerifiedLoop:
        """A loop that stands behind the prompt; prompts of a shape that has come before are read by a graph."""
        prompt = self._padded(prompt) if self.fixed else prompt
        shapes = tuple((name, value.shape) for name, value in prompt.items())
        settings = (prompt["prompt_ids"].shape[0], min_new, max_new, sampling)
        lengths = self._lengths.get(shapes)
        if lengths is not None and self._key(lengths, *settings) in self._loops:
            loop = self._loop(lengths, *settings)
            loop.read_prompt(self._reader, prompt)
            return loop
        self._require_memory(prompt, max_new, sampling)
        read = self._reader.read(**prompt)
        loop = self._loop(read.lengths, *settings)
        self._reader.begin(read, loop.llm, loop.draft)
        if self.fixed:
            self._lengths[shapes] = read.lengths
        return loop

    def _padded(self, prompt: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prompts come in a few lengths where their passes are captured, unless that is more than the models hold."""
        lengths = {prompt_bucket(value.shape[1]) for value in prompt.values()}
        limits = [engine.decoder.max_positions for engine in self.engines if engine.decoder is not None]
        if any(limit is not None and 2 * max(lengths) > limit for limit in limits):  # both may stand side by side
            return prompt
        left = not self.draft.slm.config.is_encoder_decoder
        return padded_batch(prompt, lambda _, length: prompt_bucket(length), left=left)

    @torch.inference_mode(False)  # later calls may come from outside of it
    @torch.no_grad()
    def _loop(
        self, lengths: tuple[int, int], batch: int, min_new: int, max_new: int, sampling: Sampling | None
    ) -> VerifiedLoop:
        """Buffers for one call; where graphs hold on to them, those of an earlier call of the size are used again."""
        key, drawn = self._key(lengths, batch, min_new, max_new, sampling), _without_seed(sampling)
        if key in self._loops:
            self._loops.move_to_end(key)
            return self._loops[key]
        choice = Choice(self.llm, batch, min_new=min_new, max_new=max_new, sampling=drawn)
        decoder, slm = self._alone.decoder, self._slm.decoder
        assert decoder is not None
        assert slm is not None
        llm = Side(decoder, batch, *self._capacities(self._alone, lengths[0], max_new))
        capacities = self._capacities(self._slm, lengths[1], max_new)
        draft = Side(slm, batch, *capacities, first_index=self._first_index)
        loop = VerifiedLoop(llm, draft, choice, fixed=self.fixed)
        if self.fixed:
            while len(self._loops) >= _KEEP:
                self._loops.popitem(last=False)
            self._loops[key] = loop
        return loop

    def _key(
        self, lengths: tuple[int, int], batch: int, min_new: int, max_new: int, sampling: Sampling | None
    ) -> tuple[Any, ...]:
        """What a kept loop has built in."""
        sizes = [self._capacities(e, n, max_new) for e, n in zip(self.engines, lengths, strict=True)]
        rules = self._alone._rules_key(), self.llm.generation_config.repetition_penalty
        return batch, *sizes, min_new, max_new, _without_seed(sampling), *rules

    @property
    def _first_index(self) -> int:
        """Of the draft's tokens that it can read: a decoder-only slm's prompt has no ids."""
        return 0 if self.draft.slm.config.is_encoder_decoder else 1

    def _capacities(self, engine: DecodeEngine, length: int, max_new: int) -> tuple[int, int]:
        """Positions of a side's caches, for tokens and for encoder states, after a prompt of this length."""
        encoder_decoder = engine.model.config.is_encoder_decoder
        own, encoded = (places(max_new), length) if encoder_decoder else (length + places(max_new), 0)
        return (capacity_bucket(own), prompt_bucket(encoded)) if self.fixed else (own, encoded)


def _without_seed(sampling: Sampling | None) -> Sampling | None:
    return None if sampling is None else replace(sampling, seed=0)
