"""COMET by its own command, with a checkpoint that lies on this machine; times 100, as its users print it.

The package unbabel-comet needs older versions of numpy and transformers than this project, so it cannot be imported
here: it lives in an environment of its own, and its command `comet-score` is called.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate

from evaluation.bootstrap import Statistics, mean_statistics
from evaluation.metrics.texts import References, reference_lists
from llmslm.errors import UserError

NAME = "comet"
COMMAND = "comet-score"


def check_comet(model: str) -> str:
    """Return the command's path.

    Raises:
        UserError: if the command or the checkpoint is missing.
    """
    found = shutil.which(COMMAND)
    if found is None:
        raise UserError(
            f"metric comet needs the command {COMMAND} of the package unbabel-comet, in an environment of its own "
            "(its versions are not those of llmslm): pipx install unbabel-comet"
        )
    if not Path(model).is_file():
        raise UserError(f"there is no COMET checkpoint {model!r}; expected a .ckpt file (comet=FILE)")
    return found


def comet_statistics(
    predictions: Sequence[str], references: References, sources: Sequence[str], model: str
) -> list[Statistics]:
    """Return each example's COMET; the first of several references counts.

    Raises:
        UserError: if the counts differ, or the command fails.
    """
    command = check_comet(model)
    lists = reference_lists(predictions, references)
    if len(sources) != len(predictions):
        raise UserError(f"{len(predictions)} predictions but {len(sources)} sources; expected one for one")
    scores = _run(command, {"s": sources, "t": predictions, "r": [gold[0] for gold in lists]}, model)
    return [mean_statistics(NAME, scores, f"{COMMAND}|model:{Path(model).parent.parent.name}/{Path(model).name}")]


def _run(command: str, texts: dict[str, Sequence[str]], model: str) -> list[float]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        paths = {side: Path(folder, side) for side in texts}
        for side, path in paths.items():  # one line a text
            path.write_text("".join(" ".join(text.split()) + "\n" for text in texts[side]), encoding="utf-8")
        sides = [word for side, path in paths.items() for word in (f"-{side}", str(path))]
        out = Path(folder, "scores.json")
        settings = ["--model", model, "--to_json", str(out), "--only_system", "--quiet"]
        done = subprocess.run(
            [command, *sides, *settings, "--gpus", str(min(1, torch.cuda.device_count()))],
            capture_output=True,
            text=True,
        )
        if done.returncode or not out.is_file():
            last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            raise UserError(f"{COMMAND} failed: {last[:300]}")
        (rows,) = json.loads(out.read_text(encoding="utf-8")).values()
    if len(rows) != len(texts["t"]):
        raise UserError(f"{COMMAND} gave {len(rows)} scores for {len(texts['t'])} predictions")
    return [float(row["COMET"]) for row in rows]


class Comet(evaluate.Metric):
    """COMET (Rei et al. 2020): a trained judge of translations; `model` is a local checkpoint."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="Rei et al. 2020, COMET: A Neural Framework for MT Evaluation",
            inputs_description="predictions, references, sources: texts.",
            features=datasets.Features({"predictions": text, "references": text, "sources": text}),
        )

    def _compute(
        self, predictions: datasets.Sequence, references: datasets.Sequence, sources: datasets.Sequence, model: str
    ) -> dict[str, Any]:
        (statistics,) = comet_statistics(predictions, references, sources, model)
        return {NAME: statistics.value(), f"{NAME}_signature": statistics.signature}
