r"""Training speed of a recipe on this machine; of it from a feature cache, or of the Seq2SeqTrainer on the same model.

    python -m evaluation.benchmarks.training_speed --config debian_translation_en_it --peer 128 256 512 \
        -- --model.system llm --data.pack_tokens 256 --data.micro_batch_size 128
    python -m evaluation.benchmarks.training_speed --config debian_summary --cached features/debian_summary

What follows `--` goes to `llmslm fit`. Tokens are those of prompts and targets without padding; the first half of the
steps warms up. The last line is one JSON object, with a row an arm: tokens a second from the cache stand over those
without (`speedup`), those of llmslm over the Hugging Face trainer's (`speedup_of_llmslm`).
"""

import argparse
import copy
import csv
import gc
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from evaluation.benchmarks.report import mistakes_in_one_line
from llmslm import training
from llmslm.data.codec import IGNORED, Codec
from llmslm.data.datamodule import token_counts
from llmslm.provenance import provenance

Row = dict[str, Any]

EVERY = 10
"""Optimizer steps between two that are logged."""
MEASURED = ("train/tokens_per_s", "train/tflops_per_s", "train/mfu", "train/padding_share")


class Watch(Callback):
    """Keeps what was trained, and counts what of it were targets."""

    model: PreTrainedModel
    codec: Codec
    rows: Any
    targets, tokens = 0, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count the batch."""
        self.targets += batch["sizes"].target
        self.tokens += batch["sizes"].tokens

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take model, codec and tokenised rows from the run."""
        self.model, self.codec = pl_module.model, pl_module.codec  # type: ignore[assignment]
        self.rows = trainer.datamodule.rows("train")  # type: ignore[attr-defined]


def ours(config: str, steps: int, arguments: list[str], watch: Watch) -> Row:
    """Fit for some steps and return the median of what was logged, with the loss of the last step."""
    with tempfile.TemporaryDirectory() as folder:
        logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={folder}"]
        limits = [
            f"--trainer.max_steps={steps}",
            f"--trainer.log_every_n_steps={EVERY}",
            "--trainer.limit_val_batches=0",
        ]
        root = f"--trainer.default_root_dir={folder}"
        _start_anew()
        # Last, since an overlay among the arguments may set a number of steps, too.
        training.run(["fit", "--config", config, *arguments, root, *logger, *limits], callbacks=[watch])
        with next(Path(folder).rglob("metrics.csv")).open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/tokens_per_s")]
    rows = rows[len(rows) // 2 :]
    values = {key.split("/")[1]: [float(row[key]) for row in rows if row.get(key)] for key in MEASURED}
    medians = {key: statistics.median(numbers) for key, numbers in values.items() if numbers}
    medians["target_tokens_per_s"] = medians["tokens_per_s"] * watch.targets / watch.tokens
    return {"arm": "llmslm", "steps": steps, **medians, "loss": float(rows[-1]["train/loss"]), **_peak()}


class CountingTrainer(Seq2SeqTrainer):
    """Counts the tokens that it trains on, on the device, so that nothing waits for the count."""

    tokens: int | Tensor = 0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Count prompts and targets of the batch."""
        self.tokens = self.tokens + inputs["attention_mask"].sum() + (inputs["labels"] != IGNORED).sum()
        return super().training_step(model, inputs, *args, **kwargs)


class Clock(TrainerCallback):
    """Notes time and tokens at half of the steps and at the end."""

    trainer: CountingTrainer

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.marks: list[tuple[float, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the device where the clock is read."""
        if state.global_step in (self.steps // 2, self.steps):
            tokens = int(self.trainer.tokens)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append((time.perf_counter(), tokens))


def peer(watch: Watch, steps: int, batch_size: int) -> Row:
    """Train the same model on the same rows with Seq2SeqTrainer, with bf16, a fused optimizer and rows by length."""
    clock, cuda = Clock(steps), torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        settings = Seq2SeqTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            bf16=cuda,
            use_cpu=not cuda,
            optim="adamw_torch_fused" if cuda else "adamw_torch",
            train_sampling_strategy="group_by_length",
            length_column_name="length",
            remove_unused_columns=False,
            dataloader_num_workers=4 if cuda else 0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        _start_anew()
        clock.trainer = CountingTrainer(
            model=copy.deepcopy(watch.model),  # without the compiled blocks: its batches have a shape each
            args=settings,
            train_dataset=drawn(watch.rows, steps * batch_size),
            data_collator=watch.codec.collate,
            callbacks=[clock],
        )
        clock.trainer.train()
    (begin, before), (end, after) = clock.marks
    speed = (after - before) / (end - begin)
    return {"arm": "Seq2SeqTrainer", "steps": steps, "batch_size": batch_size, "tokens_per_s": speed, **_peak()}


def drawn(rows: Dataset, count: int) -> Dataset:
    """Draw rows at random and note the tokens of each as its length; more would be read before the first step."""
    some = rows.shuffle(seed=0).select(range(min(count, len(rows)))).flatten_indices()
    return some.add_column("length", token_counts(some, ("input_prompt_ids", "target_ids")))


def measured(
    config: str, steps: int, arguments: list[str], cached: str | None, batch_sizes: Sequence[int]
) -> Iterator[Row]:
    """Measure all arms, one after another.

    Args:
        config: recipe.
        steps: of each arm.
        arguments: of `llmslm fit`.
        cached: a feature cache that one more arm trains from.
        batch_sizes: of the Seq2SeqTrainer, an arm each.

    Returns:
        A row an arm; `speedup` is over the first one, `speedup_of_llmslm` that of the first one.
    """
    watch = Watch()
    first = ours(config, steps, arguments, watch)
    yield first
    if cached:
        row = ours(config, steps, [*arguments, f"--model.encoder.features={cached}"], Watch())
        yield row | {"arm": "llmslm, feature cache", "speedup": row["tokens_per_s"] / first["tokens_per_s"]}
    for batch_size in batch_sizes:
        row = peer(watch, steps, batch_size)
        yield row | {"speedup_of_llmslm": first["tokens_per_s"] / row["tokens_per_s"]}


def _start_anew() -> None:
    """Drop what the arm before holds: blocks, memory, the processes of its loader."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> dict[str, int]:
    return {"peak_memory_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


def main(args: list[str] | None = None) -> None:
    """Measure from the command line."""
    given = sys.argv[1:] if args is None else args
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, by name or path")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps, half of them on the clock")
    peers = "run Seq2SeqTrainer too, with each of these numbers of examples a batch"
    parser.add_argument("--peer", type=int, nargs="+", default=[], metavar="BATCH", help=peers)
    parser.add_argument("--cached", metavar="FOLDER", help="train from this feature cache (`llmslm features`) too")
    options = parser.parse_args(given[:split])
    if options.steps < EVERY:
        parser.error(f"--steps {options.steps} was given; expected {EVERY} or more: each tenth is logged")
    arguments = given[split + 1 :]
    command = shlex.join(["python", "-m", "evaluation.benchmarks.training_speed", *given])
    rows: list[Row] = []
    for row in measured(options.config, options.steps, arguments, options.cached, options.peer):
        rows.append(row)
        # After each arm, so that one that does not end takes nothing with it.
        print(json.dumps({"command": command, "rows": rows, "provenance": provenance()}), flush=True)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
