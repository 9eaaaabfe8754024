"""Speed of decoding with random weights: the engine beside `generate()`, and the time that the bytes alone take.

    llmslm-eval decode-speed --shapes gpt2 t5-small --out records/decode/h200.json

Random weights cost what trained ones do, so any shape can be timed without its checkpoint. Every run produces exactly
`--new` tokens. The arms take turns; the device is synchronised around each run. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from llmslm.generation.engine import DecodeEngine
from llmslm.generation.graphs import Captured
from llmslm.provenance import commit

_T5 = {"decoder_start_token_id": 0}
_T5_3B = {"d_model": 1024, "d_kv": 128, "d_ff": 16384, "num_layers": 24, "num_heads": 32, **_T5}
_LLAMA_SMALL = {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1408, "tie_word_embeddings": True}
_LLAMA_1B = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4}

SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config()),
    "t5-small": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "t5-3b": lambda: T5ForConditionalGeneration(T5Config(**_T5_3B)),
    "llama-4x512": lambda: LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, **_LLAMA_SMALL)
    ),
    "llama-22x2048": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=22, num_attention_heads=32, **_LLAMA_1B)),
}
PAIR = "t5-3b-to-t5-small"
ARMS = ("engine", "generate", "static")
_FIRST_ID, _LAST_ID = 3, 1000  # prompts are of ordinary tokens, which every shape's vocabulary has

Run = Callable[[int], Any]
Row = dict[str, Any]


class LlmToSlmShape(nn.Module):
    """What llm_to_slm computes before its SLM decodes, in the shapes of T5-3b and T5-small.

    Args:
        slm: decodes.
    """

    def __init__(self, slm: PreTrainedModel) -> None:
        super().__init__()
        self.encoder, self.slm = T5EncoderModel(T5Config(**_T5_3B)), slm
        hidden = slm.config.d_model
        self.projector = nn.Sequential(nn.Linear(1024, hidden), nn.ReLU(), nn.Linear(hidden, hidden))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States (batch, length, width) that the SLM's decoder reads."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        embeds = self.slm.get_input_embeddings()(ids) + self.projector(states)
        encoded: Tensor = self.slm.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return encoded


def build(factory: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """A model with random weights, made in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return factory().eval()
    finally:
        torch.set_default_dtype(before)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy: the median of 10."""
    size = 2**31 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [_seconds(lambda: target.copy_(source), device) for _ in range(11)]
    return 2 * size / statistics.median(seconds[1:])


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def _by_generate(model: PreTrainedModel, inputs: dict[str, Tensor], **kwargs: Any) -> Run:
    return lambda new: model.generate(**inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new, **kwargs)


def runs_of_shape(
    name: str, arms: list[str], inputs: dict[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Run], DecodeEngine]:
    """Arms of one model by name, and its engine."""
    model = build(SHAPES[name], inputs["input_ids"].device, dtype)
    engine = DecodeEngine(model)
    every: dict[str, Run] = {
        "engine": lambda new: engine.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=new,
            min_new_tokens=new,
        ),
        "generate": _by_generate(model, inputs),
        "static": _by_generate(model, inputs, cache_implementation="static"),
    }
    return {arm: every[arm] for arm in arms}, engine


def runs_of_pair(arms: list[str], inputs: dict[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Run], DecodeEngine]:
    """Arms of llm_to_slm; by generate() the front runs as it comes too."""
    device = inputs["input_ids"].device
    front = build(lambda: LlmToSlmShape(SHAPES["t5-small"]()), device, dtype)
    engine, captured = DecodeEngine(front.slm), Captured(front, device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def by_engine(new: int) -> Tensor:
        states = captured(ids, mask)
        return engine.generate(encoder_outputs=states, attention_mask=mask, max_new_tokens=new, min_new_tokens=new)

    @torch.no_grad()
    def by_generate(new: int, **kwargs: Any) -> Any:
        states = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=front(ids, mask))
        kwargs |= {"attention_mask": mask, "max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return front.slm.generate(encoder_outputs=states, **kwargs)

    every: dict[str, Run] = {
        "engine": by_engine,
        "generate": by_generate,
        "static": lambda new: by_generate(new, cache_implementation="static"),
    }
    return {arm: every[arm] for arm in arms}, engine


def measure(runs: dict[str, Run], new: int, warmups: int, repeats: int, device: torch.device) -> dict[str, Row]:
    """Time a first token and all tokens, arms interleaved; seconds, by arm."""
    for run in runs.values():
        for _ in range(warmups):
            run(new)
        run(1)
    first: dict[str, list[float]] = {arm: [] for arm in runs}
    total: dict[str, list[float]] = {arm: [] for arm in runs}
    for _ in range(repeats):
        for arm, run in runs.items():
            first[arm].append(_seconds(lambda run=run: run(1), device))  # type: ignore[misc]
            total[arm].append(_seconds(lambda run=run: run(new), device))  # type: ignore[misc]
    rows = {}
    for arm in runs:
        ttft_s, total_s = statistics.median(first[arm]), statistics.median(total[arm])
        rows[arm] = {
            "ttft_s": ttft_s,
            "total_s": total_s,
            "total_p90_s": statistics.quantiles(total[arm], n=10)[-1] if repeats > 1 else total_s,
            "tpot_s": (total_s - ttft_s) / (new - 1),
        }
    return rows


def floor_s(engine: DecodeEngine, batch: int, prompt: int, new: int, bandwidth: float) -> float:
    """Seconds that reading the weights and the filled caches takes, on average over the tokens."""
    decoder = engine.decoder
    if decoder is None:
        return float("nan")
    size = decoder.embedding.element_size()
    crossed = bool(decoder.crosses)
    filled = new // 2 + (0 if crossed else prompt)
    read = decoder.decoding_bytes() + decoder.shape.bytes(batch, filled, prompt if crossed else 0, size)
    return read / bandwidth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this command."""
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, PAIR], default=["gpt2", "t5-small", "llama-4x512"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="rows decoded at a time")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens produced, exactly; at least 2")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warmups", type=int, default=10, help="runs of each arm before the clock starts")
    parser.add_argument("--runs", type=int, default=10, help="runs of each arm on the clock")
    parser.add_argument("--commit", help="commit of the code, where it lies outside a git checkout")
    parser.add_argument("--out", type=Path, help="file for the record")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table and the JSON line, and write the record if asked."""
    transformers.logging.set_verbosity_error()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    bandwidth = copy_bandwidth(device)
    record = _provenance(arguments, device, bandwidth)
    print(f"{record['hardware']}, copy bandwidth {bandwidth / 1e12:.2f} TB/s, {arguments.dtype}")
    print(f"{'shape':18} {'batch':>5} {'arm':9} {'ttft ms':>8} {'ms/token':>9} {'floor':>7} {'x':>6} {'tokens/s':>9}")
    for shape in arguments.shapes:
        for batch in arguments.batch:
            record["rows"] += _rows(shape, batch, arguments, device, dtype, bandwidth)
            if arguments.out is not None:  # after each row: a run that is cut short leaves what it measured
                _write(arguments.out, record)
    print(json.dumps(record))


def _rows(
    shape: str, batch: int, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype, bandwidth: float
) -> list[Row]:
    torch.manual_seed(0)
    ids = torch.randint(_FIRST_ID, _LAST_ID, (batch, arguments.prompt), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape == PAIR:
        runs, engine = runs_of_pair(arguments.arms, inputs, dtype)
    else:
        runs, engine = runs_of_shape(shape, arguments.arms, inputs, dtype)
    floor = floor_s(engine, batch, arguments.prompt, arguments.new, bandwidth)
    rows = []
    for arm, times in measure(runs, arguments.new, arguments.warmups, arguments.runs, device).items():
        speed = batch * arguments.new / times["total_s"]
        row = {"shape": shape, "batch": batch, "arm": arm, **times, "floor_s": floor, "tokens_per_s": speed}
        rows.append({**row, "fallback": engine.reason if arm == "engine" else None})
        print(
            f"{shape:18} {batch:5} {arm:9} {times['ttft_s'] * 1e3:8.2f} {times['tpot_s'] * 1e3:9.4f} "
            f"{floor * 1e3:7.3f} {times['tpot_s'] / floor:6.1f} {speed:9.0f}",
            flush=True,
        )
    return rows


def _provenance(arguments: argparse.Namespace, device: torch.device, bandwidth: float) -> Row:
    here, changed = commit()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    cuda = device.type == "cuda"
    return {
        "command": _command(arguments),
        "commit": arguments.commit or here,
        "uncommitted_changes": changed,
        "hardware": torch.cuda.get_device_name(device) if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {**versions, "python": platform.python_version()},
        "settings": {key: getattr(arguments, key) for key in ("prompt", "new", "dtype", "warmups", "runs")},
        "bandwidth_bytes_per_s": bandwidth,
        "rows": [],
    }


def _command(arguments: argparse.Namespace) -> str:
    """The call that measures the same again, wherever it is written to."""
    words = ["llmslm-eval", "decode-speed"]
    for key in ("shapes", "arms", "batch", "prompt", "new", "dtype", "warmups", "runs"):
        value = getattr(arguments, key)
        words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def _write(path: Path, record: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(path)


def main(args: list[str] | None = None) -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(prog="decode-speed", description=__doc__)
    add_arguments(parser)
    run(parser.parse_args(args))


if __name__ == "__main__":
    main()
