"""Whether the engine's memory grows: thousands of prompts of mixed lengths, and what the process holds in between.

    python -m evaluation.benchmarks.memory_growth --shape llama-4x512 --prompts 1000 --out growth.json

Prompts come in batches of mixed length, each decoded to a length of its own, as a server would see them. The first
`--warmup` prompts come before the first reading. A reading follows after the engine gave up the caches it keeps, whose
size is that of the last calls: on the CPU the resident set, once freed heap was handed back, on CUDA the allocator's
live bytes. Growth is the median of the later half of the readings over that of the earlier half. The last line is one
JSON object.
"""

import argparse
import ctypes
import gc
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from evaluation.benchmarks.report import report
from evaluation.decoding.shapes import SHAPES, build
from evaluation.memory import resident_bytes
from llmslm.generation.engine import DecodeEngine

_FIRST_ID, _LAST_ID = 3, 1000  # ordinary tokens, which every shape's vocabulary has
_SAMPLES = 20  # readings after the warm-up


def held_bytes(engine: DecodeEngine) -> int:
    """What is held without the engine's caches: live in CUDA's allocator, or resident once freed heap is back."""
    engine.forget()
    gc.collect()
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
        return torch.cuda.memory_allocated(engine.device)
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def measure(engine: DecodeEngine, prompts: int, warmup: int, batch: int, seed: int = 0) -> list[dict[str, int]]:
    """Decode `warmup` prompts, then `prompts` more; the bytes held after the warm-up and at twenty points since.

    Args:
        engine: decodes.
        prompts: number of prompts that are counted.
        warmup: number of prompts before them.
        batch: prompts decoded together.
        seed: of prompts and lengths.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    readings, next_reading = [], warmup
    with tqdm(total=warmup + prompts, unit=" prompts", desc="decoding") as progress:
        for done in range(0, warmup + prompts, batch):
            if done >= next_reading:
                readings.append({"prompts": done - warmup, "bytes": held_bytes(engine)})
                next_reading += max(prompts // _SAMPLES, batch)
            ids = torch.randint(_FIRST_ID, _LAST_ID, (batch, rng.randint(4, 192)), generator=generator)
            new = rng.randint(2, 48)
            engine.generate(input_ids=ids.to(engine.device), max_new_tokens=new, min_new_tokens=new)
            progress.update(batch)
    return [*readings, {"prompts": prompts, "bytes": held_bytes(engine)}]


def main(args: list[str] | None = None) -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmarks.memory_growth", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--shape", choices=SHAPES, default="llama-4x512")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="file for the record")
    options = parser.parse_args(args)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    engine = DecodeEngine(build(SHAPES[options.shape], device, dtype))
    readings = measure(engine, options.prompts, options.warmup, options.batch)
    held = [reading["bytes"] for reading in readings]
    growth = statistics.median(held[len(held) // 2 :]) - statistics.median(held[: len(held) // 2])
    record: dict[str, Any] = {
        "shape": options.shape,
        "prompts": options.prompts,
        "warmup": options.warmup,
        "batch": options.batch,
        "growth_mib": growth / 2**20,
        "readings": readings,
    }
    print(f"{options.shape}: {growth / 2**20:+.2f} MiB over {options.prompts} prompts")
    report(record, options.out)


if __name__ == "__main__":
    main()
