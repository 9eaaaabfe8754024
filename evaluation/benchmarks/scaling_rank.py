"""One rank of `evaluation.benchmarks.scaling`: it trains, saves, loads and evaluates as `orders.json` in a folder says.

    torchrun --nproc-per-node 2 -m evaluation.benchmarks.scaling_rank FOLDER

Rank 0 appends a JSON line to `rows.jsonl` there for each thing that was measured.
"""

import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from datasets import Dataset
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor
from torch._dynamo.utils import counters
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from evaluation.examples import Examples
from evaluation.predictions import predict
from evaluation.ranks import PATIENCE, Ranks, join_ranks, leave_ranks
from llmslm.checkpoint import codec_for
from llmslm.data.codec import IGNORED, Codec, TextFormat
from llmslm.data.tokenizer import TrainedBpe
from llmslm.models.blocks import compile_blocks
from llmslm.models.language_model import ModelSource
from llmslm.module import SystemModule
from llmslm.parallel import Fsdp
from llmslm.planning.job import Job
from llmslm.planning.rows import batch
from llmslm.planning.step import build
from llmslm.system import System

Placement = Literal["sharded", "replicated", "unsharded"]
Row = dict[str, Any]

PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
"""Of the encoder: divided with the slm, whole beside a divided slm, whole beside a whole slm (DDP; one GPU: alone)."""
WARMUPS = 3
"""Steps before the clock starts."""
BATCH = 32
"""Examples of a batch of the evaluation."""
NEW_TOKENS = 64
"""Tokens that the evaluation produces at most."""
_PART = 2**26
"""Numbers that ranks sum: 256 MiB."""
_WORDS = ("alpha", "beta", "gamma", "delta", "omega", "sigma")


@dataclass(frozen=True)
class Case:
    """A training: where the encoder's weights lie, and the rows of a GPU and step."""

    placement: Placement
    rows: int


@dataclass(frozen=True)
class Orders:
    """What the ranks of a world do."""

    world: int
    cases: list[Case]
    encoder: dict[str, Any]
    """A config of transformers."""
    slm: dict[str, Any]
    prompt_tokens: int
    target_tokens: int
    steps: int
    compile: bool
    examples: int
    """That are evaluated."""
    gpu: bool
    """Whether ranks have a GPU each, with bf16-mixed; they are processes on a CPU, in float32, otherwise."""

    @classmethod
    def read(cls, folder: Path) -> "Orders":
        """Read what `evaluation.benchmarks.scaling` wrote."""
        values = json.loads((folder / "orders.json").read_text(encoding="utf-8"))
        return cls(**values | {"cases": [Case(**case) for case in values["cases"]]})

    @property
    def precision(self) -> Literal["bf16-mixed", "32-true"]:
        """The Trainer's precision."""
        return "bf16-mixed" if self.gpu else "32-true"


def job_of(orders: Orders, case: Case) -> Job:
    """Describe a case as `llmslm plan` reads recipes."""
    sharding = {"class_path": "llmslm.parallel.Fsdp", "init_args": {"encoder": case.placement}}
    model = {
        "llm": {"config": orders.encoder},
        "slm": {"config": orders.slm},
        "encoder": {"dtype": "bfloat16" if orders.gpu else "float32"},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"fused": orders.gpu}},
        "compile": orders.compile,
    }
    limits = {"max_prompt_tokens": orders.prompt_tokens, "max_target_tokens": orders.target_tokens}
    strategy = "ddp" if case.placement == "unsharded" else sharding
    trainer = {"precision": orders.precision, "devices": orders.world, "strategy": strategy}
    job = Job.of({"model": model, "data": {"micro_batch_size": case.rows, **limits}, "trainer": trainer})
    return replace(job, masked=False)  # rows are full


def read_lines(folder: Path) -> list[Row]:
    """Read what rank 0 has measured so far."""
    path = folder / "rows.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class RandomSystem(SystemModule):
    """llm_to_slm with random weights, made on the device.

    Args:
        job: what it is.
        orders: of the world.
    """

    def __init__(self, job: Job, orders: Orders) -> None:
        super().__init__(
            ModelSource(config=orders.encoder),
            ModelSource(config=orders.slm),
            optimizer=partial(AdamW, lr=1e-5, fused=orders.gpu),
            schedule="constant",
            warmup_steps=0,
            compile=orders.compile,
        )
        self.job = job

    def make_codec(self, datamodule: Any) -> Codec:
        """Build system and codec, the same on every rank."""
        if self.codec is None:
            torch.manual_seed(0)
            with self.trainer.strategy.root_device:
                self.model = build(self.job)
            self.codec = make_codec(self.model, self.job)
        return self.codec

    def on_fit_start(self) -> None:
        """Compile blocks for the one shape that each sees: those of encoder and slm may be of one class."""
        super().on_fit_start()
        if self.compile_blocks:
            compile_blocks(self._built, fixed_shapes=True)

    def on_train_end(self) -> None:
        """Drop the weights, which some strategies would bring to the host now."""
        self.trainer.strategy.optimizers = []
        self.model = None

    def on_fit_end(self) -> None:
        """Leave the model as it is: there is none."""


