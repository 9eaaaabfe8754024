"""The LightningDataModule: a source, tokenised once for the system that is trained, in length-bucketed batches."""

import hashlib
import math
import os
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import lightning as L
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llmslm.data import features, logits
from llmslm.data.codec import Codec, PackedShape, TextFormat, targets_of
from llmslm.data.loader import BatchLoader, StreamLoader, batches_of_steps
from llmslm.data.sampler import LengthBatchSampler, PackedBatchSampler, PackedRows
from llmslm.data.shards import RowsWithStored
from llmslm.data.sources import Source, Split
from llmslm.data.sources.base import FEATURES, load_pairs
from llmslm.data.token_rows import TokenRows
from llmslm.data.tokenizer import TrainedBpe, load_tokenizer, same_tokenizer
from llmslm.errors import UserError

TEXT_COLUMNS = ("id", "prompt", "target")

SHORT_ROW = 128
"""Tokens of the rows of short examples, where rows are longer and attention is by masks."""


class TextDataModule(L.LightningDataModule):
    """Batches of one source for the module's system.

    Validation, test and predict batches carry `examples` beside the tensors: dicts with id, prompt and target.
    Batches are dealt out here, so the Trainer's own distributed sampler stays off (the command line sees to it).

    Args:
        source: where the examples come from.
        tokenizer: trained on the training split, for models that are built from configs; None takes the tokenizers of
            the models' sources.
        micro_batch_size: examples per rank and forward.
        eval_batch_size: the same without gradients; micro_batch_size where None.
        prompt_template: text around the prompt, with {prompt} in it.
        max_prompt_tokens: longest prompt, in the encoder's tokens.
        max_target_tokens: longest target, in the slm's tokens; longer targets are cut and counted.
        truncate_prompt: the side from which a longer prompt is cut; None refuses it.
        pack_tokens: tokens of a training row that holds several examples (of their prompts, for an encoder-decoder);
            micro_batch_size then counts rows. Their other side (targets of an encoder-decoder, the frozen encoder's
            prompts) gets the length that goes with it. None takes batches of similar lengths.
        num_workers: processes that collate ahead.
        shuffle_buffer: examples that a streamed source is shuffled within.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: TrainedBpe | None = None,
        micro_batch_size: int = 32,
        eval_batch_size: int | None = None,
        prompt_template: str = "{prompt}",
        max_prompt_tokens: int = 512,
        max_target_tokens: int = 128,
        truncate_prompt: Literal["left", "right"] | None = None,
        pack_tokens: int | None = None,
        num_workers: int = 0,
        shuffle_buffer: int = 10_000,
    ) -> None:
        super().__init__()
        if micro_batch_size < 1:
            raise UserError(f"data.micro_batch_size is {micro_batch_size}; expected at least 1")
        self.source = source
        self.trained_tokenizer = tokenizer
        self.micro_batch_size = micro_batch_size
        self.eval_batch_size = eval_batch_size or micro_batch_size
        self.text_format = TextFormat(prompt_template, max_prompt_tokens, max_target_tokens, truncate_prompt)
        self.pack_tokens = pack_tokens
        self.num_workers = num_workers
        self.shuffle_buffer = shuffle_buffer
        self.slm_tokenizer: PreTrainedTokenizerBase
        self.encoder_tokenizer: PreTrainedTokenizerBase | None = None
        self.codec: Codec
        self._tokenised: dict[Split, Dataset | IterableDataset] = {}
        self._states: torch.Tensor | None = None  # of the training split, where they are on the GPU
        self._seed = 0

    def prepare_data(self) -> None:
        """Build the data and train the tokenizer, on one process of each node."""
        self.source.prepare()
        if self.trained_tokenizer is not None:
            self.trained_tokenizer.load(self.source)

    def setup(self, stage: str) -> None:
        """Load tokenizers, let the module build its system, tokenise the splits of the stage."""
        strategy = self._module.trainer.strategy
        self._seed = strategy.broadcast(torch.initial_seed() % 2**32)  # without seed_everything each rank has its own
        if not hasattr(self, "codec"):
            self._load_tokenizers()
            self.codec = self._module.make_codec(self)
        splits: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "validation"),
            "validate": ("validation",),
            "test": ("test",),
            "predict": ("test",),
        }
        missing = [split for split in splits[stage] if split not in self._tokenised]
        # One process of each node tokenises into the cache, from which the others then read.
        if self._module.trainer.local_rank != 0:
            strategy.barrier("tokenise")
        self._tokenised |= {split: self._tokenise(split) for split in missing}
        if self._module.trainer.local_rank == 0:
            strategy.barrier("tokenise")

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of training rows."""
        dataset, batch_size = self._tokenised["train"], self.micro_batch_size
        if self.pack_tokens is not None and not self.packs:
            reason = "this system cannot pack" if isinstance(dataset, Dataset) else "a stream is not packed"
            warnings.warn(
                f"data.pack_tokens has no effect: {reason}; a batch has {batch_size} examples (data.micro_batch_size), "
                "not rows of several",
                UserWarning,
                stacklevel=2,
            )
        collate = partial(collate_training, codec=self.codec)
        if isinstance(dataset, Dataset) and self.pack_tokens is not None and self.packs:
            sides = np.stack([token_counts(dataset, side) for side in self.codec.packed_sides], axis=1)
            room = capacities(sides, self.pack_tokens)
            # An encoder-decoder attends by masks, decoder-only models within examples where they can.
            parts = max(1, self.pack_tokens // SHORT_ROW) if self.codec.is_encoder_decoder else 1
            sampler = PackedBatchSampler(sides, batch_size, room, parts=parts, **self._dealing())
            targets = token_counts(dataset, ("target_ids",))
            packed = partial(collate, shapes=[packed_shape(kind, targets) for kind in sampler.kinds])
            return BatchLoader(
                self._training_rows(dataset), sampler, self._trained, collate_fn=packed, **self._workers()
            )
        if isinstance(dataset, Dataset):
            by_length = LengthBatchSampler(_lengths(dataset), batch_size, shuffle=True, **self._dealing())
            rows = self._training_rows(dataset)
            return BatchLoader(rows, by_length, self._trained, collate_fn=collate, **self._workers())
        trainer = self._module.trainer
        if trainer.max_steps == -1:
            raise UserError(f"{self.source.name} is streamed and has no end: set trainer.max_steps")
        if self._module.logits is not None:
            raise UserError(f"{self.source.name} is streamed, so it has no stored logits (model.distillation.logits)")
        dataset = split_dataset_by_node(dataset, trainer.global_rank, trainer.world_size)
        dataset = dataset.shuffle(seed=self._seed, buffer_size=self.shuffle_buffer)
        return StreamLoader(dataset, self._trained, batch_size=batch_size, collate_fn=collate, **self._workers())

    @property
    def packs(self) -> bool:
        """Whether training rows hold several examples: the recipe asks for it, the system can, nothing is streamed."""
        return self.pack_tokens is not None and self.codec.can_pack and isinstance(self._tokenised["train"], Dataset)

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation split, with their examples."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader:
        """Batches of the test split, with their examples."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Batches of the test split, with their examples."""
        return self.test_dataloader()

    def sample(self, split: Split, count: int) -> list[list[dict[str, str]]]:
        """Return batches of examples spread evenly over a split, longest prompts first; the same on all ranks."""
        dataset = self._tokenised[split]
        assert isinstance(dataset, Dataset)
        count = min(count, len(dataset))
        numbers = [i * len(dataset) // count for i in range(count)]
        chosen = dataset.select_columns(list(TEXT_COLUMNS)).select(numbers)
        states = self._stored_states(split)
        if states is not None:
            known = [states[number]["hidden_states"] for number in numbers]
            self._module.model.encoder.learn(dataset.select(numbers)["prompt_ids"], known)
        examples = sorted(chosen.to_list(), key=lambda example: -len(example["prompt"]))
        return [examples[start : start + self.eval_batch_size] for start in range(0, count, self.eval_batch_size)]

    def state_dict(self) -> dict[str, int]:
        """Return the seed of the shuffle; the position in it is part of the loader's state."""
        return {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Shuffle as the run did that is resumed."""
        self._seed = state_dict["seed"]

    @property
    def _module(self) -> Any:
        return self.trainer.lightning_module  # type: ignore[union-attr]

    def _load_tokenizers(self) -> None:
        """A model from a source reads its own tokens; others read the trained ones, or else the encoder's."""
        trained = None if self.trained_tokenizer is None else self.trained_tokenizer.load(self.source)
        encoder_source, slm_source = self._module.tokenizer_sources()
        encoder_tokenizer = trained if encoder_source is None else load_tokenizer(encoder_source)
        if encoder_tokenizer is None:
            raise UserError(
                "no tokenizer: the models are built from configs, so set data.tokenizer, for example to "
                "{class_path: llmslm.data.tokenizer.TrainedBpe, init_args: {vocab_size: 8192}}"
            )
        own = encoder_tokenizer
        if slm_source != encoder_source:
            own = trained if slm_source is None else load_tokenizer(slm_source)
        self.slm_tokenizer = encoder_tokenizer if own is None else own
        if not same_tokenizer(encoder_tokenizer, self.slm_tokenizer):
            self.encoder_tokenizer = encoder_tokenizer

    def _tokenise(self, split: Split) -> Dataset | IterableDataset:
        tokenised = tokenise(self.source, split, self.codec)
        if isinstance(tokenised, Dataset):
            self._report_cuts(split, tokenised)
        return tokenised

    def _report_cuts(self, split: Split, dataset: Dataset) -> None:
        table = dataset.with_format("arrow")[:]
        cut = int((pc.list_flatten(table["cut_prompt_tokens"]).to_numpy() > 0).sum())
        limit = self.text_format.max_target_tokens
        targets = int((token_counts(dataset, ("target_ids",)) >= limit).sum())
        if cut or targets:
            warnings.warn(
                f"{split}: {cut} of {len(dataset)} prompts were cut to {self.text_format.max_prompt_tokens} tokens "
                f"({self.text_format.truncate_prompt}), {targets} targets fill or exceed {limit} tokens",
                UserWarning,
                stacklevel=2,
            )

    def _evaluation_loader(self, split: Split) -> DataLoader:
        dataset = self._tokenised[split]
        assert isinstance(dataset, Dataset)
        sampler = LengthBatchSampler(_lengths(dataset), self.eval_batch_size, shuffle=False, **self._dealing())
        collate = partial(collate_with_examples, codec=self.codec)
        stored = self._stored_states(split)
        rows = dataset if stored is None else RowsWithStored(dataset, stored)
        return DataLoader(rows, batch_sampler=sampler, collate_fn=collate, **self._workers())

    def teardown(self, stage: str) -> None:
        """Give the GPU back what training kept there."""
        self._states = None

    def rows(self, split: Split) -> Dataset:
        """Return a split's tokenised rows.

        Raises:
            UserError: if it is streamed.
        """
        dataset = self._tokenised[split]
        if not isinstance(dataset, Dataset):
            raise UserError(f"{self.source.name} is streamed: nothing can be stored of its rows (data.source)")
        return dataset

    def prompt_rows(self, split: Split) -> tuple[Dataset, np.ndarray]:
        """Return a split's tokenised rows, and the encoder's tokens of each; see `rows`."""
        dataset = self.rows(split)
        return dataset, token_counts(dataset, ("prompt_ids",))

    def feature_identity(self, split: Split) -> dict[str, Any]:
        """Name what decides about the encoder's states of a split, beside the encoder."""
        return features.identity(self.prompt_rows(split)[0], self.codec, self.source.fingerprint())

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Take the states of a batch from those that are on the GPU."""
        if "state_numbers" in batch:
            assert self._states is not None
            batch["hidden_states"] = self._states[batch.pop("state_numbers")]
        return batch

    def _training_rows(self, dataset: Dataset) -> Any:
        """Return the training rows, with what is stored of the LLM beside them: its states, its logits."""
        rows: Any = TokenRows(dataset)
        stored = self._stored_states("train")
        if stored is not None:
            device = self._module.device
            self._states = None  # of the loader before: there is room for one
            self._states = stored.table(device) if stored.fits(device) else None
            rows = RowsWithStored(rows, stored if self._states is None else features.StateNumbers(stored))
        folder = self._module.logits
        if folder is None:
            return rows
        about = logits.identity(dataset, self.codec.slm_tokenizer, self.source.fingerprint())
        return RowsWithStored(rows, logits.stored_logits(folder, token_counts(dataset, ("target_ids",)), about))

    def _stored_states(self, split: Split) -> features.StoredStates | None:
        """Return the states of a split that the module wants to read instead of running its encoder."""
        folder = self._module.features
        if folder is None:
            return None
        source, options = self._module.encoder_source(), vars(self._module.encoder_options)
        features.check(folder, source, options, split, self.feature_identity(split))
        return features.StoredStates(folder, split, self.prompt_rows(split)[1])

    def _dealing(self) -> dict[str, int]:
        trainer = self._module.trainer
        return {"seed": self._seed, "rank": trainer.global_rank, "world_size": trainer.world_size}

    def _workers(self) -> dict[str, Any]:
        if self.num_workers:
            # The tokenizers' threads do not survive the fork of a worker, which has one core anyway.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        pin = self._module.device.type == "cuda"
        return {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0, "pin_memory": pin}

    def _trained(self) -> int:
        return batches_of_steps(self._module.trainer)


def tokenise(source: Source, split: Split, codec: Codec) -> Dataset | IterableDataset:
    """Tokenise a split for a system, once: the rows are cached, but for a streamed training split.

    Raises:
        UserError: if it has no rows or no targets, or a prompt is too long.
    """
    dataset = load_pairs(source, split)
    arguments = {"batched": True, "fn_kwargs": {"codec": codec}}
    if isinstance(dataset, IterableDataset):
        if split == "train":
            return dataset.map(encode, **arguments)
        # Every example once, in equally many batches a rank: that takes a look at all of them.
        dataset = Dataset.from_list(list(tqdm(dataset, f"reading {split}")), features=FEATURES)
    if len(dataset) == 0:
        raise UserError(f"the {split} split of {source.name} has no rows (data.source)")
    key = f"{source.fingerprint()} {split} {len(dataset)} {codec.signature()}"
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    return dataset.map(encode, desc=f"tokenising {split}", new_fingerprint=fingerprint, **arguments)


def encode(batch: dict[str, list[str]], codec: Codec) -> dict[str, list[Any]]:
    """Tokenise a batch of columns."""
    rows = codec.encode(batch["prompt"], batch["target"])
    return {key: [row[key] for row in rows] for key in rows[0]}


def packed_shape(kind: PackedRows, targets: np.ndarray) -> PackedShape:
    """Return the shape of batches of packed rows, of examples with so many target tokens, (examples,)."""
    examples = kind.most_of_a_batch(np.ones_like(targets)) + kind.a_batch  # rows end in padding
    return PackedShape(kind.a_batch, kind.capacities, examples, kind.most_of_a_batch(targets))


def collate_training(rows: list[dict[str, Any]], codec: Codec, shapes: Sequence[PackedShape] = ()) -> dict[str, Any]:
    """Collate a batch, and count here what the device should not be asked for.

    Args:
        rows: of ids.
        codec: whose they are.
        shapes: rows are packed into the first of these in which all of them fit; without them they are not packed.

    Returns:
        The codec's tensors, sizes, and target_positions and target_ids of `targets_of`. Where the rows carry logits of
        the LLM also these, (n, ...), one for each target, in the same order: packing keeps that of the rows.
    """
    shape = _fitting(rows, codec, shapes) if shapes else None
    batch = codec.collate(rows) if shape is None else codec.collate_packed(rows, shape)
    stored = [name for name in logits.COLUMNS.values() if name in rows[0]]
    batch |= {name: torch.cat([row[name] for row in rows]) for name in stored}
    room = 0 if shape is None or stored else shape.targets
    return batch | targets_of(batch["labels"], room) | {"sizes": codec.sizes(rows, batch)}


def _fitting(rows: list[dict[str, Any]], codec: Codec, shapes: Sequence[PackedShape]) -> PackedShape:
    longest = [max(sum(len(row[name]) for name in side) for row in rows) for side in codec.packed_sides]
    return next(shape for shape in shapes if all(np.less_equal(longest, shape.capacities)))


def collate_with_examples(rows: list[dict[str, Any]], codec: Codec) -> dict[str, Any]:
    """Collate a batch and put the texts beside the tensors, under "examples"."""
    return collate_training(rows, codec) | {"examples": [{name: row[name] for name in TEXT_COLUMNS} for row in rows]}


def _lengths(dataset: Dataset) -> np.ndarray:
    return token_counts(dataset, ("input_prompt_ids", "target_ids"))


def capacities(sides: np.ndarray, tokens: int) -> tuple[int, ...]:
    """Return the length of a packed row on each side: `tokens` on the first, the others in the data's proportion.

    Args:
        sides: (examples, sides), tokens of each example.
        tokens: of a row, on the first side.
    """
    totals, longest = sides.sum(axis=0), sides.max(axis=0)
    others = [max(1.05 * tokens * total / totals[0], most) for total, most in zip(totals[1:], longest[1:], strict=True)]
    return (tokens, *(8 * math.ceil(other / 8) for other in others))


def token_counts(dataset: Dataset, columns: tuple[str, ...]) -> np.ndarray:
    """Count the ids of each row over the given columns, in Arrow, without making Python lists."""
    table = dataset.with_format("arrow")[:]
    return np.sum([pc.list_value_length(table[name]).to_numpy() for name in columns], axis=0)
