"""Logits of a batch's targets, teacher-forced: the same for all systems, packed or not, in training and before it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmslm.data.codec import IGNORED, target_positions
from llmslm.models.head import logits_at
from llmslm.models.packing import causal_inputs, cross_attending, decoder_masks, document_mask


def target_logits(model: PreTrainedModel, batch: Mapping[str, Any], pad_id: int) -> tuple[Tensor, Tensor]:
    """Run a system on a training batch.

    Args:
        model: any of the three systems'.
        batch: tensors of `Codec.collate` or `Codec.collate_packed`, beside them those of `targets_of` if known.
        pad_id: what stands for ignored labels among a decoder's inputs.

    Returns:
        logits (n, vocabulary) of the n target tokens, row by row, and their ids (n,), -100 = ignored.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    labels = tensors.pop("labels")
    rows, columns = tensors.pop("target_positions") if "target_positions" in batch else target_positions(labels)
    targets = tensors.pop("target_ids") if "target_ids" in batch else labels[rows, columns]
    cross = None
    if model.config.is_encoder_decoder:
        ends = tensors.pop("target_documents", None)
        tensors["decoder_input_ids"] = shift_right(labels, model.config.decoder_start_token_id, pad_id, ends)
        if ends is not None:
            documents = tensors["documents"]
            tensors["decoder_attention_mask"], cross = decoder_masks(documents, ends)
            if "prompt_documents" not in tensors:  # a composition masks what the slm's own encoder reads
                del tensors["documents"]
                tensors["attention_mask"] = document_mask(documents, documents)
    else:
        columns = columns - 1  # the position before a target predicts it
        if "documents" in tensors and "prompt_documents" not in tensors:
            starts = tensors.pop("document_starts", None)
            tensors |= causal_inputs(model.config, tensors.pop("documents"), starts)
    with logits_at(model, rows, columns, labels.shape[1]), cross_attending(model, cross):
        logits: Tensor = model(**tensors, use_cache=False).logits[0]
    return logits, targets


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy in nats, computed in float32, of logits (n, vocabulary) and targets (n,).

    Targets of -100 are ignored.
    """
    if torch.compiler.is_compiling():
        return _fusible_cross_entropy(logits.float(), targets, label_smoothing)
    return nn.functional.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def _fusible_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Compute `cross_entropy`, written so that its gradient is element-wise.

    So the compiler's backward is one kernel that reads the logits once and writes their gradient. That of torch's own
    function with label smoothing stores a gradient of all logits in float32 as well. Eagerly torch's own is faster.
    """
    top = logits.detach().amax(1, keepdim=True)
    mass = (logits - top).exp().sum(1, keepdim=True)  # with amax it is one read of the logits
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    expected = torch.where(is_target, logits, 0.0).sum(1, keepdim=True) - top
    if label_smoothing:
        expected = (1 - label_smoothing) * expected + label_smoothing * (logits.mean(1, keepdim=True) - top)
    losses = (mass.log() - expected).squeeze(1)
    is_counted = targets != IGNORED
    return torch.where(is_counted, losses, 0.0).sum() / is_counted.sum()


def shift_right(labels: Tensor, start_id: int, pad_id: int, documents: Tensor | None = None) -> Tensor:
    """Turn labels (batch, target_len) into a decoder's inputs: the start token, then the targets but the last.

    With documents (batch, target_len), the number of each position's target in its row, each of them is shifted.
    """
    shifted = labels.roll(1, dims=1)
    if documents is not None:
        shifted = shifted.masked_fill(documents != documents.roll(1, dims=1), start_id)
    shifted[:, 0] = start_id
    return shifted.masked_fill(shifted == IGNORED, pad_id)
