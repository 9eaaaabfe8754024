"""How training of llm_to_slm scales over the GPUs of one machine, with `llmslm plan`'s predictions beside it.

    python -m evaluation.benchmarks.scaling --compile --encoder 1b --weak 32 2 --strong 128 --worlds 1 2 --out 1b.json
    python -m evaluation.benchmarks.scaling --compile --encoder 7b --weak 32 2 --strong 128 --out 7b.json

For each world (1, 2, 4, 8 GPUs, as many as there are; processes on a CPU) torchrun starts the ranks, which train random
weights with the Trainer: the encoder sharded (FSDP2), replicated beside a sharded slm, and unsharded (DDP), each with a
fixed batch a GPU (weak scaling) and a fixed global batch (strong). Eager, and of few rows, a step takes as long as the
host takes to give it out: compile, and let the strong batch be one that fills a GPU. A sharded checkpoint is saved and
loaded, and the evaluation predicts the same examples on all ranks. Rows are full, of random tokens. The last line is
one JSON object.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from evaluation.benchmarks.report import mistakes_in_one_line
from evaluation.benchmarks.scaling_rank import PLACEMENTS, Case, Orders, job_of, read_lines
from llmslm.errors import UserError
from llmslm.planning.costs import DEVICES
from llmslm.planning.job import World
from llmslm.planning.predict import predict
from llmslm.provenance import provenance
from llmslm.writing import write_text

Row = dict[str, Any]
Key = tuple[int, str, int]
"""Of a training: GPUs, placement, rows a GPU."""

VOCABULARY = 16384
_LLAMA = {"model_type": "llama", "vocab_size": VOCABULARY, "tie_word_embeddings": True}
_SLM = {"num_hidden_layers": 26, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
_1B = {"num_hidden_layers": 22, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}
_7B = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
_TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA | _TINY | {"vocab_size": 512},
    "350m": _LLAMA | _SLM | {"num_key_value_heads": 16},
    "1b": _LLAMA | _1B | {"num_key_value_heads": 4},
    "7b": _LLAMA | _7B | {"num_key_value_heads": 32},
}
"""Models by name, as configs of transformers."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""What torchrun sets for several ranks; one has the same."""
KIND = "h200"
"""The GPU that predictions are for."""


def worlds_here() -> list[int]:
    """Return the worlds that this machine has: powers of two up to its GPUs; without any, two processes on the CPU."""
    most = torch.cuda.device_count() or 2
    return [2**n for n in range(4) if 2**n <= most]


