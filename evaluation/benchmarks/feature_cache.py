"""Steps per second from the feature cache over those of encoding on the fly: one recipe, one machine, taking turns.

    python -m evaluation.benchmarks.feature_cache --out evaluation/records/training/feature-cache-cpu.json

What follows `--` goes to `llmslm fit` and `llmslm features`. The LLM keeps nearly random weights, which cost what
trained ones do; its default makes an encoder of 20 times the quickstart's SLM. Some examples of the recipe's source
are enough. Each turn trains from the start with the same seed, so the losses of both ways are compared, too.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from evaluation.benchmarks.report import mistakes_in_one_line, report
from llmslm import training
from llmslm.callbacks.write_features import WriteFeatures, Written
from llmslm.recipe import load_source
from llmslm.writing import write_text

LLM = {
    "model_type": "t5",
    "d_model": 384,
    "d_kv": 64,
    "d_ff": 1152,
    "num_layers": 5,
    "num_decoder_layers": 1,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
WARMUP = 2
"""Steps of a turn before its clock starts."""
TOLERANCE = 2**-7
"""Relative difference of losses; states of bf16 have 8 bits."""
QUIET = ("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
SHORT = ("--trainer.limit_val_batches=0", "--checkpoint.save_top_k=0", "--checkpoint.save_last=false")


@dataclass
class Turn(Callback):
    """One training: its losses, and the time of its steps."""

    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Note the loss, which waits for the device, and the time."""
        self.losses.append(float(outputs["loss"]))
        self.times.append(time.perf_counter())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what was trained, and the encoder."""
        model: Any = pl_module.model
        encoder, slm = model.encoder, model.slm
        self.parameters = {
            name: sum(p.numel() for p in m.parameters()) for name, m in (("encoder", encoder), ("slm", slm))
        }

    @property
    def steps_per_s(self) -> float:
        """Return the speed after the warm-up."""
        return (len(self.times) - WARMUP) / (self.times[-1] - self.times[WARMUP - 1])


def measure(config: str, arguments: Sequence[str], *, steps: int, rounds: int, examples: int) -> dict[str, Any]:
    """Let both ways train in turns.

    Args:
        config: recipe.
        arguments: of `llmslm fit`.
        steps: of a turn.
        rounds: turns of each way.
        examples: of the source's training split.

    Returns:
        Steps per second, ratio, losses and sizes, in plain types.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit = ["fit", "--config", config, *QUIET, *_data(config, folder, examples)]
        llm = ["--model.system=llm", "--trainer.max_steps=1", f"--trainer.default_root_dir={folder / 'llm'}"]
        training.run([*fit, f"--model.llm.config={json.dumps(LLM)}", *SHORT, *arguments, *llm])
        fit += [f"--model.encoder.source={folder / 'llm' / 'system'}", f"--trainer.default_root_dir={folder / 'run'}"]
        begin = time.perf_counter()
        try:
            training.run([*fit, *arguments, "--model.system=llm_to_slm"], [WriteFeatures(folder / "features")])
        except Written:
            written_s = time.perf_counter() - begin
        fit += [*SHORT, f"--trainer.max_steps={steps}", *arguments, "--model.system=llm_to_slm"]
        ways: dict[str, list[Turn]] = {"on_the_fly": [], "cached": []}
        for _ in range(rounds):
            for way, more in (("on_the_fly", []), ("cached", [f"--model.encoder.features={folder / 'features'}"])):
                ways[way].append(Turn())
                training.run([*fit, *more], [ways[way][-1]])
        return _compared(ways) | _sizes(folder / "features") | {"features_written_s": written_s, "steps": steps}


def _data(config: str, folder: Path, examples: int) -> list[str]:
    """Write a part of the recipe's data to files, and return the arguments that read those."""
    source = load_source(config)
    source.prepare()
    files = {}
    for split, count in (("train", examples), ("validation", 8)):
        rows = [{key: row[key] for key in ("id", "prompt", "target")} for row in islice(source.load(split), count)]  # type: ignore[arg-type]
        files[split] = str(folder / f"{split}.jsonl")
        write_text(Path(files[split]), "".join(json.dumps(row) + "\n" for row in rows))
    source_spec = {"class_path": "llmslm.data.sources.TextFiles", "init_args": files}
    return [f"--data.source={json.dumps(source_spec)}"]


def _compared(ways: dict[str, list[Turn]]) -> dict[str, Any]:
    fly, cached = ways["on_the_fly"], ways["cached"]
    ratios = [there.steps_per_s / here.steps_per_s for there, here in zip(cached, fly, strict=True)]
    pairs = [
        pair for one, other in zip(fly, cached, strict=True) for pair in zip(one.losses, other.losses, strict=True)
    ]
    difference = max(abs(one - other) / abs(one) for one, other in pairs)
    counts = fly[0].parameters
    return {
        "steps_per_s": {way: [turn.steps_per_s for turn in turns] for way, turns in ways.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "losses": {way: turns[0].losses for way, turns in ways.items()},
        "largest_relative_difference": difference,
        "same_losses": difference <= TOLERANCE,
        "parameters": counts | {"ratio": counts["encoder"] / counts["slm"]},
    }


def _sizes(folder: Path) -> dict[str, float]:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    count = sum(split["examples"] for split in manifest["splits"].values())
    return {"examples": count, "bytes_per_example": size / count}


def main(args: list[str] | None = None) -> None:
    """Measure from the command line."""
    given = sys.argv[1:] if args is None else args
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart", help="recipe, by name or path (default: quickstart)")
    parser.add_argument(
        "--steps", type=int, default=6, help=f"optimizer steps of a turn (default: 6), {WARMUP} uncounted"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way (default: 5)")
    parser.add_argument("--examples", type=int, default=256, help="examples that are encoded (default: 256)")
    parser.add_argument("--out", type=Path, help="JSON file of the record")
    options = parser.parse_args(given[:split])
    found = measure(
        options.config, given[split + 1 :], steps=options.steps, rounds=options.rounds, examples=options.examples
    )
    command = shlex.join(["python", "-m", "evaluation.benchmarks.feature_cache", *given])
    report({"command": command, **found}, options.out)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
