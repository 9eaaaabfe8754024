"""The choice of the next token on the device: by what the caller and the model's generation_config ask for."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from llmslm.errors import UserError
from llmslm.generation.state import DecodeState

# Settings of a generation_config that change the tokens and that the engine leaves to `generate()`.
_LEFT_TO_GENERATE = (
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "exponential_decay_length_penalty",
    "watermarking_config",
    "constraints",
    "force_words_ids",
    "stop_strings",
    "max_time",
    "penalty_alpha",
    "dola_layers",
    "remove_invalid_values",
)
_NEUTRAL = {"encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "num_beams": 1}


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; without it, the most probable one is taken.

    Args:
        temperature: divides the logits; 0 takes the most probable token.
        top_k: number of most probable tokens that may be drawn; 0 allows all.
        top_p: smallest set of most probable tokens whose mass reaches this may be drawn; 1 allows all.
        repetition_penalty: divides positive (multiplies negative) logits of tokens already seen; 1 changes nothing.
        seed: of the random generator, set anew at each call.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": 0 <= self.temperature < float("inf"),
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        for key, holds in bounds.items():
            if not holds:
                raise UserError(
                    f"{key}={getattr(self, key)} was given; temperature and top_k must be 0 or more and finite, "
                    f"top_p in (0, 1], repetition_penalty above 0; change {key}"
                )


def reason_for_generate(config: GenerationConfig) -> str | None:
    """Name the setting of a generation_config that only `generate()` honours, or None."""
    for key in _LEFT_TO_GENERATE:
        if getattr(config, key, None):
            return f"generation_config.{key}={getattr(config, key)!r}"
    for key, neutral in _NEUTRAL.items():
        if getattr(config, key, None) not in (None, neutral):
            return f"generation_config.{key}={getattr(config, key)!r}"
    return None


def start_token(model: PreTrainedModel) -> int | None:
    """The token that an encoder-decoder model starts with, as its generation_config says; None if it names none."""
    config = model.generation_config
    start = config.decoder_start_token_id
    start = config.bos_token_id if start is None else start
    known = isinstance(start, int) and 0 <= start < model.get_output_embeddings().weight.shape[0]
    return start if known else None


def _ids(value: int | list[int] | Tensor | None, vocabulary: int) -> list[int]:
    """The ids that there are: configs name others too, such as -1, which no logit stands for."""
    if value is None:
        return []
    ids = value.flatten().tolist() if isinstance(value, Tensor) else [value] if isinstance(value, int) else value
    return [int(item) for item in ids if 0 <= item < vocabulary]


class TokenRules:
    """Which token follows from the logits, and what it changes in the state; a model's generation_config is honoured.

    Args:
        config: the model's generation_config.
        vocabulary: number of logits; ids beyond it are as good as not given.
        encoder_decoder: whether forced_bos_token_id applies (to the token after the start token).
        device: where the state lies.
    """

    def __init__(
        self, config: GenerationConfig, *, vocabulary: int, encoder_decoder: bool, device: torch.device
    ) -> None:
        def known(key: str) -> list[int]:
            return _ids(getattr(config, key), vocabulary)

        self.ends = known("eos_token_id")
        self.pad = next(iter(known("pad_token_id") + self.ends), 0)
        self.eos = torch.tensor(self.ends, dtype=torch.long, device=device)
        self.suppress = torch.tensor(known("suppress_tokens"), dtype=torch.long, device=device)
        self.begin_suppress = torch.tensor(known("begin_suppress_tokens"), dtype=torch.long, device=device)
        self.forced_bos = next(iter(known("forced_bos_token_id")), None) if encoder_decoder else None
        self.forced_eos = next(iter(known("forced_eos_token_id")), None)
        self.repetition_penalty = config.repetition_penalty or 1.0

    @property
    def plain(self) -> bool:
        """Whether the most probable token is taken, except that an end may be put off by min_new_tokens."""
        forced = self.forced_bos is not None or self.forced_eos is not None
        suppressed = self.suppress.numel() > 0 or self.begin_suppress.numel() > 0
        return not forced and not suppressed and self.repetition_penalty == 1.0

    def mode(self, sampling: Sampling | None) -> str:
        """Name the kind of step that these rules need: "plain", "greedy" or "sampled"."""
        if sampling is not None and sampling.temperature > 0:
            return "sampled"
        return "plain" if self.plain and (sampling is None or sampling.repetition_penalty == 1.0) else "greedy"

    def choose(self, logits: Tensor, state: DecodeState) -> None:
        """Pick the next token of each row from logits (batch, vocabulary) and advance the state, on the device."""
        scores = self.processed(logits.float(), state.step, state.min_new, seen=state.seen, penalty=state.penalty)
        token = _drawn(scores, state) if state.mode == "sampled" else scores.argmax(dim=-1)
        if self.forced_bos is not None:
            token = torch.where(state.step == 0, self.forced_bos, token)
        if self.forced_eos is not None:
            token = torch.where(state.step == state.max_new - 1, self.forced_eos, token)
        state.advance(token, eos=self.eos, pad=self.pad)

    def processed(
        self,
        scores: Tensor,
        step: Tensor,
        min_new: Tensor | int,
        *,
        seen: Tensor | None = None,
        penalty: Tensor | float = 1.0,
    ) -> Tensor:
        """Apply what changes or forbids tokens, except forced ones, to scores (rows, vocabulary).

        Args:
            scores: logits in float32.
            step: (rows,) tokens produced before the one that is chosen.
            min_new: number of tokens before which no row ends.
            seen: (rows, vocabulary) tokens that the penalty hits.
            penalty: divides positive and multiplies negative logits of what was seen.
        """
        if seen is not None:
            penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(seen, penalised, scores)
        step = step[:, None]
        low = float("-inf")
        if self.eos.numel():
            ends = scores[:, self.eos]
            scores = scores.index_copy(1, self.eos, ends.masked_fill(step < min_new, low))
        if self.suppress.numel():
            scores = scores.index_fill(1, self.suppress, low)
        if self.begin_suppress.numel():
            first = 0 if self.forced_bos is None else 1
            begins = scores[:, self.begin_suppress]
            scores = scores.index_copy(1, self.begin_suppress, begins.masked_fill(step == first, low))
        return scores


def cut(
    scores: Tensor, temperature: Tensor | float, top_k: Tensor | int, top_p: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Mass (rows, vocabulary) left by both cuts, in descending order, and the tokens it belongs to; one sort serves.

    The mass is the softmax of scores / temperature over the top_k; what top_p cuts off is zero, the rest as it was.
    """
    # Below the largest one before the division: a small temperature would make it infinite.
    below = scores - scores.amax(dim=-1, keepdim=True)
    ordered, order = (below / temperature).sort(dim=-1, descending=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    mass = ordered.masked_fill(rank >= top_k, float("-inf")).softmax(dim=-1)
    return mass.masked_fill(mass.cumsum(dim=-1) - mass >= top_p, 0.0), order


def _drawn(scores: Tensor, state: DecodeState) -> Tensor:
    """Draw from the softmax of scores / temperature, cut to top_k and top_p."""
    mass, order = cut(scores, state.temperature, state.top_k, state.top_p)
    noise = torch.empty_like(mass).exponential_(generator=state.generator)
    return order.gather(-1, (mass / noise).argmax(dim=-1, keepdim=True)).squeeze(-1)