def cases_of(world: int, weak: Sequence[int], strong: int) -> list[Case]:
    """List what a world trains, each batch once: a strong batch may be a weak one.

    Args:
        world: GPUs.
        weak: rows a GPU.
        strong: rows of all GPUs together.

    Raises:
        UserError: if the strong batch cannot be divided among the GPUs.
    """
    if strong % world:
        raise UserError(f"--strong is {strong}, which {world} GPUs cannot share equally; give a multiple of {world}")
    sizes = dict.fromkeys([*weak, strong // world])
    return [Case(placement, rows) for placement in PLACEMENTS for rows in sizes]


def run_world(orders: Orders, limit_s: float) -> tuple[list[Row], str | None]:
    """Run one world under torchrun.

    Args:
        orders: what its ranks do.
        limit_s: seconds after which they are stopped.

    Returns:
        What was measured, as far as it came; and why it ended early, with the end of its output, if it did.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "orders.json", json.dumps(asdict(orders)))
        # A name that does not resolve would keep the ranks from finding each other: they are on this machine.
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        start += [f"--nproc-per-node={orders.world}", "-m", "evaluation.benchmarks.scaling_rank", name]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(start, stdout=log, stderr=subprocess.STDOUT, env=os.environ | ONE_THREAD)
            try:
                failure = _wait(process, limit_s)
            finally:
                _stop(process)
        if failure:
            failure += "\n" + last_words((folder / "log").read_text(encoding="utf-8", errors="replace"))
        return read_lines(folder), failure


def last_words(log: str) -> str:
    """Return the last lines that the ranks wrote, without what torchrun says about it."""
    own = itertools.takewhile(lambda line: "torch/distributed/elastic/" not in line, log.splitlines())
    return "\n".join([line for line in own if line.strip()][-30:])


def predicted(orders: Orders, case: Case) -> Row:
    """Return `llmslm plan`'s prediction of a case: bytes of a GPU at the peak, seconds of a step."""
    shard = 1 if case.placement == "unsharded" else orders.world
    found = predict(job_of(orders, case), World(DEVICES[KIND], orders.world, 8, shard))
    times = {"step_s": found["seconds"]["step"], "step_at_best_s": found["seconds"]["step_at_best"]}
    return {"peak_memory_bytes": found["memory_bytes"]["peak"], **times, "limit": found["limit"]}


def beside(row: Row, prediction: Row) -> Row:
    """Put a prediction beside what was measured, with their ratios (None where memory was not measured)."""
    peak = row["peak_memory_bytes"]
    ratios = {"peak_memory": prediction["peak_memory_bytes"] / peak if peak else None}
    ratios |= {name: prediction[f"{name}_s"] / row["step_s"] for name in ("step", "step_at_best")}
    return {"predicted": prediction, "predicted_over_measured": ratios}


def summary(rows: Sequence[Row], weak: Sequence[int], strong: int) -> Row:
    """Compare the worlds.

    Efficiency is the tokens per second of a GPU over those of one GPU alone: weak with the same rows a GPU, strong with
    the same rows in all. It is given over one GPU with the same placement, and over one that is unsharded.

    Args:
        rows: what was measured, of all worlds.
        weak: rows a GPU, of fixed batches.
        strong: rows of the fixed global batch.

    Returns:
        training, memory (a GPU's peak with sharding over that without) and evaluation, in plain rows.
    """
    found = {(row["gpus"], row["placement"], row["rows"]): row for row in rows if "placement" in row}
    evaluated = {row["gpus"]: row["examples_per_s"] for row in rows if "examples_per_s" in row}
    return {
        "training": [*_efficiencies(found, weak), *_efficiencies(found, [], strong)],
        "memory": list(_memory(found)),
        "evaluation": [{"gpus": gpus, "speedup": _over(speed, evaluated.get(1))} for gpus, speed in evaluated.items()],
    }


def _efficiencies(found: dict[Key, Row], weak: Sequence[int], strong: int = 0) -> Iterator[Row]:
    for (gpus, placement, rows), row in found.items():
        if rows in weak or rows * gpus == strong:
            shares = {}
            for name, alone in (("efficiency", placement), ("efficiency_over_unsharded", "unsharded")):
                base = found.get((1, alone, strong or rows))
                shares[name] = _over(row["tokens_per_s"] / gpus, base["tokens_per_s"] if base else None)
            scaling = "strong" if strong else "weak"
            yield {"scaling": scaling, "gpus": gpus, "placement": placement, "rows": rows, **shares}


def _over(value: float, base: float | None) -> float | None:
    return value / base if base else None


def _memory(found: dict[Key, Row]) -> Iterator[Row]:
    for (gpus, placement, rows), row in found.items():
        whole = found.get((gpus, "unsharded", rows), {}).get("peak_memory_bytes")
        if placement != "unsharded" and whole:
            ratio = row["peak_memory_bytes"] / whole
            yield {"gpus": gpus, "rows": rows, "placement": placement, "over_unsharded": ratio}


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> str | None:
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s (--limit)"
    return f"torchrun ended with status {code}" if code else None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End torchrun by the signal on which it ends its ranks, which have sessions of their own."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=SHAPES, required=True, help="shape of the frozen LLM, in bfloat16 on GPUs")
    parser.add_argument("--slm", choices=SHAPES, default="350m", help="shape of what is trained (default: 350m)")
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=worlds_here(), help="GPUs (default: all that are here)"
    )
    parser.add_argument(
        "--weak", type=int, nargs="+", required=True, metavar="ROWS", help="rows a GPU, of fixed batches"
    )
    parser.add_argument("--strong", type=int, required=True, metavar="ROWS", help="rows of the fixed global batch")
    parser.add_argument("--prompt-tokens", type=int, default=384, help="of a row (default: 384)")
    parser.add_argument("--target-tokens", type=int, default=128, help="of a row (default: 128)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps on the clock (default: 8), after 3")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--examples", type=int, default=1024, help="that are evaluated, 32 a batch (default: 1024)")
    parser.add_argument("--limit", type=float, default=480, help="seconds for a world (default: 480)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the record; written after each world")
    return parser


def main(args: list[str] | None = None) -> None:
    """Measure from the command line; the exit status is the number of worlds that failed.

    Raises:
        UserError: if a batch cannot be divided among the GPUs.
    """
    given = sys.argv[1:] if args is None else args
    options = _parser().parse_args(given)
    keys = ("prompt_tokens", "target_tokens", "steps", "compile", "examples")
    settings: dict[str, Any] = {key: getattr(options, key) for key in keys}
    settings |= {"encoder": SHAPES[options.encoder], "slm": SHAPES[options.slm], "gpu": torch.cuda.is_available()}
    worlds = [Orders(n, cases_of(n, options.weak, options.strong), **settings) for n in sorted(options.worlds)]
    record: Row = {"command": shlex.join(["python", "-m", "evaluation.benchmarks.scaling", *given])}
    record |= settings | {"weak": options.weak, "strong": options.strong, "rows": [], "failures": {}}
    with _predicting(worlds) as predictions:
        for orders in worlds:
            begin = time.monotonic()
            rows, failure = run_world(orders, options.limit)
            sys.stderr.write(f"{orders.world} GPUs or processes: {time.monotonic() - begin:.0f} s\n{failure or ''}\n")
            record["rows"] += rows
            record["failures"] |= {str(orders.world): failure} if failure else {}
            record |= {"summary": summary(record["rows"], options.weak, options.strong), "provenance": provenance()}
            write_text(options.out, json.dumps(record, indent=1) + "\n")
        record["failures"] |= foretell(record["rows"], predictions)
    write_text(options.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    sys.exit(len(record["failures"]))


def foretell(rows: Sequence[Row], predictions: Mapping[Key, Future[Row]]) -> dict[str, str]:
    """Put predictions into the rows of trainings; return the errors of those that failed, by case."""
    failures = {}
    for row in rows:
        if "placement" in row:
            key = row["gpus"], row["placement"], row["rows"]
            try:
                row |= beside(row, predictions[key].result())
            except Exception as error:  # what was measured stands without it
                failures[f"prediction {key}"] = repr(error)
    return failures


@contextmanager
def _predicting(worlds: Sequence[Orders]) -> Iterator[dict[Key, Future[Row]]]:
    """Predict all cases in processes beside the measurement: a large shape takes seconds."""
    workers = max(1, min(16, len(os.sched_getaffinity(0)) // 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield {
            (orders.world, case.placement, case.rows): pool.submit(predicted, orders, case)
            for orders in worlds
            for case in orders.cases
        }


if __name__ == "__main__":
    with mistakes_in_one_line():
        main()
