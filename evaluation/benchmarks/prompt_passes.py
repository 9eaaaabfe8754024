"""What a layer of a prompt's pass takes, by the kernels of short prompts and by those around cuBLAS's products.

    python -m evaluation.benchmarks.prompt_passes --out prompt-passes.json

Passes over one prompt of each length, embeddings to logits, each a CUDA graph, in microseconds a layer; what the logits
are off from the model's own stands beside. By these figures `fused_rows.PROMPT_ROWS` and its like are to be set. The
last line is one JSON object.
"""

import argparse
import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from evaluation.benchmarks.report import report
from evaluation.benchmarks.row_products import Clock, changed, graph_microseconds, table
from evaluation.decoding.shapes import SHAPES, build
from llmslm.generation.families import read

MODELS = ("llama-24x576", "llama-4x512", "gpt2")
LENGTHS = (32, 64, 96, 128, 192, 256)
SHORT, LONG = "short", "cublas"


@contextlib.contextmanager
def by_kernels_of(kind: str) -> Iterator[None]:
    """Let all prompts go through one kind of kernels for a while."""
    from llmslm.generation import fused_rows

    with contextlib.ExitStack() as stack:
        if kind == LONG:
            stack.enter_context(fused_rows.left_out())
        for limit in ("PROMPT_ROWS", "_CENTRED_PROMPT_ROWS"):
            stack.enter_context(changed(fused_rows, limit, value=max(LENGTHS)))
        yield


@torch.no_grad()
def measure(name: str, lengths: Sequence[int], device: torch.device, clock: Clock) -> list[dict[str, Any]]:
    """Microseconds a layer of a model's passes, and what they are off."""
    from llmslm.generation.fused_prefill import FusedDecoder, Prompts, columns

    model = build(SHAPES[name], device, torch.bfloat16 if device.type == "cuda" else torch.float16)
    decoder = read(model, max(lengths))
    run, shape, layers = FusedDecoder(decoder), decoder.shape, len(decoder.sublayers) // 2
    found = []
    for length in lengths:
        ids = torch.randint(shape.vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
        prompts = Prompts(torch.ones_like(ids), columns(1, length, device))
        cache = decoder.embedding.new_empty(shape.layers, 2, 1, shape.kv_heads, length, shape.head_dim)
        work = functools.partial(run.last_logits, ids, prompts, cache)
        own = model(input_ids=ids).logits[:, -1].double()
        for kind in (SHORT, LONG):
            with by_kernels_of(kind):
                off = float((work().double() - own).norm() / own.norm())
                found.append({"model": name, "kernels": kind, "length": length, "us": clock(work) / layers, "off": off})
    return found


def main(args: list[str] | None = None) -> None:
    """Measure, print a table a model, and write the record."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmarks.prompt_passes", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--lengths", nargs="+", type=int, choices=LENGTHS, default=LENGTHS)
    parser.add_argument("--out", type=Path, help="file for the record")
    options = parser.parse_args(args)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    found = []
    for name in options.models:
        found += measure(name, options.lengths, torch.device("cuda"), graph_microseconds)
        print(
            *table([row for row in found if row["model"] == name], ("model", "kernels"), "length"), sep="\n", flush=True
        )
    report({"passes": found, "lengths": list(options.lengths)}, options.out)


if __name__ == "__main__":
    main()
