"""The decode engine: `generate()`'s tokens from a bare transformers model, at the speed of the machine.

The prompt goes through the model's own forward; each further token through a lean step (`plan.py`) over static caches.
On CUDA that step is fused kernels in a graph which feeds itself, launched ahead of what the host has seen; and the
prompt of a decoder-only model goes through fused kernels as well.
"""

import contextlib
import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from llmslm.errors import UserError
from llmslm.generation.families import UnreadableModelError, read
from llmslm.generation.graphs import Turns
from llmslm.generation.loop import DecodeLoop, GraphLoop, HostLoop
from llmslm.generation.memory import Call, Front, require, require_with
from llmslm.generation.plan import Decoder
from llmslm.generation.sampling import Sampling, TokenRules, reason_for_generate, start_token
from llmslm.generation.state import DecodeState, capacity_bucket, prompt_bucket
from llmslm.generation.streaming import FirstToken


@dataclass(frozen=True)
class _Prompt:
    """What is decoded from: ids (batch, length), or embeddings or encoder states (batch, length, width)."""

    values: Tensor
    attention_mask: Tensor

    @property
    def batch(self) -> int:
        return int(self.values.shape[0])

    @property
    def length(self) -> int:
        return int(self.values.shape[1])

    def padded(self, length: int, *, left: bool) -> "_Prompt":
        missing = length - self.length
        if missing == 0:
            return self
        sides = (missing, 0) if left else (0, missing)
        values = torch.nn.functional.pad(self.values, ((0, 0, *sides) if self.values.dim() == 3 else sides))
        return _Prompt(values, torch.nn.functional.pad(self.attention_mask, sides))

    def to(self, device: torch.device) -> "_Prompt":
        return _Prompt(self.values.to(device), self.attention_mask.to(device))


