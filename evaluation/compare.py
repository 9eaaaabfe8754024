"""The comparison: the same examples through every system, scored, timed and written as records."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.bootstrap import RESAMPLES, SEED
from evaluation.examples import Examples, load_examples, text_hash
from evaluation.measure import NOT_MEASURED, measure
from evaluation.predictions import ALONE, PREDICTING, Prediction, forget, predict, shared, source_hash
from evaluation.ranks import Ranks, join_ranks, leave_ranks
from evaluation.record import SCHEMA_VERSION, SUFFIX, Record, read_record, write_record
from evaluation.scoring import DEFAULT_METRICS, Scored, as_record, check_metrics, score, statistics_of
from evaluation.speed import RUNS, WARMUPS, BatchSize
from evaluation.systems import LLM, SLM, Arm, control_arms, decoder_of, file_stem
from llmslm.errors import UserError
from llmslm.provenance import changes, provenance

if TYPE_CHECKING:
    from llmslm.data.sources import Split

DEFAULT_BUDGET = 128
LENGTH_GATE = 0.9
"""Produced over reference tokens that natural-length speed needs (MLPerf's rule)."""


@dataclass(frozen=True)
class Settings:
    """How to evaluate; the defaults are those of the command line."""

    out: Path
    """Folder of the records."""
    max_new_tokens: int | None = None
    """Token budget of a prediction, and the length of the fixed-length mode; None takes the longest target that the
    systems were trained on."""
    batch_size: int = 16
    """Examples in a batch of predictions; does not concern speed."""
    metrics: Sequence[str] = DEFAULT_METRICS
    seed: int = SEED
    """Of the draw of examples and of the bootstrap."""
    resamples: int = RESAMPLES
    controls: bool = False
    """Also evaluate llm_to_slm with zero features and with those of another prompt."""
    speed_batch_sizes: Sequence[BatchSize] = (1,)
    """Numbers, and "largest" for the largest that fits of each system that decodes by the engine."""
    warmups: int = WARMUPS
    runs: int = RUNS
    """Measured rounds of each mode and batch size; 0 measures neither speed nor memory."""
    reuse: Path | None = None
    """Folder of further comparisons, whose predictions are taken over where they would be made again."""


def compare_folders(
    folders: Mapping[str, str],
    data: str | Examples,
    settings: Settings,
    *,
    split: "Split" = "test",
    limit: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    peers: Sequence[str] = (),
    specs: Sequence[str] = (),
) -> list[Path]:
    """Load systems from their folders and compare them on a data source, on all ranks that were started.

    Args:
        folders: by system name, run folders or the system folders in them.
        data: a recipe, or a JSONL or Parquet file; or examples, for which split and limit do not matter.
        settings: how to evaluate.
        split: of the data.
        limit: evaluate at most so many examples.
        device: a torch device; a GPU if there is one, by default.
        dtype: float32 or bfloat16, for all systems.
        peers: names of `evaluation.arms.PEERS`.
        specs: further systems; see `evaluation.arms.load_arms`.

    Returns:
        The records written, in the order of the systems, controls last.
    """
    import torch

    from evaluation.arms import load_arms

    ranks = join_ranks()
    if device is None:
        gpus = torch.cuda.device_count()  # one, where the scheduler shows each task its own alone
        device = f"cuda:{ranks.local_rank % gpus}" if gpus else "cpu"
    examples = data if isinstance(data, Examples) else load_examples(data, split, limit, settings.seed)
    arms = load_arms(folders, device, dtype, peers, specs)
    paths = compare(arms, examples, settings, ranks)
    leave_ranks(ranks)
    return paths


def compare(arms: Sequence[Arm], examples: Examples, settings: Settings, ranks: Ranks = ALONE) -> list[Path]:
    """Compare systems on the same examples and write one record each.

    What an earlier call with the same systems, examples and settings predicted is taken over, also if it was
    killed or failed in scoring, if what predicts was the same code on the same kind of machine. If its records are
    complete, too, they are returned as they are. Scores are written before anything is timed.

    Several ranks share the predictions; the first one alone scores, times and writes.

    Returns:
        The records written, in the order of the arms, controls last; nothing on ranks but the first.
    """
    check_metrics(settings.metrics)
    if settings.controls:
        arms = [*arms, *_controls(arms, examples, settings)]
    budget = _budget(arms, settings)
    origin, changed, source = ranks.from_first((provenance(), changes(), source_hash()))
    versions = {name: origin["versions"].get(name) for name in PREDICTING}
    code = [source, versions, [origin["hardware"][name] for name in ("cpu", "gpus")]]
    keys = [_prediction_key(arm, examples, [budget, settings.batch_size], code) for arm in arms]
    comparison = _comparison_hash(keys, settings, origin, changed)
    paths = [settings.out / (_stem(arm, examples) + SUFFIX) for arm in arms]
    identified = all(arm.checkpoint for arm in arms)
    finished = identified and not origin["dirty"] and all(_is_of(path, comparison) for path in paths)
    if ranks.from_first(finished):
        return paths if ranks.is_first else []
    stems = [f"{_stem(arm, examples)}.{key[:12]}" for arm, key in zip(arms, keys, strict=True)]
    files = [settings.out / "predictions" / f"{stem}.jsonl" for stem in stems]
    sizes = {"max_new_tokens": budget, "batch_size": settings.batch_size}
    places = zip(arms, files, strict=True)
    predictions = [_predict(arm, examples, file, ranks, settings.reuse, **sizes) for arm, file in places]
    if not ranks.is_first:
        return []
    cut = _cut_references(arms, predictions)
    scored = _score_all(arms, predictions, examples, settings, cut)
    records = [
        {
            "schema_version": SCHEMA_VERSION,
            **_identity(arm, examples, settings, rows, budget),
            "length": _length(rows, cut),
            "predictions": file.relative_to(settings.out).as_posix(),
            **_quality(arm, examples, settings, scored),
            "provenance": origin,
        }
        for arm, rows, file in zip(arms, predictions, files, strict=True)
    ]
    if settings.runs:  # scores are kept, whatever becomes of the clock: they are those of a call that asks for none
        unmeasured = _comparison_hash(keys, replace(settings, runs=0), origin, changed)
        _write_records(paths, records, unmeasured, {})
    timed = [arm.system for arm in arms if not arm.is_control]
    measured = measure(timed, examples.prompts, budget, settings.speed_batch_sizes, settings.warmups, settings.runs)
    _write_records(paths, records, comparison, measured)
    return paths


def _write_records(
    paths: Sequence[Path], records: Sequence[Record], comparison: str, measured: Mapping[str, Record]
) -> None:
    for path, record in zip(paths, records, strict=True):
        costs = measured.get(record["system"], NOT_MEASURED)
        write_record(path, {**record, "comparison": comparison, **costs})


def _predict(
    arm: Arm, examples: Examples, file: Path, ranks: Ranks, reuse: Path | None, **sizes: int
) -> list[Prediction]:
    if arm.checkpoint is None:
        forget(file)
        reuse = None
    with shared(file, reuse if ranks.is_first else None):
        return predict(arm.system, examples, file, **sizes, ranks=ranks)


def _controls(arms: Sequence[Arm], examples: Examples, settings: Settings) -> list[Arm]:
    """Make the controls, or say what they lack before hours are spent on the rest."""
    controls = control_arms(arms)
    if not controls:
        raise UserError("controls destroy what an llm_to_slm system is told; give one (--llm-to-slm DIR)")
    if min(settings.batch_size, len(examples)) < 2:
        raise UserError(
            f"shuffled features are those of another prompt of a batch; {len(examples)} examples in batches of "
            f"{settings.batch_size} were given (--batch-size, --limit)"
        )
    return controls


def _stem(arm: Arm, examples: Examples) -> str:
    """Name the files of a system on a split."""
    task = examples.task if examples.split == "test" else f"{examples.task}-{examples.split}"
    return file_stem(task, arm.system.name)


def _budget(arms: Sequence[Arm], settings: Settings) -> int:
    limits = [arm.target_limit for arm in arms if arm.target_limit is not None]
    return settings.max_new_tokens or max(limits, default=DEFAULT_BUDGET)


def _comparison_hash(keys: Sequence[str], settings: Settings, origin: Mapping[str, Any], changed: str | None) -> str:
    chosen = {name: value for name, value in asdict(settings).items() if name not in ("out", "reuse")}
    return _hash([list(keys), chosen, origin["hardware"], origin["commit"], changed, origin["versions"]])


def _prediction_key(arm: Arm, examples: Examples, sizes: Sequence[int], code: Sequence[Any]) -> str:
    """Hash all that decides about predictions, so that no others are taken for them."""
    data = [examples.task, examples.version, examples.split, examples.hashes()]
    place = [arm.device, arm.dtype]
    return _hash([arm.system.name, arm.checkpoint, place, data, *sizes, code])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _is_of(path: Path, comparison: str) -> bool:
    try:
        return bool(read_record(path)["comparison"] == comparison)
    except UserError:
        return False


def _score_all(
    arms: Sequence[Arm],
    predictions: Sequence[Sequence[Prediction]],
    examples: Examples,
    settings: Settings,
    cut: Set[str],
) -> dict[str, Scored]:
    scored = {}
    for arm, rows in zip(arms, predictions, strict=True):
        columns: dict[str, list[Any]] = {
            "prompt": examples.prompts,
            "prediction": [row.prediction for row in rows],
            "nats": [math.nan if row.nats is None else row.nats for row in rows],
            "target_tokens": [0 if row.id in cut else row.target_tokens for row in rows],
        }
        statistics = statistics_of(settings.metrics, examples.references, columns)
        scored[arm.system.name] = score(statistics, settings.resamples, settings.seed)
    return scored


def _cut_references(arms: Sequence[Arm], predictions: Sequence[Sequence[Prediction]]) -> set[str]:
    """Find the examples whose reference one of the systems may have had to cut.

    They are left out of the likelihood and of the length ratio of all: nats of a part of a text over the bytes of all
    of it would flatter a system, and so would a part of a reference as the length to reach; and systems are compared on
    the same examples only.
    """
    return {
        row.id
        for arm, rows in zip(arms, predictions, strict=True)
        for row in rows
        if arm.target_limit is not None and row.target_tokens >= arm.target_limit
    }


def _quality(arm: Arm, examples: Examples, settings: Settings, scored: Mapping[str, Scored]) -> Record:
    name = arm.system.name
    baselines = {other: scored[other] for other in (LLM, SLM) if other in scored and other != name}
    perplexity = scored[name].statistics.get("perplexity")
    likelihood = int((perplexity.rows[:, 1] > 0).sum()) if perplexity is not None else 0
    return {
        "examples": {"original": examples.original, "effective": len(examples), "likelihood": likelihood},
        "scores": as_record(scored[name], baselines, settings.resamples, settings.seed),
    }


def _identity(arm: Arm, examples: Examples, settings: Settings, rows: Sequence[Prediction], budget: int) -> Record:
    hashes = {
        "predictions": text_hash(examples.ids, [row.prediction for row in rows]),
        "checkpoint": arm.checkpoint,
    }
    chosen = {name: getattr(settings, name) for name in ("batch_size", "seed", "resamples")}
    return {
        "system": arm.system.name,
        "task": {
            "name": examples.task,
            "version": examples.version,
            "split": examples.split,
            "data": examples.fingerprint,
        },
        "parameters": arm.system.parameters(),
        "hashes": {**examples.hashes(), **hashes},
        "settings": {
            **{"max_new_tokens": budget, **chosen},
            **{"dtype": arm.dtype, "device": arm.device, "decoder": decoder_of(arm.system)},
        },
        "training": dict(arm.card),
        "folder": arm.folder,
    }


def _length(rows: Sequence[Prediction], cut: Set[str]) -> dict[str, Any]:
    whole = [row for row in rows if row.id not in cut]
    produced, reference = sum(row.tokens for row in whole), sum(row.target_tokens for row in whole)
    ratio = produced / reference if reference else None
    return {
        "produced_tokens": produced,
        "reference_tokens": reference,
        "ratio": ratio,
        "gate": LENGTH_GATE,
        "met": ratio is not None and ratio >= LENGTH_GATE,
    }
