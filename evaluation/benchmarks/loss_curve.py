r"""The loss curve of `llmslm fit` beside those of a plain loop: same weights to begin with, same data, same schedule.

    python -m evaluation.benchmarks.loss_curve --config debian_translation_en_it --steps 400 --seeds 1 2 3 \
        -- --model.system slm --data.pack_tokens 512 --data.micro_batch_size 16 --config hardware/1gpu

The plain loop is what one writes first: float32, padded batches of shuffled examples, eager, as many examples a step as
the recipe's packed rows hold on average (`plain`). It runs once more on the examples of our batches, step by step
(`same_batches`). Our curve less that one is what precision, packed attention, compiled kernels and graphs do
(`from_computing`); that one less `plain` is what the choice of batches does (`from_batches`), seed by seed. Our
validation loss is computed in the recipe's precision, the plain loop's in float32.

What follows `--` goes to `llmslm fit`. The last line is one JSON object.
"""

import argparse
import copy
import csv
import itertools
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import get_scheduler

from evaluation.benchmarks.report import mistakes_in_one_line
from llmslm import training
from llmslm.data.codec import IGNORED
from llmslm.data.datamodule import TextDataModule
from llmslm.data.loader import BatchLoader
from llmslm.data.sampler import LengthBatchSampler
from llmslm.module import SystemModule
from llmslm.provenance import provenance

Curve = dict[int, float]
"""Nats a target token of the validation split, by step."""

DIFFERENCES = {"from_computing": ("llmslm", "same_batches"), "from_batches": ("same_batches", "plain")}


class Watch(Callback):
    """Keeps the weights that a run begins with, and what it was trained on."""

    module: SystemModule
    data: TextDataModule
    sampler: LengthBatchSampler
    model: nn.Module
    device: torch.device
    clip: float | None
    examples, batches = 0, 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the model before it is compiled, and note its device, which it leaves after the fit."""
        assert isinstance(pl_module, SystemModule)
        assert pl_module.model is not None
        self.device = pl_module.device
        self.module, self.data = pl_module, trainer.datamodule  # type: ignore[attr-defined]
        self.model, self.clip = copy.deepcopy(pl_module.model), trainer.gradient_clip_val

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what says which examples make a batch."""
        assert isinstance(trainer.train_dataloader, BatchLoader)
        self.sampler = trainer.train_dataloader.batch_sampler  # type: ignore[assignment]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count the examples."""
        self.examples += batch["sizes"].examples
        self.batches += 1


