"""Tokenizers: loaded from a model's source, or a byte-level BPE trained on the training split."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmslm.data.sources.base import Source, cache_folder, load_pairs
from llmslm.errors import UserError
from llmslm.models.source import LOAD_ERRORS, pretrained, why_not

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SMALLEST = 256 + 3


@dataclass
class TrainedBpe:
    """A byte-level BPE that is trained on the prompts and targets of the training split, and cached."""

    vocab_size: int = 8192
    """Entries, special tokens and the 256 bytes included."""
    max_examples: int = 50_000
    """Training examples that the merges are learned from, spread over the split (of a stream: its first ones)."""

    def load(self, source: Source) -> PreTrainedTokenizerFast:
        """Return the tokenizer for a source's training split; train it where the cache has none.

        Raises:
            UserError: if the vocabulary has no room for all bytes.
        """
        if self.vocab_size < SMALLEST:
            raise UserError(
                f"data.tokenizer.vocab_size is {self.vocab_size}; expected {SMALLEST} or more: bytes and special tokens"
            )
        key = f"2 {self.vocab_size} {self.max_examples} {source.fingerprint()}"
        folder = cache_folder() / f"bpe-{self.vocab_size}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        if not folder.is_dir():
            self._build(source, folder)
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
        return tokenizer

    def _build(self, source: Source, folder: Path) -> None:
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        try:
            self.train(load_pairs(source, "train")).save_pretrained(aside)
            if not folder.is_dir():  # another process may have been quicker
                aside.rename(folder)
        except OSError as error:
            if not folder.is_dir():
                raise UserError(
                    f"the tokenizer cannot be written to {folder.parent}: {error} ($LLMSLM_CACHE)"
                ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def train(self, dataset: Dataset | IterableDataset) -> PreTrainedTokenizerFast:
        """Learn the merges. Prompts are wrapped in <s> ... </s>; decoding restores every text exactly."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=True,
        )
        tokenizer.train_from_iterator(self._texts(dataset), trainer)
        ids = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ids)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=PAD,
            bos_token=BOS,
            eos_token=EOS,
            clean_up_tokenization_spaces=False,
            split_special_tokens=True,  # "</s>" in a text is text, not the end of the target
        )

    def _texts(self, dataset: Dataset | IterableDataset) -> Iterator[list[str]]:
        if isinstance(dataset, Dataset):
            part = dataset.select(range(0, len(dataset), -(-len(dataset) // self.max_examples)))
        else:
            part = dataset.take(self.max_examples)
        for batch in part.iter(1000):
            yield batch["prompt"] + batch["target"]


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a hub name, a folder or a GGUF file.

    One without a padding token is left so: the codec pads with any id, since its masks come from lengths.

    Raises:
        UserError: if there is none.
    """
    try:
        place, file = pretrained(source)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, revision=revision, **file)
    except UserError:
        raise
    except (*LOAD_ERRORS, KeyError, ImportError) as error:
        whole = " ".join(str(error).split())[:300] or type(error).__name__
        reason = why_not(source, error) if isinstance(error, OSError) else whole
        raise UserError(
            f"no tokenizer at {source!r}: {reason}; expected a hub name or a folder with tokenizer.json "
            "(or set data.tokenizer to train one)"
        ) from error
    return tokenizer


_PROBE = "The quick brown fox: 東京 🙂  x"


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same ids to every token and wrap prompts in the same special tokens."""
    return one.get_vocab() == other.get_vocab() and one(_PROBE).input_ids == other(_PROBE).input_ids


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what `same_tokenizer` compares."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE).input_ids])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
