"""Several examples in one row: what keeps them apart in a model, and whether it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.errors import UserError

_LENGTH = 4


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


def encoder_decoder_inputs(documents: Tensor, target_documents: Tensor) -> dict[str, Tensor]:
    """Return the masks of a packed encoder-decoder, as transformers takes them: attention, decoder and cross.

    Args:
        documents: (batch, input_len), see `document_mask`.
        target_documents: (batch, target_len), likewise.
    """
    return {
        "attention_mask": document_mask(documents, documents),
        "decoder_attention_mask": document_mask(target_documents, target_documents, causal=True),
        "cross_attention_mask": document_mask(target_documents, documents),
    }


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
def check_packing(model: PreTrainedModel) -> None:
    """Run a model on an example alone and behind another one: its logits must agree.

    Of a decoder-only model, transformers makes the mask from positions that start again at 0. A model that ignores
    them, or counts absolute positions by itself, sees another example than it would alone.

    Raises:
        UserError: if they do not agree.
    """
    was_training = model.training
    model.eval()
    first, second = torch.arange(1, 1 + 2 * _LENGTH, device=model.device).view(2, 1, _LENGTH)
    both = torch.cat([first, second], 1)
    if model.config.is_encoder_decoder:
        alone = model(input_ids=second, decoder_input_ids=second, use_cache=False).logits
        documents = torch.arange(2, device=model.device).repeat_interleave(_LENGTH).unsqueeze(0)
        masks = encoder_decoder_inputs(documents, documents)
        with cross_attending(model, masks.pop("cross_attention_mask")):
            packed = model(input_ids=both, decoder_input_ids=both, use_cache=False, **masks).logits
    else:
        positions = torch.arange(_LENGTH, device=model.device).unsqueeze(0)
        alone = model(input_ids=second, position_ids=positions, use_cache=False).logits
        packed = model(input_ids=both, position_ids=positions.repeat(1, 2), use_cache=False).logits
    model.train(was_training)
    error = (packed[:, _LENGTH:] - alone).norm() / alone.norm()
    if not error < 0.02:  # rounding alone stays below, also in bf16; another example's tokens do not
        raise UserError(
            f"{model.config.model_type} does not keep packed examples apart (relative error {error:.2g}); "
            "leave data.pack_tokens out"
        )
