"""What each step from `generate()` to the engine brings for a decoder-only model, all timed in turns on one prompt.

    python -m evaluation.benchmarks.waterfall --shape gpt2 --out evaluation/records/decode/h200-waterfall.json

generate: as it comes. static: with its static compiled cache. graph: the model's own forward over a static cache, in a
CUDA graph that feeds itself. compiled: the same, the forward compiled. engine: this project's. On other devices than
CUDA, steps are launched where graphs would be replayed. The last line is one JSON object.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from evaluation.benchmarks.report import report
from evaluation.decoding.arms import Arms, Batch, Run
from evaluation.decoding.clock import bandwidth
from evaluation.decoding.measure import measure
from evaluation.decoding.shapes import SHAPES, Models
from evaluation.floor import floor_s
from llmslm.generation.graphs import Captured

STEPS = ("generate", "static", "graph", "compiled", "engine")
_SPARE = 8  # places for the tokens that warming up and capturing take


class GraphedForward:
    """A model's own forward as a step that feeds itself: token, position, cache and output stay on the device.

    Args:
        model: decoder-only.
        ids: (batch, length) prompts without padding.
        new: tokens that there is room for.
        compiled: whether the forward of one token is compiled.
    """

    def __init__(self, model: Any, ids: Tensor, new: int, *, compiled: bool) -> None:
        self.model, self.ids = model, ids
        capacity = ids.shape[1] + new + _SPARE
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=capacity)
        self.places = torch.arange(capacity, device=ids.device)
        self.token, self.position = torch.zeros_like(ids[:, :1]), torch.zeros_like(ids[:, :1])
        self.out = torch.zeros(len(ids), capacity + 1, dtype=torch.long, device=ids.device)
        self._forward: Callable[..., Any] = model.forward
        if compiled:
            self._forward = torch.compile(model.forward, mode="max-autotune-no-cudagraphs")
        self._step = Captured(self._next_token, ids.device)
        self._read_prompt()
        if ids.device.type == "cuda":
            self._step.prepare()

    def __call__(self, new: int) -> Tensor:
        """Decode this many tokens: (batch, new)."""
        self._read_prompt()
        for _ in range(new - 1):
            self._step()
        length = self.ids.shape[1]
        return self.out[:, length : length + new].clone()

    @torch.no_grad()
    def _read_prompt(self) -> None:
        self.cache.reset()
        output = self.model(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.position.fill_(self.ids.shape[1])
        self._take(output.logits)

    @torch.no_grad()
    def _next_token(self) -> None:
        mask = (self.places <= self.position)[:, None, None]
        keywords = {"attention_mask": mask, "position_ids": self.position, "past_key_values": self.cache}
        logits = self._forward(self.token, use_cache=True, **keywords).logits
        self.position.add_(1)
        self._take(logits)

    def _take(self, logits: Tensor) -> None:
        self.token.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))
        self.out.scatter_(1, self.position, self.token)


def run_of(step: str, arms: Arms, new: int) -> Run:
    """A function that decodes exactly this many tokens, or as many as it is told, by one of `STEPS`."""
    if step not in ("graph", "compiled"):
        return arms.run("llm", step)
    return GraphedForward(arms.models.model("llm"), arms.batch.ids, new, compiled=step == "compiled")


def main(args: list[str] | None = None) -> None:
    """Measure, print and, where asked, write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens produced, exactly")
    parser.add_argument("--runs", type=int, default=5, help="runs of each step on the clock, after two that are not")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="file for the record")
    options = parser.parse_args(args)
    transformers.logging.set_verbosity_error()
    device = torch.device(options.device)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    models = Models(options.shape, options.shape, device, dtype)
    torch.manual_seed(0)
    ids = torch.randint(3, 1000, (1, options.prompt), device=device)
    arms = Arms(models, Batch(ids, torch.ones_like(ids)))
    runs = {("llm", step): run_of(step, arms, options.new) for step in options.steps}
    times = measure(runs, options.new, 2, options.runs, device)
    speed = bandwidth(device)
    floor = floor_s(arms.engine("llm"), batch=1, prompt=options.prompt, new=options.new, bandwidth=speed)
    rows = [{"step": step, **times["llm", step]} for step in options.steps]
    for row in rows:
        print(f"{row['step']:10} {row['tpot_s']['p50'] * 1e3:8.4f} ms/token, floor {floor * 1e3:.4f}")
    settings = {"shape": options.shape, "prompt": options.prompt, "new": options.new, "runs": options.runs}
    settings |= {"batch": 1, "dtype": dtype, "device": str(device)}
    record = {**settings, "floor_s": floor, "bandwidth_bytes_per_s": speed, "rows": rows}
    report(record, options.out)


if __name__ == "__main__":
    main()
