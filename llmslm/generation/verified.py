"""Verified mode: an llm_to_slm system drafts, its own LLM verifies a block in one pass and corrects.

The output is the LLM's: its greedy tokens, or, sampled, tokens distributed exactly as its own. The prompt is read once:
the LLM's pass feeds the projector and the LLM's own decoding.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.errors import UserError
from llmslm.generation.acceptance import LONGEST, Acceptance, BlockLength, Verdict
from llmslm.generation.choice import Choice
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.memory import require
from llmslm.generation.plan import Decoder
from llmslm.generation.products import fast_products
from llmslm.generation.sampling import Sampling, start_token
from llmslm.generation.side import Side
from llmslm.generation.state import capacity_bucket, prompt_bucket
from llmslm.models.encoder import pad_right
from llmslm.models.modeling import LlmToSlm
from llmslm.models.shared_encoder import Reading, SharedEncoder

_KEEP = 8  # caches with their graphs, two for each size of a call
_ROW_ON_CPU = 0.15  # time that each further row of inputs adds to a product whose weights are read once (measured)


@dataclass(frozen=True)
class VerifiedTokens:
    """What a call gives.

    tokens: (batch, new_len) new tokens; rows that end early are filled with the pad token.
    acceptance: how much of the drafts was kept.
    """

    tokens: Tensor
    acceptance: Acceptance


class VerifiedEngine:
    """Decodes an LLM's output with an llm_to_slm system whose encoder is (part of) that LLM.

    What cannot be verified is decoded by the LLM alone, with a warning that names the reason: the output is the same.

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
            raise UserError("the draft's encoder is not of this LLM; give the LLM that it was taken from") from error
        self._alone = DecodeEngine(llm)
        self._slm = DecodeEngine(draft.slm)
        self.fixed = llm.device.type == "cuda"
        self._sides: OrderedDict[tuple[int, ...], Side] = OrderedDict()

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
        """Decode a batch of prompts, padded on either side.

        Args:
            prompt_ids: (batch, prompt_len), in the LLM's tokenizer.
            prompt_attention_mask: (batch, prompt_len), 1 = a real token.
            max_new_tokens: number of tokens after which a row ends in any case.
            min_new_tokens: number of tokens before which no row ends; 0 leaves it to the LLM's generation_config.
            sampling: how the LLM's tokens are drawn; its most probable ones are taken if not given.
            on_first_token: called once the first tokens of the batch are known.
            on_tokens: called with (batch, n) tokens on the CPU as they come; put side by side, they are the result.
            slm_side: the rest of the batch: what `LlmToSlm.slm_inputs` takes for the slm.
        """
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} was given; it must be at least 1")
        prompt_ids, prompt_mask = pad_right(prompt_ids, prompt_attention_mask)
        start = 1 if self.llm.config.is_encoder_decoder else prompt_ids.shape[1]
        reason = self._reason(start + max_new_tokens)
        if reason is not None:
            warnings.warn(f"the LLM decodes alone: {reason}", stacklevel=2)
            keywords: dict[str, Any] = {"min_new_tokens": min_new_tokens, "sampling": sampling}
            keywords |= {"on_first_token": on_first_token, "on_tokens": on_tokens}
            tokens = self._llm_alone(prompt_ids, prompt_mask, max_new_tokens=max_new_tokens, **keywords)
            return VerifiedTokens(tokens, Acceptance())
        places = max_new_tokens + LONGEST + 2
        self._require_memory(prompt_ids.shape[0], prompt_ids.shape[1], places)
        with fast_products(self.llm.device):
            reading = self.encoder.read(prompt_ids, prompt_mask)
            inputs = self.draft.slm_inputs(
                prompt_ids=prompt_ids,
                prompt_attention_mask=reading.mask,
                hidden_states=reading.hidden_states,
                **slm_side,
            )
            sides = self._llm_side(reading, prompt_ids, places), self._draft_side(inputs, places)
        min_new = min_new_tokens or self._alone.configured_minimum(start)
        choice = Choice(self.llm, prompt_ids, prompt_mask, min_new=min_new, max_new=max_new_tokens, sampling=sampling)
        run = _Run(*sides, choice, BlockLength(_cost_of_drafting(*sides)))
        return run.decode(on_first_token, on_tokens)

    @property
    def engines(self) -> tuple[DecodeEngine, DecodeEngine]:
        """Those of the LLM and of the slm."""
        return self._alone, self._slm

    def forget(self) -> None:
        """Give up the caches and graphs that are kept for further calls."""
        self._sides.clear()
        for engine in self.engines:
            engine.forget()

    def _reason(self, positions: int) -> str | None:
        for engine, name in ((self._alone, "LLM"), (self._slm, "slm")):
            if engine.decoder is None:
                return f"the {name} cannot be read in blocks ({engine.reason})"
            if engine.model.config.is_encoder_decoder and start_token(engine.model) is None:
                return f"the {name} has no single decoder_start_token_id of its vocabulary"
        return self._alone.reason_for_generate(positions)

    def _require_memory(self, batch: int, length: int, places: int) -> None:
        """Refuse what the LLM, by far the larger one, cannot hold, after giving up what is kept for other sizes."""
        decoder, call = self._alone.decoder, self._alone.call_sizes(batch, length, places)
        assert decoder is not None
        try:
            require(self.llm, decoder, call)
        except UserError:
            if not self._sides:
                raise
            self._sides.clear()
            require(self.llm, decoder, call)

    def _llm_alone(self, prompt_ids: Tensor, mask: Tensor, **keywords: Any) -> Tensor:
        if not self.llm.config.is_encoder_decoder:
            prompt_ids, mask = prompt_ids.flip(1), mask.flip(1)
            prompt_ids, mask = pad_right(prompt_ids, mask)
            prompt_ids, mask = prompt_ids.flip(1), mask.flip(1)
        return self._alone.generate(input_ids=prompt_ids, attention_mask=mask, **keywords)

    def _llm_side(self, reading: Reading, prompt_ids: Tensor, places: int) -> Side:
        batch, length = reading.mask.shape
        if reading.past_key_values is None:
            side = self._side(self._alone.decoder, batch, places, length)
            side.take_states(reading.last_hidden_state, reading.mask, start_token(self.llm) or 0)
        else:
            side = self._side(self._alone.decoder, batch, length + places, 0)
            side.take_prompt(reading.past_key_values, reading.mask, prompt_ids)
        return side

    def _draft_side(self, inputs: dict[str, Any], places: int) -> Side:
        slm, mask = self.draft.slm, inputs["attention_mask"]
        batch, length = mask.shape
        if "encoder_outputs" in inputs:
            side = self._side(self._slm.decoder, batch, places, length)
            side.take_states(inputs["encoder_outputs"].last_hidden_state, mask, start_token(slm) or 0)
            return side
        order = mask.argsort(dim=1, descending=True, stable=True)  # rows without gaps, from position 0
        embeds, mask = inputs["inputs_embeds"], mask.gather(1, order)
        embeds = embeds.gather(1, order[..., None].expand_as(embeds))
        output = slm.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
        side = self._side(self._slm.decoder, batch, length + places, 0)
        side.take_prompt(output.past_key_values, mask)
        last = output.last_hidden_state[torch.arange(batch, device=mask.device), side.base]
        side.first_logits = slm.get_output_embeddings()(last)
        return side

    def _side(self, decoder: Decoder | None, batch: int, capacity: int, encoder_capacity: int) -> Side:
        """Caches for one call; where graphs hold on to them, those of an earlier call of the size are used again."""
        assert decoder is not None
        if not self.fixed:
            return Side(decoder, batch, capacity, encoder_capacity, fixed=False)
        sizes = (batch, capacity_bucket(capacity), prompt_bucket(encoder_capacity))
        key = (id(decoder), *sizes)
        if key not in self._sides:
            while len(self._sides) >= _KEEP:
                self._sides.popitem(last=False)
            self._sides[key] = Side(decoder, *sizes, fixed=True)
        self._sides.move_to_end(key)
        return self._sides[key]


