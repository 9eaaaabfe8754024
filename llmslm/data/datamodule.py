"""The LightningDataModule: a source, tokenised once for the system that is trained, in length-bucketed batches."""

import hashlib
import warnings
from collections.abc import Callable
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from llmslm.data.codec import IGNORED, Codec, TextFormat
from llmslm.data.sampler import LengthBatchSampler
from llmslm.data.sources import Source, Split
from llmslm.data.tokenizer import TrainedBpe, load_tokenizer, same_tokenizer
from llmslm.errors import UserError

TEXT_COLUMNS = ("id", "prompt", "target")


class ResumableLoader(DataLoader):
    """A loader whose state is the trainer's progress: a resumed run goes on with the next batch of the epoch.

    Args:
        progress: returns (epoch, batches trained in it).
        args: see torch's DataLoader.
        kwargs: see torch's DataLoader; batch_sampler must be a LengthBatchSampler.
    """

    def __init__(self, progress: Callable[[], tuple[int, int]], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._progress = progress

    def state_dict(self) -> dict[str, int]:
        """Called by Lightning when it writes a checkpoint."""
        epoch, batches = self._progress()
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Called by Lightning before the first batch of a resumed run."""
        cast(LengthBatchSampler, self.batch_sampler).start = (state["epoch"], state["batches"])


class TextDataModule(L.LightningDataModule):
    """Batches of one source for the module's system.

    Validation, test and predict batches carry `examples` beside the tensors: dicts with id, prompt and target.
    Batches are dealt out here, so the Trainer's own distributed sampler stays off (the command line sees to it).

    Args:
        source: where the examples come from.
        tokenizer: trained on the training split; None takes the tokenizers of the models' sources.
        micro_batch_size: examples per rank and forward.
        eval_batch_size: the same without gradients; micro_batch_size where None.
        prompt_template: text around the prompt, with {prompt} in it.
        max_prompt_tokens: longest prompt, in the encoder's tokens.
        max_target_tokens: longest target, in the slm's tokens; longer targets are cut and counted.
        truncate_prompt: the side from which a longer prompt is cut; None refuses it.
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
        self.num_workers = num_workers
        self.shuffle_buffer = shuffle_buffer
        self.slm_tokenizer: PreTrainedTokenizerBase
        self.encoder_tokenizer: PreTrainedTokenizerBase | None = None
        self.codec: Codec
        self._tokenised: dict[Split, Dataset | IterableDataset] = {}

    def prepare_data(self) -> None:
        """Build the data and train the tokenizer, on one process of each node."""
        self.source.prepare()
        if self.trained_tokenizer is not None:
            self.trained_tokenizer.load(self.source)

    def setup(self, stage: str) -> None:
        """Load tokenizers, let the module build its system, tokenise the splits of the stage."""
        if not hasattr(self, "codec"):
            self._load_tokenizers()
            self.codec = self._module.make_codec(self)
        splits: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "validation"),
            "validate": ("validation",),
            "test": ("test",),
            "predict": ("test",),
        }
        for split in splits[stage]:
            if split not in self._tokenised:
                self._tokenised[split] = self._tokenise(split)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of training rows."""
        return self._loader("train", self.micro_batch_size, self.codec.collate)

    def val_dataloader(self) -> DataLoader:
        """Batches of the validation split, with their examples."""
        return self._loader("validation", self.eval_batch_size, self._collate_with_examples)

    def test_dataloader(self) -> DataLoader:
        """Batches of the test split, with their examples."""
        return self._loader("test", self.eval_batch_size, self._collate_with_examples)

    def predict_dataloader(self) -> DataLoader:
        """Batches of the test split, with their examples."""
        return self.test_dataloader()

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Note the first column that holds a target (for the logits to keep) while the labels are still on the CPU."""
        if not self.codec.is_encoder_decoder:
            batch["first_target"] = int((batch["labels"] != IGNORED).any(0).int().argmax())
        return batch

    @property
    def _module(self) -> Any:
        return self.trainer.lightning_module  # type: ignore[union-attr]

    def _load_tokenizers(self) -> None:
        if self.trained_tokenizer is not None:
            self.slm_tokenizer = self.trained_tokenizer.load(self.source)
            return
        encoder_source, slm_source = self._module.tokenizer_sources()
        if encoder_source is None or slm_source is None:
            raise UserError(
                "no tokenizer: the models are built from configs, so set data.tokenizer, for example to "
                "{class_path: llmslm.data.tokenizer.TrainedBpe, init_args: {vocab_size: 8192}}"
            )
        self.slm_tokenizer = load_tokenizer(slm_source)
        if encoder_source != slm_source:
            encoder_tokenizer = load_tokenizer(encoder_source)
            if not same_tokenizer(encoder_tokenizer, self.slm_tokenizer):
                self.encoder_tokenizer = encoder_tokenizer

    def _tokenise(self, split: Split) -> Dataset | IterableDataset:
        dataset = self.source.load(split)
        if isinstance(dataset, IterableDataset):
            return dataset.map(self._encode, batched=True, batch_size=1000)
        if len(dataset) == 0:
            raise UserError(f"the {split} split of {self.source.name} has no rows (data.source)")
        key = f"{self.source.fingerprint()} {split} {len(dataset)} {self.codec.signature()}"
        tokenised = dataset.map(
            self._encode,
            batched=True,
            desc=f"tokenising {split}",
            new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
        )
        self._report_cuts(split, tokenised)
        return tokenised

    def _encode(self, batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        rows = self.codec.encode(batch["prompt"], batch["target"])
        return {key: [row[key] for row in rows] for key in rows[0]}

    def _report_cuts(self, split: Split, dataset: Dataset) -> None:
        cut = sum(tokens[0] > 0 for tokens in dataset["cut_prompt_tokens"])
        limit = self.text_format.max_target_tokens
        targets = int((token_counts(dataset, ("target_ids",)) >= limit).sum())
        if cut or targets:
            warnings.warn(
                f"{split}: {cut} of {len(dataset)} prompts were cut to {self.text_format.max_prompt_tokens} tokens "
                f"({self.text_format.truncate_prompt}), {targets} targets fill or exceed {limit} tokens",
                UserWarning,
                stacklevel=2,
            )

    def _loader(self, split: Split, batch_size: int, collate: Callable) -> DataLoader:
        dataset = self._tokenised[split]
        workers: dict[str, Any] = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        pin = self._module.device.type == "cuda"
        rank, world = self._module.trainer.global_rank, self._module.trainer.world_size
        if isinstance(dataset, IterableDataset):
            dataset = split_dataset_by_node(dataset, rank, world)
            if split == "train":
                dataset = dataset.shuffle(seed=self._seed(), buffer_size=self.shuffle_buffer)
            return DataLoader(
                dataset, batch_size, collate_fn=collate, pin_memory=pin, drop_last=split == "train", **workers
            )
        sampler = LengthBatchSampler(
            token_counts(dataset, ("input_prompt_ids", "target_ids")),
            batch_size,
            shuffle=split == "train",
            seed=self._seed(),
            rank=rank,
            world_size=world,
        )
        return ResumableLoader(
            self._progress, dataset, batch_sampler=sampler, collate_fn=collate, pin_memory=pin, **workers
        )

    def _progress(self) -> tuple[int, int]:
        """Return the epoch and how many of its batches were trained, not how many a worker has fetched ahead."""
        done = self._module.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        return self._module.trainer.current_epoch, done

    def _seed(self) -> int:
        return torch.initial_seed() % 2**32

    def _collate_with_examples(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.codec.collate(rows) | {"examples": [{k: row[k] for k in TEXT_COLUMNS} for row in rows]}


def token_counts(dataset: Dataset, columns: tuple[str, ...]) -> np.ndarray:
    """Count the ids of each row over the given columns, in Arrow, without making Python lists."""
    table = dataset.with_format("arrow")[:]
    return np.sum([pc.list_value_length(table[name]).to_numpy() for name in columns], axis=0)
