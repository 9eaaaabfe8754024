"""Text to batches and ids to text, for one system: the same code serves training, evaluation and generation."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from llmslm.data.overlap import TokenSpans, kept_text, spans
from llmslm.data.tokenising import description, encode, encode_ids
from llmslm.errors import UserError
from llmslm.models.alignment import HIDES_PROMPT
from llmslm.models.packing import document_positions

IGNORED = -100
Ids = Sequence[int] | np.ndarray
Row = dict[str, list[int]]
Lengths = Callable[[int, Mapping[str, int]], Mapping[str, int]]


@dataclass(frozen=True)
class TextFormat:
    """How a prompt becomes tokens; saved with a system, since decoding must repeat what training did."""

    prompt_template: str = "{prompt}"
    """Text around the prompt, for example "translate English to German: {prompt}"."""
    max_prompt_tokens: int = 512
    """Longest prompt, in the encoder's tokens (special tokens included)."""
    max_target_tokens: int = 128
    """Longest target, in the slm's tokens (end of sequence included); longer targets are cut."""
    truncate_prompt: Literal["left", "right"] | None = None
    """The side from which a longer prompt is cut; None refuses it."""


class BatchSizes(NamedTuple):
    """What a batch holds."""

    examples: int
    prompt: int
    """Tokens of the slm's prompts (of the llm's, in its own system)."""
    target: int
    """Tokens of the targets."""
    encoder_prompt: int
    """Tokens of the frozen encoder's prompts."""
    slots: int
    """All tokens and padding."""

    @property
    def tokens(self) -> int:
        """Count what the batch's models read."""
        return self.prompt + self.target + self.encoder_prompt


class PackedShape(NamedTuple):
    """The shape of a batch of packed rows."""

    rows: int
    capacities: tuple[int, ...]
    """Tokens of a row, on each side of `Codec.packed_sides`."""
    examples: int = 0
    """How many have room in `document_starts`, paddings too; doubled where that is not enough."""
    targets: int = 0
    """How many target tokens have room in `targets_of`; doubled likewise."""