class FullRows(LightningDataModule):
    """Batches of full rows of random tokens, other ones on each rank.

    Args:
        job: how many, and how long.
        steps: batches.
    """

    packs = False

    def __init__(self, job: Job, steps: int) -> None:
        super().__init__()
        self.job, self.steps = job, steps

    def train_dataloader(self) -> DataLoader:
        """Return a batch a step."""
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        tensors = training_batch(module.model, self.job, seed=module.global_rank)
        batches: Any = [tensors] * self.steps
        return DataLoader(batches, batch_size=None, pin_memory=module.device.type == "cuda")


def training_batch(model: PreTrainedModel, job: Job, seed: int) -> dict[str, Tensor]:
    """Make a batch of full rows of random tokens on the CPU, as `SystemModule.training_step` takes it."""
    tensors = batch(model, job)
    prompt, target = job.lengths(model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.slm.config.vocab_size, (job.rows, prompt + target), generator=generator)
    labels = ids.masked_fill(torch.arange(prompt + target) < prompt, IGNORED)
    places = (labels != IGNORED).nonzero().T.contiguous()
    changed = {"input_ids": ids, "prompt_ids": ids[:, :prompt].contiguous(), "labels": labels}
    return tensors | changed | {"target_positions": places, "target_ids": labels[*places]}


def make_codec(model: PreTrainedModel, job: Job) -> Codec:
    """Make a codec of few words: weights are random, so what they read does not matter."""
    texts = Dataset.from_dict({"prompt": [" ".join(_WORDS)], "target": [""]})
    text_format = TextFormat("{prompt}", job.prompt_tokens, job.target_tokens, "right")
    return codec_for(model, TrainedBpe(300).train(texts), None, text_format)


class Clock(Callback):
    """Times the steps after the warm-up, and at the end, where it is given a folder, a checkpoint.

    Args:
        folder: for a checkpoint that is saved and loaded, or None.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.row: Row = {}
        self._marks: list[Any] = []
        self._graphs = [counters["stats"]["unique_graphs"]]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Mark the end of a step, without waiting for the device."""
        device = pl_module.device
        self._graphs.append(counters["stats"]["unique_graphs"])
        if trainer.global_step < WARMUPS:
            return
        if trainer.global_step == WARMUPS and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._marks.append(_mark(device))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the clock; save and load."""
        self.row = {"step_s": _median_s(self._marks, pl_module.device), **_peak(pl_module.device)}
        before, warm, end = self._graphs[0], self._graphs[WARMUPS], self._graphs[-1]
        self.row["compiled"] = {"warm_up": warm - before, "on_the_clock": end - warm}
        if self.folder is not None:
            self.row["checkpoint"] = save_and_load(trainer, self.folder / "benchmark.ckpt")


def save_and_load(trainer: Trainer, path: Path) -> Row:
    """Save a checkpoint of a running training and load it: seconds of either until the last rank has it, and bytes."""
    strategy = trainer.strategy
    save_s = _seconds(strategy, lambda: trainer.save_checkpoint(path))
    load_s = _seconds(strategy, lambda: strategy.load_checkpoint(path))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"save_s": save_s, "load_s": load_s, "bytes": size}


def train(orders: Orders, case: Case, folder: Path | None) -> Row:
    """Train a case.

    Args:
        orders: of the world.
        case: what is trained.
        folder: for a checkpoint that is saved and loaded, or None.

    Returns:
        gpus, placement, rows, step_s (the median of the slowest rank), tokens_per_s (of all ranks; a prompt's tokens
        count once), peak_memory_bytes of the fullest GPU (None on a CPU), compiled (graphs, of rank 0), and checkpoint
        where it was asked for.
    """
    torch.compiler.reset()  # shapes of the case before would make this one's dynamic
    job, clock = job_of(orders, case), Clock(folder)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"),
        False,
    )
    trainer = Trainer(
        accelerator="gpu" if orders.gpu else "cpu",
        devices=orders.world,
        strategy=_strategy(orders, case),
        precision=orders.precision,
        max_steps=WARMUPS + orders.steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[clock],
        **quiet,
    )
    trainer.fit(RandomSystem(job, orders), datamodule=FullRows(job, WARMUPS + orders.steps))
    row = _slowest(clock.row)
    tokens = case.rows * orders.world * (orders.prompt_tokens + orders.target_tokens)
    about = {"gpus": orders.world, "placement": case.placement, "rows": case.rows}
    return about | row | {"tokens_per_s": tokens / row["step_s"]}


def link(orders: Orders) -> Row:
    """Sum equal parts of all ranks, as DDP does with gradients, and nothing else meanwhile.

    Returns:
        gpus, and all_reduce_bytes_per_s: bytes of a rank's part over the median time of a sum.
    """
    part = torch.zeros(_PART, device=torch.device("cuda", torch.cuda.current_device()) if orders.gpu else "cpu")
    times = []
    for _ in range(WARMUPS + orders.steps):
        begin = time.perf_counter()
        dist.all_reduce(part)
        if orders.gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return {"gpus": orders.world, "all_reduce_bytes_per_s": part.nbytes / statistics.median(times[WARMUPS:])}


def evaluate(orders: Orders, folder: Path) -> Row:
    """Predict the same examples on all ranks, each of which holds the whole system, as `llmslm-eval compare` does.

    Returns:
        gpus, examples and examples_per_s; loading and a first batch a rank are not on the clock.
    """
    ranks = _evaluating(orders.world)
    device = torch.device("cuda", ranks.local_rank) if orders.gpu else torch.device("cpu")
    job = job_of(orders, Case("unsharded", 1))
    torch.manual_seed(0)
    with device:
        model = build(job, torch.bfloat16 if orders.gpu else None)
    system = System("llm_to_slm", model, make_codec(model, job), card={})
    sizes: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "batch_size": BATCH, "ranks": ranks}
    predict(system, examples(BATCH * ranks.size, orders), folder / "warmup.jsonl", **sizes)
    ranks.gather_all(None)
    begin = time.perf_counter()
    predict(system, examples(orders.examples, orders), folder / "predictions.jsonl", **sizes)
    seconds = max(ranks.gather_all(time.perf_counter() - begin))
    leave_ranks(ranks)
    return {"gpus": ranks.size, "examples": orders.examples, "examples_per_s": orders.examples / seconds}


def _evaluating(world: int) -> Ranks:
    """Leave the training's group and join one as the evaluation makes it, over gloo, where keys are not taken yet."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if world > 1:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.PrefixStore("evaluation", dist.TCPStore(*address, is_master=False))  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=world, timeout=PATIENCE)
    return join_ranks()


