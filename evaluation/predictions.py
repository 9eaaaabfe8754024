"""Predictions as they come: one JSON line each, written by batches, so that a killed evaluation goes on."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

import llmslm
from evaluation.examples import Examples
from evaluation.ranks import Ranks
from evaluation.systems import EvaluatedSystem
from llmslm.errors import UserError
from llmslm.writing import raise_if_full, write_bytes, write_text

ALONE = Ranks()
PREDICTING = ("python", "torch", "transformers", "tokenizers")
"""Packages that decide about predictions; those that score or train do not."""
LOCKS = ".predicting"
"""Folder of the locks by which comparisons wait for each other."""
MODULES = ("arms", "ctranslate2_system", "peers", "predictions", "systems")
"""Of this package, the ones that do."""
_SMALL = 10_000_000
"""Parameters up to which a system on a CPU gains little by several threads."""


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
    system: EvaluatedSystem,
    examples: Examples,
    path: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    ranks: Ranks = ALONE,
) -> list[Prediction]:
    """Generate from every example and score its reference; what an earlier call wrote is not done again.

    Batches are sorted by length and are the same in every run and on any number of ranks, among which they are dealt
    out, so that the predictions are exactly the same too. A batch of which only a part was written is done again.

    Args:
        system: the system.
        examples: prompts and references.
        path: a JSONL file. Each rank appends to a file of its own beside it; the first rank puts them together.
        max_new_tokens: token budget of a prediction.
        batch_size: examples in a batch.
        ranks: the processes that share the work.

    Returns:
        One prediction an example, in the order of the examples, on every rank.
    """
    batches = _batches(examples, batch_size)
    shard = path.with_name(f"{path.stem}.rank{ranks.rank}{path.suffix}")
    written = [row for each in (path, *_shards(path)) for row in read_partial(each)]
    done = _complete([row for rows in ranks.gather_all(written) for row in rows], batches, examples)
    if ranks.is_first:
        _rewrite(path, batches, examples, done)
    ranks.gather_all(None)  # no rank begins its file anew before what is in it is in the common file
    missing = [batch for batch in batches if examples.ids[batch[0]] not in done]
    _predict_batches(system, examples, missing[ranks.rank :: ranks.size], shard, max_new_tokens)
    made = [row for rows in ranks.gather_all(read_partial(shard)) for row in rows]
    done |= {row.id: row for row in made}
    if ranks.is_first:
        _rewrite(path, batches, examples, done)
    ranks.gather_all(None)  # no shard goes before its predictions are in the common file
    for each in _shards(path):
        each.unlink(missing_ok=True)
    return [done[name] for name in examples.ids]


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Read a finished predictions file.

    Raises:
        UserError: if a line is broken; its number is named.
    """
    rows = []
    for number, line in enumerate(_lines(path), start=1):
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
    for line in _lines(path):
        try:
            rows.append(Prediction(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            break
    return rows


@contextmanager
def shared(path: Path, folder: Path | None) -> Iterator[None]:
    """Begin with what another comparison in a folder predicted; one that would predict the same meanwhile waits.

    Args:
        path: a file of predictions, whose name tells all that decides about them.
        folder: files of this name in it, however deep, are of the same predictions; None shares nothing.
    """
    if folder is None:
        yield
        return
    from filelock import FileLock

    (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCKS / f"{path.name}.lock"):
        sizes = {each: each.stat().st_size for each in (*folder.rglob(path.name), path) if each.is_file()}
        longest = max(sizes, key=sizes.__getitem__, default=path)
        if sizes.get(longest, 0) > sizes.get(path, 0):
            write_bytes(path, longest.read_bytes())
        yield


def source_hash() -> str:
    """Hash the code that predicts: the library, and of the evaluation the systems (sha256, hex).

    A mended metric or page leaves it as it is, so that what was predicted before is scored anew.
    """
    digest = hashlib.sha256()
    here, library = Path(__file__).parent, Path(llmslm.__file__).parent
    for path in (*(here / f"{name}.py" for name in MODULES), *sorted(library.rglob("*.py"))):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def forget(path: Path) -> None:
    """Remove the predictions of earlier calls."""
    for each in (path, *_shards(path)):
        each.unlink(missing_ok=True)


def _lines(path: Path) -> list[str]:
    """Split at line feeds alone: texts may hold other characters that Python takes for the end of a line."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text.removesuffix("\n").split("\n") if text else []


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
    """Deal indices into batches of like length, longest first: what does not fit fails at once.

    A last one that would be alone joins the batch before it: a control takes its features from the others.
    """
    order = sorted(range(len(examples)), key=lambda index: (-len(examples.prompts[index]), examples.ids[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if batch_size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def _shards(path: Path) -> list[Path]:
    """Find the files of the ranks of this or an earlier call."""
    return sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))


def _complete(rows: Sequence[Prediction], batches: list[list[int]], examples: Examples) -> dict[str, Prediction]:
    """Keep the predictions of batches that are there in full, once each."""
    by_id = {row.id: row for row in rows}
    names = [[examples.ids[index] for index in batch] for batch in batches]
    return {name: by_id[name] for batch in names if all(name in by_id for name in batch) for name in batch}


def _rewrite(path: Path, batches: list[list[int]], examples: Examples, done: Mapping[str, Prediction]) -> None:
    """Write what is done in the order of the batches."""
    names = [examples.ids[index] for batch in batches for index in batch]
    write_text(path, "".join(_line(done[name]) for name in names if name in done))


def _predict_batches(
    system: EvaluatedSystem, examples: Examples, batches: list[list[int]], shard: Path, max_new_tokens: int
) -> None:
    """Predict batches, appending each to the shard when it is done."""
    total = sum(len(batch) for batch in batches)
    shard.parent.mkdir(parents=True, exist_ok=True)
    with (
        _one_thread(system),
        tqdm(total=total, desc=f"predict {system.name}", unit="example", delay=1) as bar,
        shard.open("w", encoding="utf-8") as lines,
    ):
        for batch in batches:
            _append(lines, _predict_batch(system, examples, batch, max_new_tokens))
            bar.update(len(batch))


@contextmanager
def _one_thread(system: EvaluatedSystem) -> Iterator[None]:
    """Leave a small system on a CPU one thread of PyTorch.

    The last bits of sums depend on how many threads share them, and each of several ranks has fewer than a process
    that is alone: their scores would be the same no more.
    """
    device = getattr(system, "device", None)
    if device is None or device.type != "cpu" or system.parameters().get("total", 0) > _SMALL:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _predict_batch(
    system: EvaluatedSystem, examples: Examples, batch: list[int], max_new_tokens: int
) -> list[Prediction]:
    prompts = [examples.prompts[index] for index in batch]
    targets = [examples.references[index] for index in batch]
    generations = system.generate(prompts, max_new_tokens=max_new_tokens)
    scores = system.log_likelihood(prompts, targets)
    for method, found in (("generate", generations), ("log_likelihood", scores)):
        if len(found) != len(prompts):
            raise UserError(f"{method} of {system.name} returned {len(found)} results for {len(prompts)} prompts")
    nats = [score.nats if math.isfinite(score.nats) else None for score in scores]
    return [
        Prediction(examples.ids[index], prompt, target, generation.text, generation.tokens, nat, score.tokens)
        for index, prompt, target, generation, nat, score in zip(
            batch, prompts, targets, generations, nats, scores, strict=True
        )
    ]