class Codec:
    """Encodes prompts and targets for one system and decodes its predictions.

    Masks come from lengths, never from ids: a padding id that is also the end of sequence does no harm.

    Args:
        slm_tokenizer: tokenizer of the model that decodes.
        encoder_tokenizer: tokenizer of the encoder, where it is not the slm's; needs another layout than "tokens".
        text_format: template and limits.
        is_encoder_decoder: whether the model that decodes is an encoder-decoder.
        decoder_start_token_id: what an encoder-decoder model's decoder starts from; targets do not repeat it.
        has_encoder: whether the system has a frozen encoder (llm_to_slm), whose side the batches then carry.
        prompt_layout: what stands on the slm's prompt positions (see `llmslm.models.alignment`).
        can_pack: whether several examples may share a row of a training batch.
    """

    def __init__(
        self,
        slm_tokenizer: PreTrainedTokenizerBase,
        encoder_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        text_format: TextFormat,
        is_encoder_decoder: bool,
        decoder_start_token_id: int | None = None,
        has_encoder: bool = False,
        prompt_layout: str = "tokens",
        can_pack: bool = True,
    ) -> None:
        if encoder_tokenizer is not None and prompt_layout == "tokens":
            raise UserError(
                "the encoder and the slm have different tokenizers, but the alignment is SameTokenizer; "
                "set model.alignment to Offsets or EncoderTokenizer (llmslm.models.alignment)"
            )
        two_texts = prompt_layout == "own" and encoder_tokenizer is not None
        self._needs_characters = prompt_layout == "offsets" or two_texts
        for tokenizer in (slm_tokenizer, encoder_tokenizer or slm_tokenizer):
            if self._needs_characters and not tokenizer.is_fast:
                raise UserError(
                    f"{type(tokenizer).__name__} does not tell the characters of its tokens, as two tokenizers need; "
                    "use a fast tokenizer, or set model.alignment to llmslm.models.alignment.EncoderTokenizer"
                )
        if "{prompt}" not in text_format.prompt_template:
            raise UserError(
                f"prompt_template {text_format.prompt_template!r} has no {{prompt}} in it (data.prompt_template)"
            )
        if slm_tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer of the model that writes has no end-of-sequence token, so targets would never end; take "
                "one that generates (an encoder-only model can be model.encoder.source alone)"
            )
        self.slm_tokenizer = slm_tokenizer
        self.encoder_tokenizer = encoder_tokenizer
        self.text_format = text_format
        self.is_encoder_decoder = is_encoder_decoder
        self.decoder_start_token_id = decoder_start_token_id
        self.has_encoder = has_encoder
        self.prompt_layout = prompt_layout
        self.can_pack = can_pack
        self.pad_id = _pad_id(slm_tokenizer)
        self.encoder_pad_id = _pad_id(encoder_tokenizer or slm_tokenizer)

    @property
    def packed_sides(self) -> tuple[tuple[str, ...], ...]:
        """The sides of a packed row, each with the columns of an example that stand on it."""
        states = [("prompt_ids",)] if self.has_encoder else []
        if not self.is_encoder_decoder:
            return ("input_prompt_ids", "target_ids"), *states
        prompt = [("input_prompt_ids",)] if self._reads_tokens else []
        return *prompt, *states, ("target_ids",)

    @property
    def _reads_tokens(self) -> bool:
        """Whether the model that decodes reads ids of the prompt, not the projected states alone."""
        return self.prompt_layout != "states"

    def encode(self, prompts: Sequence[str], targets: Sequence[str] | None = None) -> list[Row]:
        """Tokenise texts.

        Returns:
            One row a prompt: `input_prompt_ids` (slm side), `prompt_ids` (encoder side, if there is an encoder),
            `prompt_spans` ("offsets" layout; start and stop of each slm token among the encoder's, one after another),
            `target_ids` (if targets are given, end of sequence included) and `cut_prompt_tokens`, a list of one number:
            the prompt tokens that truncation removed.

        Raises:
            UserError: if a prompt is too long and the format does not say where to cut.
        """
        rows = self._encode_prompts(prompts)
        if targets is not None:
            for row, target_ids in zip(rows, self._encode_targets(targets), strict=True):
                row["target_ids"] = target_ids
        return rows

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make a training batch, right-padded, of rows with lists or arrays of ids.

        Returns:
            input_ids, attention_mask: (batch, input_len); prompt and target for decoder-only, the prompt for
            encoder-decoder models. labels: (batch, input_len) or (batch, target_len), -100 = ignored. With an encoder
            also prompt_ids and prompt_attention_mask, (batch, prompt_len).
        """
        prompts = [row["input_prompt_ids"] for row in rows]
        targets = [row["target_ids"] for row in rows]
        if self.is_encoder_decoder:
            inputs, labels = prompts, targets
        else:
            ignored = [np.full(len(prompt), IGNORED) for prompt in prompts]
            inputs = [np.concatenate(pair) for pair in zip(prompts, targets, strict=True)]
            labels = [np.concatenate(pair) for pair in zip(ignored, targets, strict=True)]
        input_ids, attention_mask = pad(inputs, self.pad_id)
        return self._encoder_side(rows) | {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": pad(labels, IGNORED)[0],
        }

    def sizes(self, rows: Sequence[Mapping[str, Any]], batch: dict[str, Tensor]) -> BatchSizes:
        """Count what a batch holds that was made of these rows."""
        read = {"input_ids": self._reads_tokens, "labels": self.is_encoder_decoder, "prompt_ids": self.has_encoder}
        sides = [name for name, is_read in read.items() if is_read]
        return BatchSizes(
            examples=len(rows),
            prompt=sum(len(row["input_prompt_ids"]) for row in rows) if self._reads_tokens else 0,
            target=sum(len(row["target_ids"]) for row in rows),
            encoder_prompt=sum(len(row["prompt_ids"]) for row in rows) if self.has_encoder else 0,
            slots=sum(batch[side].numel() for side in sides),
        )

    def collate_packed(self, rows: Sequence[Mapping[str, Any]], shape: PackedShape) -> dict[str, Tensor]:
        """Make a training batch of packed rows; each side has its own length.

        Args:
            rows: examples, with lists or arrays of ids, in the order in which they are packed.
            shape: of the batch.

        Returns:
            For decoder-only models input_ids, documents, position_ids and labels, (rows, tokens); positions start at 0
            with each example, and document_starts says where each begins. For encoder-decoder models input_ids and
            documents, (rows, tokens), and labels and target_documents, (rows, target_tokens). With a frozen encoder
            also on_prompt, 1 on the prompts' positions (decoder-only models), and prompt_ids and prompt_documents,
            (rows, prompt_tokens), with the same examples in the same order; where the states alone are read, input_ids
            is (rows, 1) and documents are those of the states. Documents number the examples of a row, -1 = padding.
            Labels of -100 are ignored; there is no attention mask.
        """
        lengths = [[sum(len(row[name]) for name in side) for row in rows] for side in self.packed_sides]
        counts = pack_rows(list(zip(*lengths, strict=True)), shape.capacities)
        if len(counts) > shape.rows:
            raise ValueError(f"{len(rows)} examples take {len(counts)} rows, the batch has {shape.rows}")
        prompts, targets = ([row[name] for row in rows] for name in ("input_prompt_ids", "target_ids"))
        shapes = [(shape.rows, capacity) for capacity in shape.capacities]
        sides = [PackedSide(counts, *of_side) for of_side in zip(lengths, shapes, strict=True)]
        states = sides[-2 if self.is_encoder_decoder else -1]
        batch = self._packed_prompts(rows, counts, states) if self.has_encoder else {}
        if self.is_encoder_decoder:
            batch |= {"labels": sides[-1].put(targets, IGNORED), "target_documents": sides[-1].documents()}
            if self._reads_tokens:
                return batch | {"input_ids": sides[0].put(prompts, self.pad_id), "documents": sides[0].documents()}
            start = torch.full((shape.rows, 1), prompts[0][0])
            return batch | {"input_ids": start, "documents": batch["prompt_documents"]}
        ignored = [np.full(len(prompt), IGNORED) for prompt in prompts]
        both = [part for pair in zip(prompts, targets, strict=True) for part in pair]
        labels = sides[0].put([part for pair in zip(ignored, targets, strict=True) for part in pair], IGNORED)
        documents = sides[0].documents()
        if self.has_encoder:
            batch["on_prompt"] = ((documents >= 0) & (labels == IGNORED)).long()
        return batch | {
            "documents": documents,
            "document_starts": document_starts(documents, shape.examples),
            "input_ids": sides[0].put(both, self.pad_id),
            "position_ids": document_positions(documents),
            "labels": labels,
        }

    def collate_prompts(self, rows: Sequence[Row], lengths: Lengths | None = None) -> dict[str, Tensor]:
        """Make a batch to generate from: prompts alone, left-padded for decoder-only models.

        Args:
            rows: of `encode`.
            lengths: takes the number of rows and the tokens of the longest one, of input_ids, prompt_ids and
                prompt_spans where there are such; returns how long each is to be. As long as the longest if not given.
        """
        columns = {"input_ids": "input_prompt_ids"} | ({"prompt_ids": "prompt_ids"} if self.has_encoder else {})
        wanted: Mapping[str, int] = {}
        if lengths is not None:
            longest = {name: max(len(row[column]) for row in rows) for name, column in columns.items()}
            if self.has_encoder and self.prompt_layout == "offsets":
                longest["prompt_spans"] = max(len(row["prompt_spans"]) for row in rows) // 2
            wanted = lengths(len(rows), longest)
        side: Literal["left", "right"] = "right" if self.is_encoder_decoder else "left"
        prompts = [row["input_prompt_ids"] for row in rows]
        input_ids, attention_mask = pad(prompts, self.pad_id, side, wanted.get("input_ids"))
        return self._encoder_side(rows, wanted) | {"input_ids": input_ids, "attention_mask": attention_mask}

    def decode(self, ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Turn generated ids (batch, len) into texts, special tokens left out."""
        texts: list[str] = self.slm_tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def signature(self) -> str:
        """Hash everything that decides about the rows, for caches of tokenised data."""
        tokenizers = [description(tokenizer) for tokenizer in self._tokenizers()]
        settings = (self.text_format, self.is_encoder_decoder, self.decoder_start_token_id, self.has_encoder)
        text = "\0".join([*tokenizers, repr(settings), self.prompt_layout, str(self.pad_id)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def prompt_signature(self) -> str:
        """Hash everything that decides about the encoder's tokens, for caches of its states."""
        tokenizer, form = self.encoder_tokenizer or self.slm_tokenizer, self.text_format
        text = "\0".join(
            [description(tokenizer), form.prompt_template, str(form.max_prompt_tokens), str(form.truncate_prompt)]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _tokenizers(self) -> list[PreTrainedTokenizerBase]:
        return [t for t in (self.slm_tokenizer, self.encoder_tokenizer) if t is not None]

    def _encode_prompts(self, prompts: Sequence[str]) -> list[Row]:
        tokenizer = self.encoder_tokenizer or self.slm_tokenizer
        texts = [self.text_format.prompt_template.replace("{prompt}", prompt) for prompt in prompts]
        encoded = encode(tokenizer, texts) if self._needs_characters else encode_ids(tokenizer, texts)
        lengths = [len(ids) for ids in encoded.input_ids]
        if max(lengths, default=0) > self.text_format.max_prompt_tokens:
            encoded = self._cut(tokenizer, texts, lengths)
        cuts = [length - len(ids) for length, ids in zip(lengths, encoded.input_ids, strict=True)]
        rows = self._slm_sides(texts, encoded, cuts)
        if 0 in lengths or not all(row["input_prompt_ids"] for row in rows):
            raise UserError("a prompt has no tokens; remove empty prompts from the data, or give a prompt_template")
        for row, ids, cut in zip(rows, encoded.input_ids, cuts, strict=True):
            row["cut_prompt_tokens"] = [cut]
            if self.has_encoder:
                row["prompt_ids"] = ids
        return rows

    def _slm_sides(self, texts: list[str], encoded: BatchEncoding, cuts: list[int]) -> list[Row]:
        """What stands on the slm's prompt positions, from the encoder's side."""
        if self.prompt_layout in HIDES_PROMPT:
            bos = self.slm_tokenizer.bos_token_id
            return [{"input_prompt_ids": [self.slm_tokenizer.eos_token_id if bos is None else bos]} for _ in texts]
        if self.prompt_layout == "placeholders":
            return [{"input_prompt_ids": [self.pad_id] * len(ids)} for ids in encoded.input_ids]
        if self.prompt_layout == "tokens" or (self.prompt_layout == "own" and self.encoder_tokenizer is None):
            return [{"input_prompt_ids": ids} for ids in encoded.input_ids]
        side = self.text_format.truncate_prompt or "right"
        pairs = zip(texts, encoded.encodings, cuts, strict=True)
        kept = [kept_text(text, encoding, side) if cut else (text, 0) for text, encoding, cut in pairs]
        own = encode(self.slm_tokenizer, [text for text, _ in kept])
        rows = [{"input_prompt_ids": ids} for ids in own.input_ids]
        if self.prompt_layout == "offsets":
            for row, tokens, states, (_, begin) in zip(rows, own.encodings, encoded.encodings, kept, strict=True):
                overlapping = spans(TokenSpans.of(tokens, begin), TokenSpans.of(states))
                row["prompt_spans"] = overlapping.ravel().tolist()
        return rows

    def _cut(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], lengths: list[int]) -> BatchEncoding:
        limit, side = self.text_format.max_prompt_tokens, self.text_format.truncate_prompt
        if side is None:
            worst = max(range(len(lengths)), key=lengths.__getitem__)
            raise UserError(
                f"a prompt has {lengths[worst]} tokens, the limit is {limit} ({texts[worst][:60]!r}...); "
                "shorten it, or in the recipe raise data.max_prompt_tokens or set data.truncate_prompt to left or right"
            )
        previous, tokenizer.truncation_side = tokenizer.truncation_side, side
        try:
            return encode(tokenizer, texts, truncation=True, max_length=limit)
        finally:
            tokenizer.truncation_side = previous

    def _encode_targets(self, targets: Sequence[str]) -> list[list[int]]:
        eos, limit = self.slm_tokenizer.eos_token_id, self.text_format.max_target_tokens
        if self.is_encoder_decoder:
            start = self.decoder_start_token_id
            encoded = self.slm_tokenizer(text_target=list(targets)).input_ids
            encoded = [ids[1:] if ids and ids[0] == start else ids for ids in encoded]
        else:
            encoded = encode(self.slm_tokenizer, list(targets), add_special_tokens=False).input_ids
        return [(ids if ids and ids[-1] == eos else [*ids, eos])[:limit] for ids in encoded]

    def _packed_prompts(
        self, rows: Sequence[Mapping[str, Any]], counts: Sequence[int], side: "PackedSide"
    ) -> dict[str, Tensor]:
        """The frozen encoder's side of packed rows; each row of the batch holds the next of `counts` examples."""
        prompt_ids = side.put([row["prompt_ids"] for row in rows], self.encoder_pad_id)
        batch = {"prompt_ids": prompt_ids, "prompt_documents": side.documents()}
        if "state_numbers" in rows[0]:
            batch["state_numbers"] = side.put([row["state_numbers"] for row in rows], -1)
        return batch | _stored_states(rows, counts, prompt_ids.shape)

    def _encoder_side(
        self, rows: Sequence[Mapping[str, Any]], lengths: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        if not self.has_encoder:
            return {}
        wanted = lengths or {}
        prompt_ids, mask = pad(
            [row["prompt_ids"] for row in rows], self.encoder_pad_id, length=wanted.get("prompt_ids")
        )
        states = _stored_states(rows, [1] * len(rows), prompt_ids.shape)
        side = {"prompt_ids": prompt_ids, "prompt_attention_mask": mask} | states
        if "state_numbers" in rows[0]:
            side["state_numbers"] = pad([row["state_numbers"] for row in rows], -1)[0]
        if self.prompt_layout != "offsets":
            return side
        length = 2 * wanted["prompt_spans"] if "prompt_spans" in wanted else None
        spans_of = pad([row["prompt_spans"] for row in rows], 0, length=length)[0]
        return side | {"prompt_spans": spans_of.unflatten(1, (-1, 2))}


class PackedSide:
    """One side of packed rows: which place of (rows, capacity) each token of each example takes.

    Args:
        counts: examples of each row.
        lengths: tokens of each example on this side, in the order of the rows.
        shape: rows and capacity.
    """

    def __init__(self, counts: Sequence[int], lengths: Sequence[int], shape: tuple[int, int]) -> None:
        self.shape = shape
        self._counts, self._lengths = np.asarray(counts), np.asarray(lengths)
        begins = self._lengths.cumsum() - self._lengths  # of each example, if all stood in one row
        firsts = begins[self._counts.cumsum() - self._counts]
        shift = np.repeat(np.arange(len(counts)) * shape[1] - firsts, self._counts)
        self._places = np.arange(self._lengths.sum()) + np.repeat(shift, self._lengths)

    def put(self, parts: Sequence[Ids], value: int) -> Tensor:
        """Put ids, all examples' one behind another, on their places; `value` stands on the others."""
        return self._spread(np.concatenate(parts), value)

    def documents(self) -> Tensor:
        """Return each place's number of its example in the row, -1 = none."""
        numbers = np.concatenate([np.arange(count) for count in self._counts])
        return self._spread(np.repeat(numbers, self._lengths), -1)

    def _spread(self, values: np.ndarray, rest: int) -> Tensor:
        places = np.full(self.shape, rest, dtype=np.int64)
        places.reshape(-1)[self._places] = values
        return torch.from_numpy(places)


def pad(
    sequences: Sequence[Ids], value: int, side: Literal["left", "right"] = "right", length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Pad to (batch, longest) and return the ids with their mask, 1 = a real token.

    Where a greater length is given, the positions that no row has hold 0: an id that any model has.
    """
    longest = max(len(sequence) for sequence in sequences)
    shape = (len(sequences), longest if length is None else length)
    ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    if value:
        ids[:, slice(0, longest) if side == "right" else slice(shape[1] - longest, shape[1])] = value
    for row, sequence in enumerate(sequences):
        span = slice(0, len(sequence)) if side == "right" else slice(shape[1] - len(sequence), shape[1])
        ids[row, span] = sequence
        mask[row, span] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def pack_rows(lengths: Sequence[tuple[int, ...]], capacities: tuple[int, ...]) -> list[int]:
    """Fill rows in the given order, a new one where an item does not fit; return how many items each row holds."""
    counts: list[int] = []
    room = (-1,) * len(capacities)
    for length in lengths:
        left = tuple(r - n for r, n in zip(room, length, strict=True))
        if min(left) < 0:
            counts.append(0)
            left = tuple(c - n for c, n in zip(capacities, length, strict=True))
        counts[-1] += 1
        room = left
    return counts


def document_starts(documents: Tensor, room: int = 0) -> Tensor:
    """Return where each run of the same number begins in (rows, len), counted over all rows, and their end; int32.

    There is room for as many as is told, so that batches have one shape: what is left over are empty runs at the end.
    """
    flat = documents.numpy()
    begins = np.ones(flat.shape, dtype=bool)
    begins[:, 1:] = flat[:, 1:] != flat[:, :-1]
    found = np.flatnonzero(begins)
    while room and room < len(found):
        room *= 2
    starts = np.full(max(room, len(found)) + 1, flat.size, dtype=np.int32)
    starts[: len(found)] = found
    return torch.from_numpy(starts)


def _stored_states(rows: Sequence[Mapping[str, Any]], counts: Sequence[int], shape: Sequence[int]) -> dict[str, Tensor]:
    """Put stored encoder states, where the rows have them, on the places (batch, len) of their tokens.

    Each row of the batch begins with the states of the next of its `counts` examples.
    """
    if "hidden_states" not in rows[0]:
        return {}
    states = iter([row["hidden_states"] for row in rows])
    first: Tensor = rows[0]["hidden_states"]
    hidden_states = first.new_empty(*shape, first.shape[-1])
    for place, row in enumerate(hidden_states):
        parts = list(islice(states, counts[place] if place < len(counts) else 0))
        used = sum(len(part) for part in parts)
        if parts:
            torch.cat(parts, out=row[:used])
        row[used:] = 0
    return {"hidden_states": hidden_states}


def target_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column, (n,) each, of the labels (batch, len) that count."""
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    return rows, columns


def targets_of(labels: Tensor, room: int = 0) -> dict[str, Tensor]:
    """Return target_positions (2, n), row and column of each label (batch, len) that counts, and target_ids (n,).

    There is room for as many as is told, so that batches have one shape: what is left over are ignored targets.
    """
    positions = torch.stack(target_positions(labels))
    targets = labels[*positions]
    while room and room < len(targets):
        room *= 2
    over = max(0, room - len(targets))
    # The second column: what predicts a decoder-only model's target stands before it.
    nowhere = torch.tensor([[0], [1]]).expand(2, over)
    return {
        "target_positions": torch.cat([positions, nowhere], dim=1),
        "target_ids": torch.nn.functional.pad(targets, (0, over), value=IGNORED),
    }


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id to pad with: any will do, since masks come from lengths."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)
