"""Several examples in one row: what keeps them apart in a model, and whether it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from llmslm.errors import UserError
from llmslm.models import document_attention

_FIRST, _SECOND = 3, 5  # tokens of the two examples of a check


def document_mask(queries: Tensor, keys: Tensor, *, causal: bool = False) -> Tensor:
    """Let each position attend to its own document.

    Args:
        queries: (batch, query_len), each position's document, -1 = padding.
        keys: (batch, key_len), likewise.
        causal: whether positions after the query are hidden; the two lengths are then the same.

    Returns:
        (batch, 1, query_len, key_len), True = attend. Padding attends to everything: a position that attends to
        nothing would be NaN.
    """
    mask = queries.unsqueeze(-1) == keys.unsqueeze(-2)
    if causal:
        mask = mask.tril()
    return (mask | (queries == -1).unsqueeze(-1)).unsqueeze(1)


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to scores: 0 where `seen`, else the lowest value; eager attention takes no other."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def causal_inputs(config: PreTrainedConfig, documents: Tensor, starts: Tensor | None) -> dict[str, Any]:
    """Return what keeps apart the examples of a decoder-only model's rows beside positions that start again.

    From the positions transformers finds the examples, too; but then it asks the device first whether there are any, at
    each step, and the host waits until all that was begun is done. It still does so for models with windows, whose
    masks differ from layer to layer, and for attention that takes no mask.

    Args:
        config: of the model.
        documents: (batch, len), see `document_mask`.
        starts: where each document begins; see `llmslm.models.document_attention.attend`.
    """
    within = config._attn_implementation == document_attention.NAME
    if document_attention.has_windows(config) or not (within or config._attn_implementation == "sdpa"):
        return {}
    mask = {"attention_mask": document_mask(documents, documents, causal=True)}
    return mask | ({"cu_seq_lens_q": starts, "max_length_q": documents.shape[1]} if within else {})


def document_positions(documents: Tensor) -> Tensor:
    """Count from 0 in each document, and in the padding, of (batch, len); the same shape."""
    column = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return column - torch.where(begins, column, 0).cummax(1).values


def decoder_masks(documents: Tensor, target_documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the decoder of a packed encoder-decoder attends by: to its own positions, and to those it reads.

    Args:
        documents: (batch, input_len), of what it reads; see `document_mask`.
        target_documents: (batch, target_len), likewise.
    """
    return document_mask(target_documents, target_documents, causal=True), document_mask(target_documents, documents)


@contextmanager
def cross_attending(model: PreTrainedModel, mask: Tensor | None) -> Iterator[None]:
    """Within it, the decoder attends to the encoder by this mask; models take one mask for both of its uses.

    Args:
        model: an encoder-decoder.
        mask: (batch, 1, target_len, input_len), True = attend; None changes nothing.
    """
    if mask is None:
        yield
        return

    def replace(
        _module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return inputs, kwargs | {"encoder_attention_mask": mask}

    handle = model.get_decoder().register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def check_packing(model: PreTrainedModel, *, reads_states: bool = False, stored_width: int | None = None) -> None:
    """Run a model on an example alone and behind another one: its logits must agree.

    A model that ignores masks and positions that start again at 0, or counts absolute positions by itself, sees another
    example than it would alone.

    Args:
        model: any of the three systems'.
        reads_states: whether it is a composition, which a frozen encoder's states reach.
        stored_width: width of these states where they are stored, and the encoder itself is not there.

    Raises:
        UserError: if they do not agree.
    """
    was_training = model.training
    model.eval()
    both = torch.arange(1, 1 + _FIRST + _SECOND, device=model.device).unsqueeze(0)
    second, documents = both[:, _FIRST:], (both > _FIRST).long()
    alone_inputs, inputs, cross = {"input_ids": second}, {"input_ids": both}, None
    if model.config.is_encoder_decoder:
        alone_inputs["decoder_input_ids"], inputs["decoder_input_ids"] = second, both
        inputs["decoder_attention_mask"], cross = decoder_masks(documents, documents)
        if not reads_states:
            inputs["attention_mask"] = document_mask(documents, documents)
    else:
        inputs["position_ids"] = document_positions(documents)
        starts = torch.tensor([0, _FIRST, _FIRST + _SECOND], dtype=torch.int32, device=model.device)
        inputs |= {"document_starts": starts} if reads_states else causal_inputs(model.config, documents, starts)
    if reads_states:
        alone_inputs |= {"prompt_ids": second, "prompt_attention_mask": torch.ones_like(second)}
        inputs |= {"prompt_ids": both, "prompt_documents": documents, "documents": documents}
    if stored_width is not None:
        count = both.numel() * stored_width
        states = torch.linspace(-1, 1, count, device=model.device).sin().view(1, -1, stored_width)
        inputs["hidden_states"], alone_inputs["hidden_states"] = states, states[:, _FIRST:]
    # Blocks that are compiled already would be compiled for these few tokens, and then for rows of any length.
    with torch.compiler.set_stance("force_eager"):
        alone = model(**alone_inputs, use_cache=False).logits
        try:
            with cross_attending(model, cross):
                packed = model(**inputs, use_cache=False).logits
        except (RuntimeError, ValueError, TypeError, IndexError) as problem:
            raise UserError(
                f"{model.config.model_type} cannot read packed examples ({str(problem).splitlines()[0]}); "
                "leave data.pack_tokens out"
            ) from problem
        finally:  # training may go on by another attention
            model.train(was_training)
    error = (packed[:, _FIRST:].float() - alone.float()).norm() / alone.float().norm()
    # Rounding alone stays below, and other kernels round otherwise; another example's tokens do not.
    if not error < (0.02 if alone.dtype == torch.float32 else 0.05):
        raise UserError(
            f"{model.config.model_type} does not keep packed examples apart (relative error {error:.2g}); "
            "leave data.pack_tokens out"
        )
