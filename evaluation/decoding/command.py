"""Speed of decoding: the engine beside what else there is, and the time that the bytes alone take.

    llmslm-eval speed --llm t5-large --slm t5-small --device cpu --dtype float32 --arms engine generate ctranslate2

Random weights cost what trained ones do, so any shape can be timed without its checkpoint. Every run produces exactly
`--new` tokens. The arms of all systems take turns; the device is synchronised around each run. The last line is one
JSON object.
"""

import argparse
import itertools
import json
import platform
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from evaluation.arms import check_device
from evaluation.decoding.arms import ARMS, Arms, Batch, Run
from evaluation.decoding.clock import bandwidth
from evaluation.decoding.measure import Row, measure, memory
from evaluation.decoding.ratios import plot_break_even, ratios
from evaluation.decoding.shapes import SHAPES, SYSTEMS, Models
from evaluation.floor import floor_s
from llmslm.errors import UserError
from llmslm.provenance import commit, hardware, hardware_name
from llmslm.writing import write_text

_FIRST_ID, _LAST_ID = 3, 1000  # prompts are of ordinary tokens, which every shape's vocabulary has
_SWEPT = ("batch", "prompt", "new")
_KEYS = ("systems", "llm", "slm", "arms", *_SWEPT, "dtype", "warmups", "runs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--llm", choices=SHAPES, default="t5-large", help="shape of the llm")
    parser.add_argument("--slm", choices=SHAPES, default="t5-small", help="shape of the slm")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["engine", "generate", "static"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="rows decoded at a time")
    parser.add_argument("--prompt", nargs="+", type=int, default=[128], help="tokens of each prompt")
    parser.add_argument("--new", nargs="+", type=int, default=[128], help="tokens produced, exactly; at least 2")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "int8"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warmups", type=int, default=10, help="runs of each arm before the clock starts")
    parser.add_argument("--runs", type=int, default=10, help="runs of each arm on the clock")
    parser.add_argument("--commit", help="commit of the code, where it lies outside a git checkout")
    parser.add_argument("--out", type=Path, help="file for the record")
    parser.add_argument("--plot", type=Path, help="file for the break-even curve (.svg or .png)")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table and the JSON line, and write the record and the plot if asked.

    Raises:
        UserError: if the arguments do not go together.
    """
    _check(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device(arguments.device)
    record = _provenance(arguments, device)
    print(f"{record['hardware']}, {record['bandwidth_bytes_per_s'] / 1e9:.0f} GB/s, {arguments.dtype}")
    print(
        f"{'system':10} {'shape':20} {'batch':>5} {'prompt':>6} {'new':>5} {'arm':13} "
        f"{'ttft ms':>8} {'ms/token':>9} {'floor':>8} {'x':>6} {'p90/p50':>7} {'tokens/s':>9}"
    )
    models = Models(arguments.llm, arguments.slm, device, arguments.dtype)
    for setting in itertools.product(*(getattr(arguments, key) for key in _SWEPT)):
        rows = list(_rows(models, dict(zip(_SWEPT, setting, strict=True)), arguments, record["bandwidth_bytes_per_s"]))
        record["rows"] += rows
        record["ratios"] = ratios(record["rows"])
        for row in rows:
            print(_line(row), flush=True)
        if arguments.out is not None:  # after each setting: a run that is cut short leaves what it measured
            write_text(arguments.out, json.dumps(record, indent=1) + "\n")
    for ratio in record["ratios"]:
        place = " ".join(f"{key} {ratio[key]}" for key in _SWEPT)
        print(f"{ratio['ratio']:30} {place}: {ratio['total']:.2f}x end to end, {ratio['ttft']:.2f}x to the first token")
    if arguments.plot is not None:
        plot_break_even(record["rows"], arguments.plot)
    print(json.dumps(record))


def _check(arguments: argparse.Namespace) -> None:
    if min(arguments.new) < 2:
        raise UserError(f"--new {min(arguments.new)} was given; the time of further tokens needs at least 2")
    if arguments.dtype == "int8" and arguments.device != "cpu":
        raise UserError(f"--dtype int8 was given with --device {arguments.device}; 8-bit weights are for the CPU")
    check_device(arguments.device)


def _rows(models: Models, setting: dict[str, int], arguments: argparse.Namespace, bytes_per_s: float) -> Iterator[Row]:
    """Measure all systems and arms at one batch size, prompt length and output length."""
    torch.manual_seed(0)
    ids = torch.randint(_FIRST_ID, _LAST_ID, (setting["batch"], setting["prompt"]), device=models.device)
    arms = Arms(models, Batch(ids, torch.ones_like(ids)))
    keys = list(itertools.product(arguments.systems, arguments.arms))
    reasons = {key: arms.reason_against(*key) for key in keys}
    peaks = {name: memory(arms, name, setting["new"]) for name in arguments.systems if "engine" in arguments.arms}
    runs: dict[tuple[str, str], Run] = {key: arms.run(*key) for key in keys if reasons[key] is None}
    times = measure(runs, setting["new"], arguments.warmups, arguments.runs, models.device)
    nothing = dict.fromkeys(("ttft_s", "tpot_s", "total_s"))
    for system, arm in keys:
        row: Row = {"system": system, "shape": models.names[system], **setting, "arm": arm}
        row |= times.get((system, arm), nothing)
        row["floor_s"] = floor_s(arms.engine(system), **setting, bandwidth=bytes_per_s)
        row["tokens_per_s"] = row["total_s"] and setting["batch"] * setting["new"] / row["total_s"]["p50"]
        row["not_timed"] = reasons[system, arm]
        if arm == "engine":
            row |= {"fallback": arms.engine(system).reason, "memory": peaks[system]}
        yield row


def _line(row: Row) -> str:
    start = f"{row['system']:10} {row['shape']:20} {row['batch']:5} {row['prompt']:6} {row['new']:5} {row['arm']:13} "
    if row["total_s"] is None:
        return f"{start}{row['not_timed']}"
    tpot, total = row["tpot_s"]["p50"], row["total_s"]
    line = (
        f"{start}{row['ttft_s']['p50'] * 1e3:8.2f} {tpot * 1e3:9.4f} {row['floor_s'] * 1e3:8.3f} "
        f"{tpot / row['floor_s']:6.1f} {total['p90'] / total['p50']:7.2f} {row['tokens_per_s']:9.0f}"
    )
    peak = row.get("memory")
    if not peak:
        return line
    predicted, measured = (peak[key] / 2**20 for key in ("predicted_bytes", "measured_bytes"))
    return f"{line}  memory {predicted:.0f} MiB predicted, {measured:.0f} measured"


def _provenance(arguments: argparse.Namespace, device: torch.device) -> Row:
    here, changed = commit()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    cuda = device.type == "cuda"
    return {
        "command": _command(arguments),
        "commit": arguments.commit or here,
        "uncommitted_changes": changed,
        "hardware": torch.cuda.get_device_name(device) if cuda else hardware_name(hardware()),
        "threads": None if cuda else torch.get_num_threads(),
        "versions": {**versions, "python": platform.python_version()},
        "settings": {key: getattr(arguments, key) for key in ("dtype", "warmups", "runs")},
        "bandwidth_bytes_per_s": bandwidth(device),
        "rows": [],
        "ratios": [],
    }


def _command(arguments: argparse.Namespace) -> str:
    """The call that measures the same again, wherever it is written to."""
    words = ["llmslm-eval", "speed"]
    for key in _KEYS:
        value: Any = getattr(arguments, key)
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join([*words, "--device", str(arguments.device)])


def main(args: list[str] | None = None) -> None:
    """Measure from the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="llmslm-eval speed", description=__doc__, formatter_class=raw)
    add_arguments(parser)
    run(parser.parse_args(args))
