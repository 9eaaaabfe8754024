"""Holds the lean step of a decoder against the model's own forward, before it is trusted with tokens."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.generation.dispatch import step_for
from llmslm.generation.plan import Decoder
from llmslm.generation.prefill import CausalPrefill, EncodedPrefill
from llmslm.generation.state import DecodeState

_PROMPT, _STEPS = 5, 3


def relative_difference(model: PreTrainedModel, decoder: Decoder, start: int, batch: int = 2) -> float:
    """Norm of the difference of logits over a few steps on random tokens, in units of the norm of their spread."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, _PROMPT + _STEPS)
    ids = torch.randint(0, decoder.shape.vocabulary, shape, generator=generator).to(model.device)
    encoder_decoder = model.config.is_encoder_decoder
    state = DecodeState(
        decoder.shape,
        batch=batch,
        capacity=16,
        encoder_capacity=_PROMPT if encoder_decoder else 0,
        mode="plain",
        penalise=False,
        device=model.device,
        dtype=decoder.embedding.dtype,
    )
    state.valid.fill_(True)
    run = _encoder_decoder if encoder_decoder else _causal
    lean, own = run(model, decoder, state, ids, start)
    lean, own = lean.detach().double(), own.detach().double()
    own_spread = (own - own.mean(dim=-1, keepdim=True)).norm()
    return float((lean - own).norm() / own_spread.clamp(min=1e-9))


def _stepped(decoder: Decoder, state: DecodeState, tokens: Tensor, filled: int) -> Tensor:
    step, logits = step_for(decoder, state), []
    for index, token in enumerate(tokens.unbind(dim=1)):
        state.token.copy_(token)
        logits.append(step.logits(filled + index).clone())
        state.move_on()
    return torch.stack(logits, dim=1)


def _causal(model: Any, decoder: Decoder, state: DecodeState, ids: Tensor, _start: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # one row is shorter than the other
    CausalPrefill(model, decoder, state)(ids[:, :_PROMPT], mask[:, :_PROMPT])
    lean = _stepped(decoder, state, ids[:, _PROMPT:], _PROMPT)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    own = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return lean, own[:, _PROMPT:]


def _encoder_decoder(
    model: Any, decoder: Decoder, state: DecodeState, ids: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(ids[:, :_PROMPT])
    mask[0, -2:] = 0
    prompt, tokens = ids[:, :_PROMPT], ids[:, _PROMPT:].clone()
    tokens[:, 0] = start
    EncodedPrefill(model, decoder, state, start)(prompt, mask)
    lean = _stepped(decoder, state, tokens, 0)
    return lean, model(input_ids=prompt, attention_mask=mask, decoder_input_ids=tokens).logits
