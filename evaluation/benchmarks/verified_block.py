"""What a block of the verified mode costs, and from which acceptance on it pays.

    python -m evaluation.benchmarks.verified_block --llm llama-24x576 --slm llama-4x256 --out block.json

A block takes the same time whatever is kept of it, so random weights do. The LLM's own step is timed beside it, and the
times faster than the LLM are worked out for drafts of which each token is kept at the same odds, and for the size that
is the best of those captured. Prompts' passes are left out. The last line is one JSON object.
"""

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import torch

from evaluation.benchmarks.report import report
from evaluation.decoding.clock import seconds
from evaluation.decoding.shapes import SHAPES, build
from llmslm.generation.verified import VerifiedEngine
from llmslm.models.alignment import SameTokenizer
from llmslm.models.fusion import Add
from llmslm.models.modeling import LlmToSlm
from llmslm.models.projector import MlpProjector
from llmslm.models.shared_encoder import SharedEncoder

_BLOCKS = 8  # in a row
_ODDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def made(llm: Any, slm: Any) -> VerifiedEngine:
    """A verified pair of two models; the parts between them are random."""
    widths, dtype = (llm.config.hidden_size, slm.config.hidden_size), llm.dtype
    parts = {"projector": MlpProjector(*widths), "alignment": SameTokenizer(*widths), "fusion": Add(*widths)}
    draft = LlmToSlm.compose(SharedEncoder(llm), slm, **parts).to(device=llm.device, dtype=dtype)  # type: ignore[arg-type]
    engine = VerifiedEngine(llm, draft.eval())
    engine.fixed = True
    return engine


def measure(engine: VerifiedEngine, batch: int, prompt: int, new: int, runs: int) -> tuple[float, dict[int, float]]:
    """Seconds of the LLM's own step, and of a block of each size with what the draft reads behind it."""
    device, alone = engine.llm.device, engine.engines[0]
    ids = torch.randint(3, 1000, (batch, prompt), device=device)
    mask = torch.ones_like(ids)

    def llm_alone(count: int) -> None:
        alone.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count)

    def verified() -> None:
        engine.generate(
            prompt_ids=ids,
            prompt_attention_mask=mask,
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            min_new_tokens=new,
        )

    def blocks(size: int) -> None:
        for _ in range(_BLOCKS):
            loop.advance(size)

    for _ in range(2):
        llm_alone(new)
        llm_alone(1)
        verified()
    loop = engine.loops[-1]
    times: dict[int, list[float]] = {size: [] for size in (0, *loop.times)}
    for _ in range(runs):
        times[0].append((seconds(lambda: llm_alone(new), device) - seconds(lambda: llm_alone(1), device)) / (new - 1))
        for size in loop.times:
            times[size].append(seconds(functools.partial(blocks, size), device) / _BLOCKS)
    medians = {size: statistics.median(values) for size, values in times.items()}
    return medians.pop(0), medians


def times_faster(step: float, blocks: dict[int, float], odds: float) -> tuple[float, int]:
    """Times faster than the LLM's own steps at the best size of a block, and that size."""
    return max((step * (1 - odds ** (size + 1)) / (1 - odds) / block, size) for size, block in blocks.items())


def main(args: list[str] | None = None) -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmarks.verified_block", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--llm", choices=SHAPES, default="llama-24x576")
    parser.add_argument("--slm", choices=SHAPES, default="llama-4x256")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="file for the record")
    options = parser.parse_args(args)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    engine = made(*(build(SHAPES[name], device, dtype) for name in (options.llm, options.slm)))
    step, blocks = measure(engine, options.batch, options.prompt, options.new, options.runs)
    print(f"the LLM's step: {1e3 * step:.3f} ms")
    for size, block in blocks.items():
        print(f"a block of {size}: {1e3 * block:.3f} ms, {block / step:.2f} steps")
    faster = {odds: times_faster(step, blocks, odds) for odds in _ODDS}
    for odds, (ratio, size) in faster.items():
        print(f"each token kept at odds of {odds}: {ratio:.2f} times faster, in blocks of {size}")
    record = {name: getattr(options, name) for name in ("llm", "slm", "batch", "prompt", "new", "runs")}
    record |= {"step_s": step, "block_s": blocks, "times_faster": {odds: ratio for odds, (ratio, _) in faster.items()}}
    report(record, options.out)


if __name__ == "__main__":
    main()