def _cost_of_drafting(llm: Side, draft: Side) -> float:
    """Cost of one more token in each block, in passes of the LLM: reading the draft's weights, and a longer pass."""
    longer = 0.0
    if llm.base.device.type == "cpu":
        rows = llm.base.shape[0]
        longer = _ROW_ON_CPU * rows / (1 + _ROW_ON_CPU * (rows - 1))
    return draft.decoder.decoding_bytes() / llm.decoder.decoding_bytes() + longer


class _Run:
    """One call's tokens: token 0 of each row is its start, the new ones count from 1.

    Args:
        llm: verifies.
        draft: proposes.
        choice: of tokens.
        length: of blocks.
    """

    def __init__(self, llm: Side, draft: Side, choice: Choice, length: BlockLength) -> None:
        self.llm, self.draft, self.choice, self.length = llm, draft, choice, length
        batch, device = llm.base.shape[0], llm.base.device
        self.tokens = torch.zeros(batch, choice.max_new + LONGEST + 2, dtype=torch.long, device=device)
        self.produced = torch.zeros(batch, dtype=torch.long, device=device)
        self.open = torch.ones(batch, dtype=torch.bool, device=device)
        self.counts, self.still_open = [0] * batch, [True] * batch  # the same on the host, after each block
        self.acceptance = Acceptance()
        self.unread = False  # whether the draft has not read the last token of a block that was kept whole

    def decode(
        self, on_first_token: Callable[[], None] | None, on_tokens: Callable[[Tensor], None] | None
    ) -> VerifiedTokens:
        """Run to the end; arguments as for `VerifiedEngine.generate`."""
        handed_out = 0
        while any(self.still_open):
            self._block()
            if on_first_token is not None:
                on_first_token()
                on_first_token = None
            if on_tokens is not None:
                counts = [c for c, is_open in zip(self.counts, self.still_open, strict=True) if is_open]
                known = min(counts) if counts else max(self.counts)
                if known > handed_out:
                    on_tokens(self._new_tokens(handed_out, known).cpu())
                handed_out = known
        return VerifiedTokens(self._new_tokens(0, max(self.counts)), self.acceptance)

    def _block(self) -> None:
        """Draft, verify, keep: at least one new token for each open row."""
        fewest = min(count for count, is_open in zip(self.counts, self.still_open, strict=True) if is_open)
        size = min(self.length.current, self.choice.max_new - fewest - 1)
        odds = self._propose(size)
        index = self.produced[:, None] + torch.arange(size + 1, device=self.tokens.device)
        block = self.tokens.gather(1, index)
        logits = self.llm.read(block, index, max(self.counts) + size)
        verdict = self.choice.judge(logits, index, block[:, 1:], odds)
        self._keep(verdict, index + 1, size)

    def _propose(self, size: int) -> Tensor | None:
        """Write drafted tokens behind those of each row; the odds (batch, size, vocabulary) that they had if drawn."""
        draft, largest = self.draft, max(self.counts) + size
        begin = self.produced[:, None]
        first = torch.cat([(begin - 1).clamp(min=draft.first_index), begin], dim=1) if self.unread else begin
        odds: list[Tensor] = []
        for drafted in range(size):
            logits, draft.first_logits = draft.first_logits, None
            if logits is None:
                index = first if drafted == 0 else begin + drafted
                logits = draft.read(self.tokens.gather(1, index), index, largest)[:, -1]
            so_far = self.tokens.gather(1, begin + 1 + torch.arange(drafted, device=begin.device))
            token, chances = self.choice.propose(logits, self.produced + drafted, so_far)
            self.tokens.scatter_(1, begin + drafted + 1, token[:, None])
            if chances is not None:
                odds.append(chances)
        return torch.cat(odds, dim=1) if odds else None

    def _keep(self, verdict: Verdict, index: Tensor, size: int) -> None:
        """Take what was accepted, the LLM's next token, and no more than a row may have."""
        after = self.produced + verdict.accepted + 1
        self.tokens.scatter_(1, after[:, None], verdict.next_token[:, None])
        block = self.tokens.gather(1, index)
        inside = index <= after[:, None]
        ends = torch.isin(block, self.choice.rules.eos) & inside
        count = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, verdict.accepted + 1)
        count = torch.minimum(count, self.choice.max_new - self.produced) * self.open
        self.choice.note(block, index <= (self.produced + count)[:, None])
        self.produced += count
        was_open, self.open = self.open, self.open & ~ends.any(dim=1) & (self.produced < self.choice.max_new)
        seen = torch.stack([self.produced, self.open, was_open, verdict.accepted, count]).tolist()
        self.counts, self.still_open = seen[0], [bool(value) for value in seen[1]]
        self.unread = any(accepted == size for accepted in seen[3])
        self._count(size, [(a, c) for was, a, c in zip(*seen[2:], strict=True) if was])

    def _count(self, size: int, rows: list[tuple[int, int]]) -> None:
        """Add a block's (accepted, count) of each row that was open."""
        kept = sum(min(accepted, count) for accepted, count in rows)
        refused = sum(accepted < size and accepted < count for accepted, count in rows)
        self.length.learn(kept, refused)
        self.acceptance.add(Acceptance(1, len(rows), size * len(rows), kept))

    def _new_tokens(self, start: int, stop: int) -> Tensor:
        """New tokens start to stop of all rows, filled with the pad token behind their ends."""
        index = torch.arange(start + 1, stop + 1, device=self.tokens.device)
        tokens = self.tokens[:, start + 1 : stop + 1]
        return tokens.masked_fill(index > self.produced[:, None], self.choice.rules.pad)
