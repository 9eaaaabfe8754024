"""Systems to compare with: any model of transformers, and what makes an llm decode sooner without any training."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, MinNewTokensLengthLogitsProcessor, StoppingCriteria

from llmslm.checkpoint import codec_for
from llmslm.data.codec import TextFormat
from llmslm.data.tokenizer import load_tokenizer, same_tokenizer
from llmslm.errors import UserError
from llmslm.models.language_model import ModelSource, load_language_model
from llmslm.system import System
from llmslm.verified_system import VerifiedSystem

_NO_TOKEN = 2**31 - 1
"""An id that no vocabulary has."""


class PretrainedSystem(System):
    """A language model of transformers as it comes, by its hub name or folder.

    Args:
        source: hub name, or a folder in the hub's format with its tokenizer.
        name: in records; the last part of `source` by default.
        text_format: how prompts are written and where they and targets end.
        decoder: "engine" or transformers' own "generate".
        device: torch device.
        dtype: float32 or bfloat16.
        revision: of a hub repository.

    Raises:
        UserError: if there is no such model.
    """

    def __init__(
        self,
        source: str,
        name: str | None = None,
        text_format: TextFormat | None = None,
        decoder: Literal["engine", "generate"] = "engine",
        device: str = "cpu",
        dtype: str = "float32",
        revision: str | None = None,
    ) -> None:
        key = "a system to compare with (--systems): model"
        model = load_language_model(ModelSource(source, revision), None, key, getattr(torch, dtype))
        codec = codec_for(model, load_tokenizer(source), None, text_format or TextFormat())
        card = {"source": source, "revision": revision or getattr(model.config, "_commit_hash", None)}
        super().__init__(name or Path(source).name, model.to(device), codec, card, decoder)


class GenerateSystem(System):
    """An llm decoded by transformers' `generate()`, with further arguments of it.

    Args:
        name: in records.
        llm: the system whose weights and texts it shares.
        one_by_one: decode the rows of a batch one after the other, where `generate` takes one only.
        arguments: of `generate`, beside its settings.
        settings: of the generation config, for example cache_implementation="static".
    """

    def __init__(
        self,
        name: str,
        llm: System,
        *,
        one_by_one: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(name, llm.model, llm.codec, llm.card, "generate")
        self.one_by_one = one_by_one
        self.generation_settings = settings
        self._arguments = dict(arguments or {})

    def _new_tokens(self, prompts: Sequence[str], **settings: Any) -> Tensor:
        if not self.one_by_one:
            return super()._new_tokens(prompts, **settings)
        rows = []
        for prompt in prompts:
            rows.append(super()._new_tokens([prompt], **settings)[0])
            settings["on_first_token"] = None  # the batch's first token is known
        return pad_sequence(rows, batch_first=True, padding_value=self._eos_ids()[0])

    def _by_generate(self, inputs: dict[str, Any], *args: Any, **settings: Any) -> Tensor:
        return super()._by_generate(inputs | self._arguments, *args, **settings)


class AssistedSystem(GenerateSystem):
    """An llm that checks in one pass several tokens that a smaller model drafts.

    Args:
        llm: the system whose predictions these are.
        draft: the system that drafts.
        arguments: further ones of `generate`.
    """

    def __init__(self, llm: System, draft: System, **arguments: Any) -> None:
        arguments |= {"assistant_model": draft.model}
        super().__init__("assisted", llm, one_by_one=True, arguments=arguments)
        self.draft = draft

    def parameters(self) -> dict[str, int]:
        """Count parameters of both."""
        llm, draft = super().parameters(), self.draft.parameters()
        return {name: count + draft[name] for name, count in llm.items()}


def assisted(llm: System, assistant: System) -> AssistedSystem:
    """Let a smaller model draft for the llm (assisted generation); two tokenizers are translated between.

    Raises:
        UserError: if the assistant is a composition, which transformers cannot let draft.
    """
    if assistant.language_model is not assistant.model:
        raise UserError("an llm_to_slm system cannot assist in transformers; the slm does, and peer verified drafts so")
    own, other = llm.codec.slm_tokenizer, assistant.codec.slm_tokenizer
    between = {} if same_tokenizer(own, other) else {"tokenizer": own, "assistant_tokenizer": other}
    return AssistedSystem(llm, assistant, **between)


class PromptLookupSystem(GenerateSystem):
    """An llm that checks what followed the last words where they stood before (prompt lookup).

    The end of sequence that may end a prompt is told here from the one that ends a text: transformers 5.17 does not,
    and returns no token where nothing is found to draft behind such a prompt.

    Args:
        llm: the system whose predictions these are.
        tokens: drafted at a time.
    """

    def __init__(self, llm: System, tokens: int) -> None:
        super().__init__("prompt_lookup", llm, one_by_one=True, prompt_lookup_num_tokens=tokens)
        self._ends_behind = not self.language_model.config.is_encoder_decoder
        if self._ends_behind:
            self.generation_settings |= {"eos_token_id": _NO_TOKEN, "min_new_tokens": None}

    def _by_generate(self, inputs: dict[str, Any], *args: Any, **settings: Any) -> Tensor:
        if not self._ends_behind:
            return super()._by_generate(inputs, *args, **settings)
        ids, eos, least = inputs["input_ids"], self._eos_ids(), settings["min_new_tokens"]
        longer = MinNewTokensLengthLogitsProcessor(ids.shape[1], least, eos, device=ids.device)
        further = {
            "stopping_criteria": [EndsBehind(ids.shape[1], eos)],
            "logits_processor": LogitsProcessorList([longer]),
        }
        return super()._by_generate(inputs | further, *args, **settings)


class EndsBehind(StoppingCriteria):
    """Ends a text at an end of sequence behind its prompt.

    Args:
        length: tokens of the prompt.
        eos: ids that end a text.
    """

    def __init__(self, length: int, eos: Sequence[int]) -> None:
        self._length, self._eos = length, torch.tensor(eos)

    def __call__(self, input_ids: Tensor, _scores: Any, **_kwargs: Any) -> Tensor:
        """Say of each row of (batch, length) ids whether it has ended."""
        return torch.isin(input_ids[:, self._length :], self._eos.to(input_ids.device)).any(dim=1)


def prompt_lookup(llm: System, tokens: int = 10) -> PromptLookupSystem:
    """Let the llm's own text draft: what followed the last words where they stood before (prompt lookup)."""
    return PromptLookupSystem(llm, tokens)


def verified(llm: System, llm_to_slm: System) -> VerifiedSystem:
    """Let llm_to_slm draft for the llm that its encoder was taken from.

    The drafting slm is a copy: the encoder of `llm_to_slm` itself stays its own, or it would pass through all of the
    llm's layers from now on.
    """
    model: Any = llm_to_slm.model
    encoder, model.encoder = model.encoder, None
    try:
        twin = copy.deepcopy(model)
    finally:
        model.encoder = encoder
    return VerifiedSystem(llm, System(llm_to_slm.name, twin, llm_to_slm.codec, llm_to_slm.card))
