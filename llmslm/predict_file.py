"""Predictions for a file of prompts: batches of like length, memory that does not grow with the file, resumable."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from llmslm.data.sources.files import read_jsonl
from llmslm.errors import UserError
from llmslm.generation.int8 import weights
from llmslm.generation.sampling import Sampling
from llmslm.system import Generation, System
from llmslm.writing import is_disk_full, refuse_existing

_WINDOW = 32  # batches that are read ahead and sorted by length


@dataclass(frozen=True)
class Prompt:
    """One line of the input."""

    place: str
    """Where it stands, for messages."""
    id: str
    """Its `id` field, or else the number of its line."""
    prompt: str


@dataclass(frozen=True)
class Throughput:
    """What a call did, without what an earlier one had done."""

    prompts: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        rate = self.tokens / max(self.seconds, 1e-9)
        return f"{self.prompts} prompts, {self.tokens} tokens in {self.seconds:.1f} s ({rate:.1f} tokens/s)"


def predict_file(
    system: System,
    source: Path,
    out: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling | None = None,
) -> Throughput:
    """Write one JSON line a prompt to `out`: id, prompt and prediction, in the order of the input.

    The lines gather in a hidden file beside `out`, which takes its name in the end. A call that finds such a file of
    the same system and settings goes on behind those of its lines whose id and prompt are the input's.

    Args:
        system: predicts.
        source: .txt, one prompt a line, or .jsonl, objects with a `prompt` and, if wanted, an `id`.
        out: where to write.
        max_new_tokens: the token budget of each prediction.
        batch_size: prompts decoded together.
        sampling: how tokens are drawn; each batch has a seed of its own.

    Raises:
        UserError: if `out` is there, or for a line that is no prompt, before anything is predicted; for a prompt that
            is too long; if the disk is full.
    """
    total = sum(1 for _ in read_prompts(source))
    precision = sorted({str(weight.dtype) for weight in weights(system.model)})
    drawn = None if sampling is None else asdict(sampling)
    settings = [system.name, system.card, precision, max_new_tokens, batch_size, drawn]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
    part = out.with_name(f".{out.name}.{key}.part")
    done = _writable(out, part, source)
    seeds = itertools.count(done)

    def predict(batch: list[Prompt]) -> list[Generation]:
        seeded = None if sampling is None else replace(sampling, seed=sampling.seed + next(seeds))
        return predict_batch(system, batch, max_new_tokens, seeded)

    try:
        with part.open("a", encoding="utf-8") as file, Progress("generate", total, done) as progress:
            prompts = islice(read_prompts(source), done, None)
            while window := list(islice(prompts, _WINDOW * batch_size)):
                file.writelines(map(_line, window, predict_window(predict, window, batch_size, progress)))
                file.flush()
        part.replace(out)
    except OSError as error:
        reason = "the disk is full" if is_disk_full(error) else f"{out} cannot be written: {error.strerror}"
        raise UserError(f"{reason}; what was predicted is kept, run the same command again to go on") from error
    finally:
        if part.is_file() and part.stat().st_size == 0:  # there is nothing to go on with
            part.unlink()
    return progress.throughput(total - done)


def read_prompts(source: Path) -> Iterator[Prompt]:
    """Read prompts one by one.

    Raises:
        UserError: if the file cannot be read, or at the line that is no prompt.
    """
    if source.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{source} is neither .txt (a prompt a line) nor .jsonl (objects with a prompt) (--input)")
    try:
        for place, record in read_jsonl(source) if source.suffix == ".jsonl" else _read_lines(source):
            prompt = record.get("prompt")
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"{source}, {place}: prompt is missing, empty or no text; every line needs one")
            name = str(record["id"]) if record.get("id") is not None else place.rpartition(" ")[2]
            yield Prompt(f"{source}, {place}", name, prompt)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror} (--input)") from error


def _read_lines(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with source.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield f"line {number}", {"prompt": line.decode("utf-8").rstrip("\r\n")}
            except UnicodeDecodeError as error:
                raise UserError(f"{source}, line {number}: not UTF-8 ({error.reason})") from error


def _writable(out: Path, part: Path, source: Path) -> int:
    """Find out before hours of work whether `out` can be written; count the lines that are there already."""
    refuse_existing(out, "--output")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.open("ab").close()
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror} (--output)") from error
    return _keep_matching(part, source)


def _keep_matching(part: Path, source: Path) -> int:
    """Cut an unfinished output behind its last line that is of the input's prompt at that place; count its lines."""
    done = size = 0
    with part.open("rb") as lines:
        for line, prompt in zip(lines, read_prompts(source), strict=False):
            if not line.endswith(b"\n") or not _is_of(line, prompt):
                break
            done, size = done + 1, size + len(line)
    with part.open("rb+") as file:
        file.truncate(size)
    return done


def _is_of(line: bytes, prompt: Prompt) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and (record.get("id"), record.get("prompt")) == (prompt.id, prompt.prompt)


def _line(prompt: Prompt, prediction: Generation) -> str:
    record = {"id": prompt.id, "prompt": prompt.prompt, "prediction": prediction.text}
    return json.dumps(record, ensure_ascii=False) + "\n"


def predict_window(
    predict: Callable[[list[Prompt]], list[Generation]], window: list[Prompt], batch_size: int, progress: "Progress"
) -> list[Generation]:
    """Predict in batches of like length, the longest first: if memory does not suffice, it shows at once.

    Args:
        predict: for a batch.
        window: prompts.
        batch_size: prompts decoded together.
        progress: counts them.

    Returns:
        The predictions in the window's order.
    """
    order = sorted(range(len(window)), key=lambda i: -len(window[i].prompt))
    predictions: dict[int, Generation] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        generations = predict([window[i] for i in batch])
        predictions |= zip(batch, generations, strict=True)
        progress.add(generations)
    return [predictions[i] for i in range(len(window))]


def predict_batch(
    system: System, batch: list[Prompt], max_new_tokens: int, sampling: Sampling | None = None
) -> list[Generation]:
    """Predict one batch.

    Raises:
        UserError: for a prompt that is too long, with its place.
    """
    try:
        return system.generate([one.prompt for one in batch], max_new_tokens=max_new_tokens, sampling=sampling)
    except UserError as error:
        for one in batch:
            try:
                system.codec.encode([one.prompt])
            except UserError as reason:
                raise UserError(f"{one.place}: {reason}") from error
        raise


class Progress:
    """A bar with throughput on standard error: on a terminal alone, and only if it takes a while.

    Args:
        name: in front of the bar.
        total: prompts in the input, None if nobody knows.
        done: prompts that an earlier call has predicted.
    """

    def __init__(self, name: str, total: int | None, done: int = 0) -> None:
        self.bar = tqdm(total=total, initial=done, unit="prompt", delay=1, disable=None, desc=name)
        self.tokens, self.start = 0, time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_args: object) -> None:
        self.bar.close()

    def add(self, generations: list[Generation]) -> None:
        """Count a batch."""
        self.tokens += sum(generation.tokens for generation in generations)
        rate = self.tokens / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self.bar.update(len(generations))

    def throughput(self, prompts: int) -> Throughput:
        """What was done since the start."""
        return Throughput(prompts, self.tokens, time.perf_counter() - self.start)
