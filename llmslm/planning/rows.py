"""A batch of full rows, with the tensors that training's collator makes of a recipe's data."""

from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.data.codec import IGNORED
from llmslm.models.modeling import LlmToSlm, language_model_of
from llmslm.models.packing import document_positions
from llmslm.planning.job import Job

Tensors = dict[str, Tensor]
_UNPACKED = ("input_ids", "labels", "target_positions", "target_ids", "prompt_ids", "hidden_states")


def batch(model: PreTrainedModel, job: Job, device: torch.device | str = "cpu") -> Tensors:
    """Make a batch as `Codec.collate_packed` (or `Codec.collate`, where rows are not packed) and `targets_of` do.

    Packed rows hold as many examples as fit, each with its share of the row's prompt and of its target.
    """
    prompts, targets = (_shares(total, job.examples(model)) for total in job.lengths(model))
    rows_of = _two_sides if model.config.is_encoder_decoder else _one_side
    tensors = rows_of(job.rows, prompts, targets, language_model_of(model).config.vocab_size)
    if isinstance(model, LlmToSlm):
        tensors |= _encoder_side(model, job, prompts)
        if not model.config.is_encoder_decoder:
            tensors["on_prompt"] = (tensors["labels"] == IGNORED).long()
        if model.prompt_layout == "states":  # nobody reads a token
            tensors["input_ids"] = tensors["input_ids"][:, :1].contiguous()
    if not job.packs(model):
        tensors = {name: tensor for name, tensor in tensors.items() if name in _UNPACKED}
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
        if "prompt_ids" in tensors:
            tensors["prompt_attention_mask"] = torch.ones_like(tensors["prompt_ids"])
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def states_width(model: LlmToSlm) -> int:
    """Return the width of the encoder's states, of all layers that are read."""
    layer = model.config.encoder_layer
    width: int = model.projector.encoder_hidden_size
    return width * (len(layer) if isinstance(layer, list) else 1)


def _one_side(rows: int, prompts: list[int], targets: list[int], vocabulary: int) -> Tensors:
    """Of a decoder-only model: each target behind its prompt."""
    lengths = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
    ids = _tokens(rows, sum(lengths), vocabulary)
    is_target = [i >= prompt for prompt, length in zip(prompts, lengths, strict=True) for i in range(length)]
    documents = _documents(rows, lengths)
    begins = [0, *accumulate(lengths * rows)]
    room = [ids.numel()] * rows  # the data's rows end in padding
    return {
        "input_ids": ids,
        "documents": documents,
        "document_starts": torch.tensor(begins + room, dtype=torch.int32),
        "position_ids": document_positions(documents),
    } | _targets(ids, is_target)


def _two_sides(rows: int, prompts: list[int], targets: list[int], vocabulary: int) -> Tensors:
    """Of an encoder-decoder."""
    written = _tokens(rows, sum(targets), vocabulary)
    return {
        "input_ids": _tokens(rows, sum(prompts), vocabulary),
        "documents": _documents(rows, prompts),
        "target_documents": _documents(rows, targets),
    } | _targets(written, [True] * sum(targets))


def _encoder_side(model: LlmToSlm, job: Job, prompts: list[int]) -> Tensors:
    """What the frozen encoder reads, or its states where they were stored before."""
    encoder = model.slm if model.encoder is None else model.encoder
    ids = _tokens(job.rows, sum(prompts), encoder.config.vocab_size)
    side = {"prompt_ids": ids, "prompt_documents": _documents(job.rows, prompts)}
    if model.encoder is None:
        dtype = torch.bfloat16 if job.mixed else None
        side["hidden_states"] = torch.zeros(*ids.shape, states_width(model), dtype=dtype)
    return side


def _targets(ids: Tensor, is_target: list[bool]) -> Tensors:
    """Labels (rows, len) of the ids that are targets, the same in all rows, and what `targets_of` finds in them."""
    rows = len(ids)
    columns = [column for column, one in enumerate(is_target) if one]
    labels = ids.masked_fill(~torch.tensor(is_target), IGNORED)
    places = torch.stack([torch.arange(rows).repeat_interleave(len(columns)), torch.tensor(columns).repeat(rows)])
    return {"labels": labels, "target_positions": places, "target_ids": labels[*places]}


def _documents(rows: int, lengths: list[int]) -> Tensor:
    row = [number for number, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(row).repeat(rows, 1)


def _tokens(rows: int, length: int, vocabulary: int) -> Tensor:
    """Return ids (rows, length) that differ: of one alone, all gradients of embeddings would go to one place."""
    return torch.arange(rows * length).remainder(vocabulary).view(rows, length)


def _shares(total: int, count: int) -> list[int]:
    """Divide tokens among examples."""
    return [total * (i + 1) // count - total * i // count for i in range(count)]
