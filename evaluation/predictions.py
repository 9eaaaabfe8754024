"""Predictions as they come: one JSON line each, written by batches, so that a killed evaluation goes on."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from evaluation.examples import Examples
from evaluation.records import raise_if_full, write_text
from evaluation.systems import EvaluatedSystem
from llmslm.errors import UserError


@dataclass(frozen=True)
class Prediction:
    """What a system made of one example."""

    id: str
    prompt: str
    reference: str
    prediction: str
    tokens: int
    """Tokens produced, end of sequence included."""
    nats: float | None
    """-log p(reference | prompt), summed; None if it is not a number."""
    target_tokens: int
    """Tokens of the reference, end of sequence included."""


def predict(
    system: EvaluatedSystem, examples: Examples, path: Path, *, max_new_tokens: int, batch_size: int
) -> list[Prediction]:
    """Generate from every example and score its reference; what `path` already holds is not done again.

    Batches are sorted by length and are the same in every run, so that a resumed evaluation predicts exactly
    what an uninterrupted one does; a batch of which only a part was written is done again.

    Args:
        system: the system.
        examples: prompts and references.
        path: a JSONL file, appended to.
        max_new_tokens: token budget of a prediction.
        batch_size: examples in a batch.

    Returns:
        One prediction an example, in the order of the examples.
    """
    batches = _batches(examples, batch_size)
    done = {row.id: row for row in _complete(read_partial(path), batches, examples)}
    _rewrite(path, list(done.values()))
    bar = tqdm(total=len(examples), initial=len(done), desc=f"predict {system.name}", unit="example", delay=1)
    with bar, path.open("a", encoding="utf-8") as lines:
        for batch in batches:
            if examples.ids[batch[0]] in done:
                continue
            rows = _predict_batch(system, examples, batch, max_new_tokens)
            _append(lines, rows)
            done |= {row.id: row for row in rows}
            bar.update(len(rows))
    return [done[name] for name in examples.ids]


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Read a finished predictions file.

    Raises:
        UserError: if a line is broken; its number is named.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg}); run the evaluation again") from error
    return rows


def read_partial(path: Path) -> list[Prediction]:
    """Read what a killed evaluation left: whole lines; a last line that was cut is dropped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows.append(Prediction(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            break
    return rows


def _append(lines: TextIO, rows: Sequence[Prediction]) -> None:
    """Write a batch through to the disk."""
    try:
        lines.write("".join(_line(row) for row in rows))
        lines.flush()
        os.fsync(lines.fileno())
    except OSError as error:
        raise_if_full(error, f"free some space, and the same command goes on with {lines.name}")
        raise


def _line(row: Prediction) -> str:
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


def _batches(examples: Examples, batch_size: int) -> list[list[int]]:
    """Deal indices into batches of like length, longest first: what does not fit fails at once."""
    order = sorted(range(len(examples)), key=lambda index: (-len(examples.prompts[index]), examples.ids[index]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _complete(rows: Sequence[Prediction], batches: list[list[int]], examples: Examples) -> Iterator[Prediction]:
    by_id = {row.id: row for row in rows}
    for batch in batches:
        names = [examples.ids[index] for index in batch]
        if all(name in by_id for name in names):
            yield from (by_id[name] for name in names)


def _rewrite(path: Path, rows: list[Prediction]) -> None:
    write_text(path, "".join(_line(row) for row in rows))


def _predict_batch(
    system: EvaluatedSystem, examples: Examples, batch: list[int], max_new_tokens: int
) -> list[Prediction]:
    prompts = [examples.prompts[index] for index in batch]
    targets = [examples.references[index] for index in batch]
    generations = system.generate(prompts, max_new_tokens=max_new_tokens)
    scores = system.log_likelihood(prompts, targets)
    nats = [score.nats if math.isfinite(score.nats) else None for score in scores]
    return [
        Prediction(examples.ids[index], prompt, target, generation.text, generation.tokens, nat, score.tokens)
        for index, prompt, target, generation, nat, score in zip(
            batch, prompts, targets, generations, nats, scores, strict=True
        )
    ]