class DecodeEngine:
    """Decodes with one model on one device; greedy output is that of `model.generate(do_sample=False)`.

    The model's weights are read at construction (fused weights are copied): build a new engine after changing them.
    What the engine cannot do it leaves to `generate()`, with a warning that names the reason.

    Args:
        model: a causal or sequence-to-sequence language model in eval mode; its device and dtype decide.
        keep: number of states (caches and graphs) kept for further calls of the same size.
        verify: check the lean step against the model's own forward once, before first use.
    """

    def __init__(self, model: PreTrainedModel, *, keep: int = 4, verify: bool = True) -> None:
        self.model, self.keep = model, keep
        self.device = model.device
        # Looked up once, since a config takes microseconds for each attribute.
        self._encoder_decoder: bool = model.config.is_encoder_decoder
        self._has_limit = getattr(model.config, "max_position_embeddings", None) is not None
        self.reason: str | None = None
        self.decoder: Decoder | None = None
        self._loops: OrderedDict[tuple[Any, ...], DecodeLoop] = OrderedDict()
        self._needed: dict[Hashable, tuple[int, Call]] = {}
        self._last_rules: tuple[str, TokenRules] | None = None
        self._lock = threading.RLock()  # calls of one size share a state: those of other threads wait
        self._turns = Turns(self.device)
        limit = getattr(model.config, "max_position_embeddings", None) or 1024
        try:
            with torch.no_grad():
                self.decoder = read(model, limit)
                if verify:
                    self._verify(self.decoder)
                    self.decoder = self._with_prompts_verified(self.decoder)
        except UnreadableModelError as error:
            self.reason, self.decoder = str(error), None

    @torch.no_grad()
    def generate(
        self,
        *,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        sampling: Sampling | None = None,
        on_first_token: Callable[[], None] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Decode a batch.

        Args:
            input_ids: (batch, length); left-padded for a decoder-only model.
            inputs_embeds: (batch, length, width), in place of input_ids, for a decoder-only model.
            attention_mask: (batch, length), 1 = attend; all ones if not given.
            encoder_outputs: the encoder's output, or its last states (batch, length, width), in place of input_ids,
                for an encoder-decoder model.
            max_new_tokens: number of tokens after which a row ends in any case.
            min_new_tokens: number of tokens before which no row ends; 0 leaves it to the model's generation_config.
            sampling: how tokens are drawn; the most probable ones are taken if not given.
            on_first_token: called once the first token of the batch is known.
            on_tokens: called with (batch, n) tokens on the CPU as they come; put side by side, they are the result.

        Returns:
            (batch, new_len) new tokens on the CPU; rows that end early are filled with the pad token.

        Raises:
            UserError: if the inputs do not fit the model, or the call does not fit into memory.
        """
        prompt = self._prompt(input_ids, inputs_embeds, encoder_outputs, attention_mask, max_new_tokens)
        width = 1 if self._encoder_decoder else prompt.length
        min_new = min_new_tokens or self.configured_minimum(width)
        reason = self.reason or self.reason_for_generate(width + max_new_tokens)
        if reason is not None:
            warnings.warn(f"decoding with generate(), which is slower: {reason}", stacklevel=2)
            on_device = prompt.to(self.device)
            ids = self._by_generate(on_device, sampling, max_new_tokens, min_new_tokens, on_first_token).cpu()
            if on_tokens is not None:
                on_tokens(ids)
            return ids
        with self._lock:
            self._turns.take()
            built_in = self._rules_key()
            rules = self._rules(built_in)
            loop = self._loop(prompt, max_new_tokens, rules, sampling, built_in)
            penalty = sampling.repetition_penalty if sampling is not None else rules.repetition_penalty
            padded = self._padded(prompt)
            loop.prepare(padded.values, padded.attention_mask)
            loop.state.ask(min_new=min_new, max_new=max_new_tokens, sampling=sampling, penalty=penalty)
            may_end = bool(rules.ends) and min_new < max_new_tokens
            return loop.run(padded.values, padded.attention_mask, max_new_tokens, may_end, on_first_token, on_tokens)

    def _prompt(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        encoder_outputs: Any,
        attention_mask: Tensor | None,
        max_new_tokens: int,
    ) -> _Prompt:
        states = getattr(encoder_outputs, "last_hidden_state", encoder_outputs)
        if isinstance(states, tuple):
            states = states[0]
        other = "encoder_outputs" if self._encoder_decoder else "inputs_embeds"
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "encoder_outputs": states}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1 or names[0] not in ("input_ids", other):
            raise UserError(f"{' and '.join(names) or 'no input'} given; expected input_ids or {other}, one of them")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} was given; it must be at least 1")
        if self.model.training:
            raise UserError("the model is in training mode, in which dropout changes its tokens; call model.eval()")
        values = given[names[0]]
        assert isinstance(values, Tensor)
        if values.dim() not in (2, 3) or 0 in values.shape:
            raise UserError(f"{names[0]} is {tuple(values.shape)}; expected (batch, length), at least one of each")
        if attention_mask is None:
            attention_mask = torch.ones(values.shape[:2], dtype=torch.long, device=values.device)
        if attention_mask.shape != values.shape[:2]:
            raise UserError(
                f"attention_mask is {tuple(attention_mask.shape)}, {names[0]} {tuple(values.shape)}; "
                "the mask must be (batch, length) of the same prompt"
            )
        self._refuse_too_long(values)
        return _Prompt(values, attention_mask)

    def _refuse_too_long(self, values: Tensor) -> None:
        """Refuse what a table of positions has no rows for, which on CUDA would end the process."""
        decoder, states_given = self.decoder, self._encoder_decoder and values.dim() == 3
        if decoder is None or decoder.positions is None or decoder.max_positions is None or states_given:
            return
        if values.shape[1] > decoder.max_positions:
            raise UserError(
                f"a prompt of {values.shape[1]} tokens was given; the model has {decoder.max_positions} positions; "
                "cut the prompt"
            )

    def configured_minimum(self, width: int) -> int:
        """New tokens before which no row ends; generation_config.min_length counts `width` tokens before them too."""
        config = self.model.generation_config
        if config.min_new_tokens is not None:
            return int(config.min_new_tokens)
        return max((config.min_length or 0) - width, 0)

    def reason_for_generate(self, positions: int) -> str | None:
        """Say why a call that takes up to this many positions is left to `generate()`, or None."""
        config, decoder = self.model.generation_config, self.decoder
        assert decoder is not None
        if decoder.max_positions is not None and positions > decoder.max_positions:
            return f"{positions} tokens exceed the {decoder.max_positions} positions of the model"
        if decoder.window is not None and positions > decoder.window:
            return f"{positions} tokens exceed the sliding window of {decoder.window}"
        if config.forced_bos_token_id is not None and not self._encoder_decoder:
            return "generation_config.forced_bos_token_id of a decoder-only model"
        if self._encoder_decoder and start_token(self.model) is None:
            return "no single decoder_start_token_id of the vocabulary"
        return reason_for_generate(config)

    def _rules(self, built_in: str) -> TokenRules:
        """Those of the generation_config as it is now; the last ones are kept, since they have tensors."""
        assert self.decoder is not None
        key = f"{built_in} {self.model.generation_config.repetition_penalty}"
        if self._last_rules is None or self._last_rules[0] != key:
            rules = TokenRules(
                self.model.generation_config,
                vocabulary=self.decoder.shape.vocabulary,
                encoder_decoder=self._encoder_decoder,
                device=self.device,
            )
            self._last_rules = key, rules
        return self._last_rules[1]

    def _padded(self, prompt: _Prompt) -> _Prompt:
        """Prompts come in a few lengths on CUDA, so that their pass can be captured too; its graph takes them there."""
        if self.device.type != "cuda":
            return prompt.to(self.device)
        limit = None if self.decoder is None else self.decoder.max_positions
        length = prompt_bucket(prompt.length)
        if self._encoder_decoder and not self._has_limit:
            limit = None
        length = length if limit is None else max(prompt.length, min(length, limit))
        return prompt.padded(length, left=not self._encoder_decoder)

    def call_sizes(
        self, batch: int, length: int, max_new_tokens: int, *, embedded: bool = False, penalised: bool = False
    ) -> Call:
        """Sizes of what a greedy call of the engine allocates.

        Args:
            batch: rows.
            length: of the prompts.
            max_new_tokens: number of tokens after which a row ends in any case.
            embedded: whether embeddings or encoder states are given, in place of ids.
            penalised: whether tokens that were seen are kept.
        """
        on_cpu, encoder_decoder = self.device.type != "cuda", self._encoder_decoder
        length = length if on_cpu else prompt_bucket(length)
        capacity = max_new_tokens + (1 if encoder_decoder else length)
        capacity = capacity if on_cpu else capacity_bucket(capacity)
        encoded = length if encoder_decoder else 0
        return Call(batch, length, capacity, encoded, embedded=embedded, penalised=penalised)

    def forget(self) -> None:
        """Give up the caches and graphs that are kept for further calls."""
        self._loops.clear()

    def _loop(
        self, prompt: _Prompt, max_new: int, rules: TokenRules, sampling: Sampling | None, built_in: str
    ) -> DecodeLoop:
        penalty = rules.repetition_penalty if sampling is None else sampling.repetition_penalty
        sizes, embedded = (prompt.batch, prompt.length, max_new), prompt.values.dim() == 3
        call = self.call_sizes(*sizes, embedded=embedded, penalised=penalty != 1.0)
        mode = rules.mode(sampling)
        key = (call.batch, call.capacity, call.encoder_capacity, mode, call.penalised, built_in)
        if key in self._loops:
            self._loops.move_to_end(key)
            return self._loops[key]
        while len(self._loops) >= self.keep:
            self._loops.popitem(last=False)
        decoder = self.decoder
        assert decoder is not None
        self._with_room(lambda: require(self.model, decoder, call))
        with torch.inference_mode(False):  # later calls may come from outside of it
            state = DecodeState(
                decoder.shape,
                batch=call.batch,
                capacity=call.capacity,
                encoder_capacity=call.encoder_capacity,
                mode=mode,
                penalise=call.penalised,
                device=self.device,
                dtype=decoder.embedding.dtype,
            )
        start = start_token(self.model) if self._encoder_decoder else None
        kind = GraphLoop if self.device.type == "cuda" else HostLoop
        self._loops[key] = kind(self.model, decoder, state, rules, start)
        return self._loops[key]

    def require_room(self, front: Front, max_new_tokens: int) -> None:
        """Refuse a call that cannot fit before what comes in front of it, such as a frozen encoder, has run.

        Args:
            front: makes embeddings or encoder states for the engine.
            max_new_tokens: number of tokens after which a row ends in any case.

        Raises:
            UserError: with the batch that would fit.
        """
        decoder = self.decoder
        if decoder is None:
            return
        call_of = functools.partial(self.call_sizes, front.rows, max_new_tokens=max_new_tokens, embedded=True)
        self._with_room(lambda: require_with(front, call_of, self.model, decoder, self._needed))

    def _with_room(self, require_it: Callable[[], None]) -> None:
        """Refuse what cannot fit, after giving up what is kept for other sizes."""
        try:
            require_it()
        except UserError:
            if not self._loops:
                raise
            self.forget()
            require_it()

    def _rules_key(self) -> str:
        """What a kept loop has built in of the generation_config."""
        config = self.model.generation_config
        keys = ("eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id")
        return repr([getattr(config, key) for key in (*keys, "forced_eos_token_id", "decoder_start_token_id")])

    def _by_generate(
        self,
        prompt: _Prompt,
        sampling: Sampling | None,
        max_new: int,
        min_new: int,
        on_first_token: Callable[[], None] | None,
    ) -> Tensor:
        """The same call through `generate()`; tokens are reported at its end."""
        kwargs: dict[str, Any] = {"return_dict_in_generate": False, "num_return_sequences": 1}
        kwargs["do_sample"] = sampling is not None and sampling.temperature > 0
        if sampling is not None:
            kwargs["repetition_penalty"] = sampling.repetition_penalty
            torch.manual_seed(sampling.seed)
        if sampling is not None and sampling.temperature > 0:
            kwargs |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        if prompt.values.dim() == 2:
            kwargs["input_ids"] = prompt.values
        elif self._encoder_decoder:
            kwargs["encoder_outputs"] = _as_encoder_output(prompt.values)
        else:
            kwargs["inputs_embeds"] = prompt.values
        if min_new:
            kwargs["min_new_tokens"] = min_new
        if on_first_token is not None:
            kwargs["stopping_criteria"] = StoppingCriteriaList([FirstToken(on_first_token)])
        ids = self.model.generate(attention_mask=prompt.attention_mask, max_new_tokens=max_new, **kwargs)
        if self._encoder_decoder:
            ids = ids[:, 1:]
        elif prompt.values.dim() == 2:
            ids = ids[:, prompt.length :]
        return ids

    def _verify(self, decoder: Decoder) -> None:
        """Hold three lean steps against the model's own forward on random tokens.

        Raises:
            UnreadableModelError: if the logits differ by more than rounding.
        """
        from llmslm.generation.self_check import relative_difference, tolerance_for

        def difference(batch: int) -> float:
            return relative_difference(self.model, decoder, start_token(self.model) or 0, batch)

        tolerance, compiled = tolerance_for(decoder), self.device.type == "cuda"
        if compiled:  # there are faster kernels for products, which can be done without
            from llmslm.generation import fused_rows
        with fused_rows.left_out() if compiled else contextlib.nullcontext():
            found = difference(2)
        if not found <= tolerance:
            raise UnreadableModelError(
                f"the lean step's logits differ from the model's own by {found:.3g} of their spread"
            )
        if compiled:
            for rows in (1, fused_rows.FEW_ROWS + 1):
                fused_rows.try_out(functools.partial(difference, rows), tolerance)

    def _with_prompts_verified(self, decoder: Decoder) -> Decoder:
        """Hold the lean pass over prompts, where there is one, against the model's own; it can be done without."""
        if self.device.type != "cuda" or self._encoder_decoder:
            return decoder
        from llmslm.generation import fused_rows
        from llmslm.generation.self_check import prompt_difference, reason_against, tolerance_for

        def difference() -> float:
            return prompt_difference(self.model, decoder)

        with fused_rows.left_out():
            reason = reason_against(difference, tolerance_for(decoder))
        if reason is None:
            if fused_rows.suits_prompts(decoder.embedding[:1], centred=False):
                fused_rows.try_out(difference, tolerance_for(decoder))
            return decoder
        warnings.warn(f"prompts go through the model's own forward, which is slower: {reason}", stacklevel=3)
        return replace(decoder, reads_prompts=False)


def _as_encoder_output(states: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)