def examples(count: int, orders: Orders) -> Examples:
    """Make examples of equally many words: half as many as a prompt may have tokens, an eighth of a target's."""
    words = max(1, orders.prompt_tokens // 2)
    prompts = [" ".join(_WORDS[(i + n) % len(_WORDS)] for n in range(words)) for i in range(count)]
    ids = [f"{number:06}" for number in range(count)]
    references = [" ".join(_WORDS[:4])] * count
    return Examples("scaling", "test", "", count, ids, prompts, references)


def main(args: list[str] | None = None) -> None:
    """Do what the orders say; what is measured is written at once, so that a later failure takes nothing with it."""
    (name,) = sys.argv[1:] if args is None else args
    folder = Path(name)
    orders = Orders.read(folder)
    rank = os.environ.get("RANK", "0")
    # Ranks that compile the same thing at once would read each other's half-written files.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir(), f"torchinductor_rank_{rank}"))
    saved = next(case for case in orders.cases if case.placement == "sharded")
    for case in orders.cases:
        _write(folder, rank, train(orders, case, folder if case == saved else None))
        gc.collect()
        torch.cuda.empty_cache()
    if orders.world > 1:
        _write(folder, rank, link(orders))
    _write(folder, rank, evaluate(orders, folder))


def _write(folder: Path, rank: str, row: Row) -> None:
    if rank == "0":
        with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _strategy(orders: Orders, case: Case) -> Strategy | str:
    if case.placement != "unsharded":
        return Fsdp(encoder=case.placement)
    return DDPStrategy(gradient_as_bucket_view=True) if orders.world > 1 else "auto"  # as `llmslm fit` has it


def _mark(device: torch.device) -> Any:
    """Return a point in time of the device's work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _median_s(marks: list[Any], device: torch.device) -> float:
    """Return the median time between two marks."""
    pairs = list(itertools.pairwise(marks))
    if device.type != "cuda":
        return statistics.median(after - before for before, after in pairs)
    torch.cuda.synchronize(device)
    return statistics.median(before.elapsed_time(after) / 1e3 for before, after in pairs)


def _peak(device: torch.device) -> Row:
    return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}


def _seconds(strategy: Strategy, work: Callable[[], Any]) -> float:
    strategy.barrier()
    begin = time.perf_counter()
    work()
    strategy.barrier()
    return time.perf_counter() - begin


def _slowest(row: Row) -> Row:
    """Take the largest time and memory of all ranks."""
    rows = Ranks(size=dist.get_world_size() if dist.is_initialized() else 1).gather_all(row)
    peaks = [one["peak_memory_bytes"] for one in rows if one["peak_memory_bytes"] is not None]
    return row | {"step_s": max(one["step_s"] for one in rows), "peak_memory_bytes": max(peaks, default=None)}


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # torchrun ends the others; leaving a group in order would wait for them
