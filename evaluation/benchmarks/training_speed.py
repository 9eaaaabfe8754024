"""Training speed of a recipe on this machine, and of the Hugging Face Seq2SeqTrainer on the same model and data.

    python -m evaluation.benchmarks.training_speed --config debian_translation_en_it --peer 256 \
        -- --model.system llm --data.pack_tokens 256 --data.micro_batch_size 128

What follows `--` goes to `llmslm fit`. Tokens are those of prompts and targets without padding; the first half of the
steps warms up. The last line is one JSON object.
"""

import argparse
import csv
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from llmslm import training
from llmslm.data.codec import Codec
from llmslm.provenance import provenance

Row = dict[str, Any]

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
        limits = [f"--trainer.max_steps={steps}", "--trainer.log_every_n_steps=10", "--trainer.limit_val_batches=0"]
        root = f"--trainer.default_root_dir={folder}"
        _reset_peak()
        training.run(["fit", "--config", config, root, *logger, *limits, *arguments], callbacks=[watch])
        with next(Path(folder).rglob("metrics.csv")).open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/tokens_per_s")]
    rows = rows[len(rows) // 2 :]
    values = {key.split("/")[1]: [float(row[key]) for row in rows if row.get(key)] for key in MEASURED}
    medians = {key: statistics.median(numbers) for key, numbers in values.items() if numbers}
    medians["target_tokens_per_s"] = medians["tokens_per_s"] * watch.targets / watch.tokens
    return {"arm": "llmslm", "steps": steps, **medians, "loss": float(rows[-1]["train/loss"]), **_peak()}


class Clock(TrainerCallback):
    """Notes time and tokens at half of the steps and at the end."""

    def __init__(self, steps: int) -> None:
        self.steps, self.tokens = steps, 0
        self.marks: list[tuple[float, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the device where the clock is read."""
        if state.global_step in (self.steps // 2, self.steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append((time.perf_counter(), self.tokens))


def peer(watch: Watch, steps: int, batch_size: int) -> Row:
    """Train the same model on the same rows with Seq2SeqTrainer, with bf16, a fused optimizer and rows by length."""
    clock, cuda = Clock(steps), torch.cuda.is_available()

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        clock.tokens += sum(len(row["input_prompt_ids"]) + len(row["target_ids"]) for row in rows)
        return watch.codec.collate(rows)

    dataset = watch.rows.map(lambda row: {"length": len(row["input_prompt_ids"]) + len(row["target_ids"])})
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
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        _reset_peak()
        Seq2SeqTrainer(
            model=watch.model, args=settings, train_dataset=dataset, data_collator=collate, callbacks=[clock]
        ).train()
    (begin, before), (end, after) = clock.marks
    speed = (after - before) / (end - begin)
    return {"arm": "Seq2SeqTrainer", "steps": steps, "batch_size": batch_size, "tokens_per_s": speed, **_peak()}


def _reset_peak() -> None:
    if torch.cuda.is_available():
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
    parser.add_argument(
        "--peer", type=int, metavar="BATCH", help="run Seq2SeqTrainer too, with this many examples a batch"
    )
    options = parser.parse_args(given[:split])
    arguments = given[split + 1 :]
    watch = Watch()
    rows = [ours(options.config, options.steps, arguments, watch)]
    if options.peer:
        rows.append(peer(watch, options.steps, options.peer))
        rows[0]["speedup"] = rows[0]["tokens_per_s"] / rows[1]["tokens_per_s"]
    command = shlex.join(["python", "-m", "evaluation.benchmarks.training_speed", *given])
    print(json.dumps({"command": command, "rows": rows, "provenance": provenance()}))


if __name__ == "__main__":
    main()
