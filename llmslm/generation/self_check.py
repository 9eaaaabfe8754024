"""Holds the lean step of a decoder against the model's own forward, before it is trusted with tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.generation.dispatch import prefill_for, step_for
from llmslm.generation.plan import Decoder
from llmslm.generation.prefill import CausalPrefill, EncodedPrefill, Passed
from llmslm.generation.state import DecodeState
from llmslm.models.encoder import Encoder
from llmslm.models.projector import Projector

ReadingPass = Callable[[Tensor, Tensor], Passed]
"""Of prompts and their mask."""
_PROMPT, _STEPS = 5, 3
_PROMPTS = ((2, 16), (2, 32), (1, 128), (5, 32))
"""Prompts, and their tokens: few tokens go through other kernels than many, and attention has some for each length."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}
_ROUNDED = 0.25  # 8-bit weights: the model's own forward rounds its inputs as well, the step does not


def relative_difference(model: PreTrainedModel, decoder: Decoder, start: int, batch: int = 2) -> float:
    """Norm of the difference of logits over a few steps on random tokens, in units of the norm of their spread."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, _PROMPT + _STEPS)
    ids = torch.randint(0, decoder.shape.vocabulary, shape, generator=generator).to(model.device)
    encoder_decoder = model.config.is_encoder_decoder
    state = _state(decoder, batch, 16, _PROMPT if encoder_decoder else 0)
    state.valid.fill_(True)
    run = _encoder_decoder if encoder_decoder else _causal
    return _difference(*run(model, decoder, state, ids, start))


def prompt_difference(model: PreTrainedModel, decoder: Decoder, shapes: Sequence[tuple[int, int]] = _PROMPTS) -> float:
    """The same of the lean pass over prompts, of ids and of embeddings: its logits, or what it puts into the caches."""
    differences = []
    for shape in shapes:
        ids, mask = _prompts(shape, decoder.shape.vocabulary, model.device, decoder.max_positions)
        for prompt in (ids, model.get_input_embeddings()(ids)):
            logits, caches = [], []
            for kind in (prefill_for, CausalPrefill):
                state = _state(decoder, mask.shape[0], mask.shape[1], 0)
                logits.append(kind(model, decoder, state)(prompt, mask))
                caches.append(_attended(state.cache, mask))
            differences += [_difference(*logits), _difference(*caches)]
    return _largest(differences)


@torch.no_grad()
def reading_difference(
    model: PreTrainedModel, decoder: Decoder, passes: tuple[ReadingPass, ReadingPass], *, embedded: bool
) -> float:
    """The same of the lean pass over right-padded prompts: of its logits, caches, and states on the way.

    Args:
        model: whose prompts they are.
        decoder: of it.
        passes: the lean one, and the model's own.
        embedded: whether they read embeddings, not ids.
    """
    differences = []
    for shape in _PROMPTS:
        ids, mask = _prompts(shape, decoder.shape.vocabulary, model.device, decoder.max_positions)
        mask = mask.flip(1)
        prompt = model.get_input_embeddings()(ids) if embedded else ids
        lean, own = (reads(prompt, mask) for reads in passes)
        assert lean.cache is not None
        assert own.cache is not None
        caches = [torch.stack([torch.stack(tuple(layer)) for layer in cache]) for cache in (lean.cache, own.cache)]
        differences.append(_difference(lean.last, own.last))
        differences.append(_difference(*(_attended(cache, mask) for cache in caches)))
        if lean.states is not None and own.states is not None:
            differences.append(_difference(lean.states[mask.bool()], own.states[mask.bool()]))
    return _largest(differences)


@torch.no_grad()
def encoded_difference(encoder: Encoder, lean: Callable[[Tensor, Tensor], Tensor]) -> float:
    """The same of a lean pass of an encoder over right-padded prompts: of its states."""
    differences = []
    for shape in _PROMPTS:
        ids, mask = _prompts(shape, encoder.model.config.vocab_size, encoder.model.device, encoder.max_positions)
        mask = mask.flip(1)
        own, _ = encoder(ids, mask, mask - 1)
        differences.append(_difference(lean(ids, mask)[mask.bool()], own[mask.bool()]))
    return _largest(differences)


@torch.no_grad()
def projected_difference(projector: Projector, lean: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> float:
    """The same of a lean pass of the projector, on random states of this dtype and their mask."""
    differences, device = [], next(projector.parameters()).device
    for shape in _PROMPTS:
        _, mask = _prompts(shape, 1, device)
        mask, generator = mask.flip(1), torch.Generator().manual_seed(0)
        states = torch.randn(*mask.shape, projector.encoder_hidden_size, generator=generator).to(device, dtype)
        differences.append(_difference(*(passed(states, mask)[mask.bool()] for passed in (lean, projector))))
    return _largest(differences)


def tolerance_for(decoder: Decoder) -> float:
    """How much of a difference is rounding."""
    return _ROUNDED if decoder.head.row_scale is not None else tolerance_of(decoder.embedding.dtype)


def tolerance_of(dtype: torch.dtype) -> float:
    """The same of weights that were not rounded to 8 bits."""
    return _TOLERANCE.get(dtype, 0.05)


def reason_against(measure: Callable[[], float], tolerance: float, what: str = "logits") -> str | None:
    """Say why something that can be done without is not to be trusted: it fails or is wrong; None if it is right.

    Args:
        measure: runs it and returns by how much it is off.
        tolerance: how much of that is rounding.
        what: is off then.
    """
    try:
        off = measure()
    except Exception as error:  # whatever a compiler or a driver has against it
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None if off <= tolerance else f"{what} are off by {off:.3g} of their spread"


def _prompts(
    shape: tuple[int, int], vocabulary: int, device: torch.device, max_positions: int | None = None
) -> tuple[Tensor, Tensor]:
    """Random ids and their mask, (batch, length); the first row is padded on the left.

    Where there are fewer positions there are more rows, so that there are as many tokens.
    """
    batch, length = shape
    if max_positions is not None and max_positions < length:
        batch, length = -(-batch * length // max_positions), max_positions
    ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0
    return ids, mask


def _largest(differences: list[float]) -> float:
    return float(torch.tensor(differences).max())  # NaN if one of them is


def _attended(cache: Tensor, mask: Tensor) -> Tensor:
    """Keys and values (tokens, ...) of the real tokens, from (layers, 2, batch, kv_heads, length, head_dim)."""
    return cache.permute(2, 4, 0, 1, 3, 5)[mask.bool()]


def _state(decoder: Decoder, batch: int, capacity: int, encoder_capacity: int) -> DecodeState:
    return DecodeState(
        decoder.shape,
        batch=batch,
        capacity=capacity,
        encoder_capacity=encoder_capacity,
        mode="plain",
        penalise=False,
        device=decoder.embedding.device,
        dtype=decoder.embedding.dtype,
    )


def _difference(lean: Tensor, own: Tensor) -> float:
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
    state.move_on()
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