def ours(config: str, seed: int, steps: int, every: int, arguments: list[str]) -> tuple[Curve, Watch]:
    """Fit, and return the validation losses."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        fixed = {
            "seed_everything": seed,
            "model.bleu_examples": 0,
            "checkpoint.monitor": "val/loss",
            "checkpoint.mode": "min",
            "trainer.default_root_dir": folder,
            "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
            "trainer.logger.save_dir": folder,
            "trainer.max_steps": steps,
            "trainer.val_check_interval": every,
            "trainer.check_val_every_n_epoch": "null",
            "trainer.enable_progress_bar": "false",
        }
        given = [f"--{key}={value}" for key, value in fixed.items()]
        training.run(["fit", "--config", config, *arguments, *given], callbacks=[watch])
        with next(Path(folder).rglob("metrics.csv")).open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("val/loss")]
    return {int(row["step"]) + 1: float(row["val/loss"]) for row in rows}, watch


def plain(watch: Watch, batches: Iterator[list[int]], seed: int, steps: int, every: int) -> Curve:
    """Train the same weights on batches of training examples, and return the validation losses at the same steps."""
    module, data, device = watch.module, watch.data, watch.device
    model = copy.deepcopy(watch.model).to(device).train()
    rows = data.rows("train")
    torch.manual_seed(seed)
    optimizer = module.optimizer_factory([p for p in model.parameters() if p.requires_grad])
    scheduler = get_scheduler(module.schedule, optimizer, module.warmup_steps, steps)
    curve: Curve = {}
    for step, examples in zip(range(1, steps + 1), batches, strict=False):
        batch = _on(data.codec.collate(rows.__getitems__(examples)), device)
        loss = _loss(model, batch, module.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if watch.clip:
            nn.utils.clip_grad_norm_(model.parameters(), watch.clip)
        optimizer.step()
        scheduler.step()
        if step % every == 0:
            curve[step] = _validation_loss(model, data, device)
    return curve


def same_batches(watch: Watch) -> Iterator[list[int]]:
    """Yield the examples of the batches that were trained, in their order."""
    watch.sampler.done = 0
    for watch.sampler.epoch in itertools.count():
        yield from watch.sampler


def shuffled_batches(watch: Watch, seed: int) -> Iterator[list[int]]:
    """Yield shuffled examples, in each batch as many as the trained batches had on average."""
    count, size = len(watch.data.rows("train")), round(watch.examples / watch.batches)
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(count)
        for begin in range(0, count - size + 1, size):
            yield order[begin : begin + size].tolist()


def _on(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _loss(model: nn.Module, batch: dict[str, Tensor], label_smoothing: float, reduction: str = "mean") -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


@torch.no_grad()
def _validation_loss(model: nn.Module, data: TextDataModule, device: torch.device) -> float:
    model.eval()
    rows, nats, tokens = data.rows("validation"), 0.0, 0
    for begin in range(0, len(rows), 64):
        examples = list(range(begin, min(begin + 64, len(rows))))
        batch = _on(data.codec.collate(rows.__getitems__(examples)), device)
        nats += float(_loss(model, batch, 0.0, "sum"))
        tokens += int((batch["labels"] != IGNORED).sum())
    model.train()
    return nats / tokens


def main(args: list[str] | None = None) -> None:
    """Compare from the command line."""
    given = sys.argv[1:] if args is None else args
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe of a decoder-only system, by name or path")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps")
    parser.add_argument("--every", type=int, default=100, help="steps between two validations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of weights and order")
    options = parser.parse_args(given[:split])
    command = shlex.join(["python", "-m", "evaluation.benchmarks.loss_curve", *given])
    curves: dict[str, list[Curve]] = {"llmslm": [], "same_batches": [], "plain": []}
    for number, seed in enumerate(options.seeds, start=1):
        curve, watch = ours(options.config, seed, options.steps, options.every, given[split + 1 :])
        curves["llmslm"].append(curve)
        length = (seed, options.steps, options.every)
        curves["same_batches"].append(plain(watch, same_batches(watch), *length))
        curves["plain"].append(plain(watch, shuffled_batches(watch, seed), *length))
        rows = [_row(step, curves) for step in sorted(curves["plain"][0])]
        about = {"command": command, "seeds": options.seeds[:number], "rows": rows, "provenance": provenance()}
        print(json.dumps(about), flush=True)  # after each seed, so that one that does not end takes nothing with it
        line = "{step:>6}  llmslm {llmslm:.4f}  same batches {same_batches:.4f}  plain {plain:.4f}  sd {sd:.4f}\n"
        for row in rows:
            sys.stderr.write(line.format(**row))


def _row(step: int, curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """Return the means over seeds, and the larger of the standard deviations: what another seed changes.

    Beside them mean and standard deviation of the differences that the docstring above names.
    """
    values = {name: [curve[step] for curve in of_seeds] for name, of_seeds in curves.items()}
    row: dict[str, Any] = {"step": step} | {name: statistics.mean(of_seeds) for name, of_seeds in values.items()}
    row["sd"] = max(_sd(of_seeds) for of_seeds in values.values())
    for name, (of, less) in DIFFERENCES.items():
        found = [a - b for a, b in zip(values[of], values[less], strict=True)]
        row[name] = {"mean": statistics.mean(found), "sd": _sd(found)}
    return row


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
