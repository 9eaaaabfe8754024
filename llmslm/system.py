"""A system as it is used: a model with its codec, loaded from a folder, that turns prompts into predictions."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from llmslm.checkpoint import load_parts
from llmslm.data.codec import IGNORED, Codec, Lengths
from llmslm.errors import UserError
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.int8 import to_int8, weights
from llmslm.generation.memory import Front, Memory, predict, predict_with
from llmslm.generation.products import fast_products
from llmslm.generation.prompt_pass import PromptPass
from llmslm.generation.sampling import Sampling
from llmslm.generation.streaming import FirstToken, TextStream
from llmslm.models.modeling import LlmToSlm, language_model_of

Control = Literal["zero", "shuffled"]


@dataclass(frozen=True)
class Generation:
    """One prediction."""

    text: str
    """The generated text, special tokens left out."""
    tokens: int
    """Tokens produced, end of sequence included."""


@dataclass(frozen=True)
class TargetScore:
    """How likely a target is."""

    nats: float
    """-log p(target | prompt), summed over its tokens."""
    tokens: int
    """Tokens of the target in the system's tokenizer, end of sequence included."""


class System:
    """A trained (or pretrained) llm, slm or llm_to_slm with its tokenizers.

    Args:
        name: "llm", "slm" or "llm_to_slm"; a control adds its own name behind a slash.
        model: the language model or the composition, in eval mode.
        codec: text to ids and back.
        card: what is known of its training (recipe, commit, data fingerprint, seed ...).
        decoder: "engine" decodes with llmslm.generation, whose weights are read once; "generate" with transformers.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        codec: Codec,
        card: dict[str, Any],
        decoder: Literal["engine", "generate"] = "engine",
    ) -> None:
        self.name = name
        self.model = model.eval()
        self.codec = codec
        self.card = card
        self.decoder = decoder
        self._weight = next(model.parameters())  # is where the model is; to look for that takes microseconds
        self._lock = threading.RLock()  # what a graph gives is overwritten by the next call: other threads' wait
        self.generation_settings: dict[str, Any] = {}
        """Further settings of transformers' generate(), where it decodes."""
        if self.language_model.generation_config.pad_token_id is None:
            self.language_model.generation_config.pad_token_id = codec.pad_id

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        encoder_source: str | None = None,
    ) -> Self:
        """Load a run folder, or the system folder inside it.

        Args:
            folder: where the system lies.
            device: where it goes.
            dtype: of the weights; float32 if not given. int8, on the CPU: linear layers of 8 bits, the rest in float32.
            encoder_source: where the encoder lies now, if not where its config says.

        Raises:
            UserError: if the folder holds no system, its encoder cannot be found or is a different one, or the device
                has no weights of 8 bits.
        """
        rounded = dtype == torch.int8
        model, codec, card = load_parts(
            folder, dtype=torch.float32 if rounded else dtype, encoder_source=encoder_source
        )
        model = model.to(device)
        if rounded:  # what was trained to connect both stays as it is: it is small
            for part in (model.encoder, model.slm) if isinstance(model, LlmToSlm) else (model,):
                to_int8(cast(nn.Module, part))
        return cls(card["system"], model, codec, card)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self._weight.device

    @property
    def language_model(self) -> PreTrainedModel:
        """The model that produces tokens: the slm of a composition, or the model itself."""
        return language_model_of(self.model)

    @functools.cached_property
    def engine(self) -> DecodeEngine:
        """Decodes the language model; made at first use."""
        return DecodeEngine(self.language_model)

    @functools.cached_property
    def _prompt_pass(self) -> PromptPass:
        return PromptPass(self.model)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        min_new_tokens: int = 0,
        on_first_token: Callable[[], None] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
        sampling: Sampling | None = None,
    ) -> list[Generation]:
        """Generate from one batch of prompts, as given; greedily where `sampling` is not given.

        Calls from several threads wait for each other.

        Args:
            prompts: texts; the codec adds the prompt template.
            max_new_tokens: the token budget of each prediction.
            min_new_tokens: no end of sequence before this many tokens; equal to max_new_tokens for a fixed length.
            on_first_token: called when the batch's first new token is known.
            on_tokens: called with (batch, n) new tokens on the CPU as they come.
            sampling: how tokens are drawn.

        Raises:
            UserError: if a prompt has no tokens or too many.
        """
        limits = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
        with self._lock:
            new_ids = self._new_tokens(
                prompts, **limits, on_first_token=on_first_token, on_tokens=on_tokens, sampling=sampling
            ).cpu()
        rows: list[list[int]] = new_ids.tolist()
        counts = count_until(rows, self._eos_ids())
        texts = self.codec.decode([row[:count] for row, count in zip(rows, counts, strict=True)])
        return [Generation(text, count) for text, count in zip(texts, counts, strict=True)]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        on_text: Callable[[str], None],
        sampling: Sampling | None = None,
    ) -> Generation:
        """Generate from one prompt; `on_text` gets the text piece by piece, as soon as its characters are whole."""
        text = TextStream(functools.partial(self.codec.slm_tokenizer.decode, skip_special_tokens=True), on_text)

        def on_tokens(tokens: Tensor) -> None:
            text.feed(tokens[0].tolist())

        generation = self.generate([prompt], max_new_tokens=max_new_tokens, on_tokens=on_tokens, sampling=sampling)[0]
        text.finish()
        return generation

    def _new_tokens(self, prompts: Sequence[str], **settings: Any) -> Tensor:
        """Decode one batch: (batch, new_len) ids; settings as for `DecodeEngine.generate`."""
        inputs = self.prefill(prompts, settings["max_new_tokens"] if self.decoder == "engine" else None)
        if self.decoder == "generate":
            return self._by_generate(inputs, **settings)
        return self.engine.generate(**inputs, **settings)

    def _by_generate(
        self,
        inputs: dict[str, Any],
        max_new_tokens: int,
        min_new_tokens: int,
        on_first_token: Callable[[], None] | None,
        on_tokens: Callable[[Tensor], None] | None,
        sampling: Sampling | None,
    ) -> Tensor:
        if on_tokens is not None or sampling is not None:
            raise UserError('streams and samples come from the engine; load the system with decoder="engine"')
        inputs = dict(inputs)
        stopping = StoppingCriteriaList(inputs.pop("stopping_criteria", []))
        if on_first_token:
            stopping.append(FirstToken(on_first_token))
        config = GenerationConfig.from_dict(
            self.language_model.generation_config.to_dict()
            | {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens or None, "max_length": None}
            | {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
            | {"pad_token_id": self.codec.pad_id, "eos_token_id": self._eos_ids()}
            | self.generation_settings
        )
        ids = self.language_model.generate(**inputs, generation_config=config, stopping_criteria=stopping)
        return self._new_ids(ids, inputs)

    def prefill(self, prompts: Sequence[str], max_new_tokens: int | None = None) -> dict[str, Any]:
        """Tokenise prompts and, for a composition, encode, project and fuse: what the language model starts from.

        Args:
            prompts: texts.
            max_new_tokens: that the engine will decode from it, which takes prompts from the host; what does not fit
                into memory then is refused first.
        """
        if max_new_tokens is None:
            batch = {name: value.to(self.device) for name, value in self._prompt_batch(prompts).items()}
            if not isinstance(self.model, LlmToSlm):
                return batch
            with fast_products(self.device):
                return self.model.slm_inputs(**batch)
        if not isinstance(self.model, LlmToSlm):
            return self._prompt_batch(prompts)
        batch = self._prompt_batch(prompts, self._prompt_pass.lengths)
        if not self._prompt_pass.is_captured(batch):  # to ask a device for its room takes long beside a short call
            self.engine.require_room(self._front(batch), max_new_tokens)
        with fast_products(self.device):
            return self._prompt_pass(batch)

    def predicted_memory(self, prompts: Sequence[str], max_new_tokens: int) -> Memory | None:
        """Predict the bytes at the peak of `generate` with the engine; None if the engine cannot read the model."""
        batch, engine = self._prompt_batch(prompts), self.engine
        if engine.decoder is None:
            return None
        call_of = functools.partial(engine.call_sizes, len(prompts), max_new_tokens=max_new_tokens)
        if isinstance(self.model, LlmToSlm):
            embedded = functools.partial(call_of, embedded=True)
            return predict_with(self._front(batch), embedded, engine.model, engine.decoder)[0]
        return predict(engine.model, engine.decoder, call_of(batch["input_ids"].shape[1]))

    def _prompt_batch(self, prompts: Sequence[str], lengths: Lengths | None = None) -> dict[str, Tensor]:
        """Tokenise prompts; what is small and padded further is the host's until a model reads it."""
        return self.codec.collate_prompts(self.codec.encode(prompts), lengths)

    def _front(self, batch: dict[str, Tensor]) -> Front:
        """What a composition does before its slm decodes."""
        return Front(self.model, "slm_inputs", batch, self._prompt_pass.stack)

    @torch.inference_mode()
    def log_likelihood(self, prompts: Sequence[str], targets: Sequence[str]) -> list[TargetScore]:
        """Score one batch of targets given their prompts; targets are cut at the format's max_target_tokens."""
        batch = self.codec.collate(self.codec.encode(prompts, targets))
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        labels = batch["labels"]
        logits = self.model(**batch).logits
        if not self.codec.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        nats = losses.double().sum(1).tolist()
        tokens = (labels != IGNORED).sum(1).tolist()
        return [TargetScore(*pair) for pair in zip(nats, tokens, strict=True)]

    def parameters(self) -> dict[str, int]:
        """Count parameters: in total, those that training changed, and those read for each generated token."""
        encoder = self.model.encoder if isinstance(self.model, LlmToSlm) else None
        frozen = sum(p.numel() for p in weights(encoder)) if encoder is not None else 0
        total = sum(p.numel() for p in weights(self.model))
        decoder = self.language_model
        if decoder.config.is_encoder_decoder:
            head = decoder.get_output_embeddings()
            parts = [*weights(decoder.get_decoder()), *(weights(head) if head is not None else [])]
            decoding = sum({id(p): p.numel() for p in parts}.values())
        else:
            decoding = sum(p.numel() for p in weights(decoder))
        if isinstance(self.model, LlmToSlm):
            decoding += sum(p.numel() for p in self.model.fusion.step_parameters())
        trained = self.card.get("trained_parameters") or total - frozen
        return {"total": total, "trained": trained, "decoding": decoding}

    def with_features(self, control: Control) -> "System":
        """Return this system with the encoder's message destroyed, as a control.

        "zero" sets the projected states to zero; "shuffled" gives each prompt the states of the one before it in the
        batch, the first one those of the last: batches of one prompt are refused.
        """
        return _ControlSystem(self, control)

    def _eos_ids(self) -> list[int]:
        eos = self.language_model.generation_config.eos_token_id
        eos = self.codec.slm_tokenizer.eos_token_id if eos is None else eos
        return list(eos) if isinstance(eos, list | tuple) else [int(eos)]

    def _new_ids(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Drop what generate() returns in front of the new tokens: the decoder's start or the prompt's ids."""
        if self.codec.is_encoder_decoder:
            return ids[:, 1:]
        return ids[:, inputs["input_ids"].shape[1] :] if "input_ids" in inputs else ids


class _ControlSystem(System):
    """A llm_to_slm system whose projected states are replaced; everything else is shared with the original."""

    def __init__(self, system: System, control: Control) -> None:
        name = f"{system.name}/{control}_features"
        super().__init__(name, system.model, system.codec, system.card, system.decoder)
        self._original, self._control = system, control
        self._lock = system._lock  # of the engine that both use

    @functools.cached_property
    def engine(self) -> DecodeEngine:
        """The original's."""
        return self._original.engine

    @functools.cached_property
    def _prompt_pass(self) -> PromptPass:
        """With graphs of its own, since they hold what is put in place of the features."""
        return self._original._prompt_pass.twin()

    def prefill(self, prompts: Sequence[str], max_new_tokens: int | None = None) -> dict[str, Any]:
        """Run the prefill with the projector's output replaced."""
        with self._replaced_features():
            return super().prefill(prompts, max_new_tokens)

    def log_likelihood(self, prompts: Sequence[str], targets: Sequence[str]) -> list[TargetScore]:
        """Score with the projector's output replaced."""
        with self._replaced_features():
            return super().log_likelihood(prompts, targets)

    @contextlib.contextmanager
    def _replaced_features(self) -> Iterator[None]:
        handle = self.model.projector.register_forward_hook(lambda _module, _args, states: self._replace(states))
        try:
            yield
        finally:
            handle.remove()

    def _replace(self, states: Tensor) -> Tensor:
        if self._control == "zero":
            return torch.zeros_like(states)
        if states.shape[0] < 2:
            raise UserError(
                "shuffled features are those of another prompt in the batch; give at least 2 (--batch-size)"
            )
        return states.roll(1, dims=0)


def count_until(rows: Sequence[Sequence[int]], eos_ids: Sequence[int]) -> list[int]:
    """Count the tokens of each row up to and including the first end of sequence."""
    return [min((row.index(eos) + 1 for eos in eos_ids if eos in row), default=len(row)) for row in rows]
