"""The `llmslm plan` command: a recipe and a world in, a table or JSON out; `--measure` puts measurements beside it."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.errors import UserError
from llmslm.fsdp1 import translated
from llmslm.graphed import GraphedLoss
from llmslm.models.blocks import compile_blocks
from llmslm.parallel import make_mesh, parallelize
from llmslm.planning.costs import DEVICES, Device
from llmslm.planning.job import Job, World
from llmslm.planning.predict import check, predict
from llmslm.planning.rows import batch
from llmslm.planning.step import build, keep_examples_apart, loss
from llmslm.provenance import provenance
from llmslm.recipe import read_recipe
from llmslm.target_logits import cross_entropy

USAGE = """llmslm plan --config RECIPE [--config OVERLAY] [--gpus N] [--key.of.recipe VALUE ...]

Predict memory per GPU and time per step of a recipe. What follows as --key.of.recipe overrides the recipe, for example
--model.system slm or --data.micro_batch_size 16."""


_MEMORY = {
    "weights": "weights: what is trained, float32",
    "encoder": "encoder: the frozen LLM",
    "gradients": "gradients",
    "optimizer": "optimizer: its moments",
    "gathered": "gathered: blocks and gradients that are whole for now",
    "activations": "activations: kept from forward to backward",
}
_TIME = {
    "compute": "compute",
    "host": "host, which launches it meanwhile",
    "communication": "communication, beside it",
    "exposed": "communication that nothing hides",
    "optimizer": "optimizer",
    "step": "step",
    "step_at_best": "step at best: products alone",
}
_RUN = {"eager": "run eagerly", "compiled": "compiled", "one graph": "compiled, as one CUDA graph"}


def main(args: Sequence[str]) -> None:
    """Run the command.

    Raises:
        UserError: for mistakes in the arguments or the recipe.
    """
    options, overrides = _parser().parse_known_args(args)
    recipe = read_recipe(options.config, overrides)
    if "model" not in recipe:
        raise UserError(f"{', '.join(options.config)} has no model section; give a recipe (--config)")
    job = Job.of(recipe, options.prompt_tokens, options.target_tokens)
    trainer = recipe.get("trainer", {})
    world = _world(options, trainer, job)
    check(job, world)
    prediction = predict(job, world)
    if options.measure:
        measured = measure(job, world)
        if int(os.environ.get("RANK", "0")) == 0:
            sys.stdout.write(json.dumps(_record(options.config, world, prediction, measured)) + "\n")
    elif options.json:
        sys.stdout.write(json.dumps(_record(options.config, world, prediction)) + "\n")
    else:
        sys.stdout.write(table(job, world, prediction))


def table(job: Job, world: World, prediction: Mapping[str, Any]) -> str:
    """Write a prediction for people."""
    memory, seconds = prediction["memory_bytes"], prediction["seconds"]
    weights, tokens = prediction["weights"], prediction["row_tokens"]
    share = "each GPU has its own copy" if world.shard == 1 else f"shards of {world.shard}"
    packed = "" if job.pack_tokens is None else ", packed"
    fits = "fits" if prediction["fits"] else "does not fit: " + _advice(job, world)
    rows = [
        f"{world.gpus} x {world.device.name} ({world.gpus_per_node} a node), {share}",
        f"{weights['trained']:,} trained weights, {weights['frozen']:,} frozen",
        f"{job.rows} rows of {tokens['prompt']} + {tokens['target']} tokens a GPU{packed}, "
        f"{job.accumulate} times a step",
        "",
        "memory of each GPU (GB)",
        *(f"  {_MEMORY[kind]:<52}{memory[kind] / 1e9:>9.2f}" for kind in _MEMORY),
        f"  {'peak: not all at the same moment':<52}{memory['peak'] / 1e9:>9.2f}  "
        f"of {world.device.memory_bytes / 1e9:.0f}: {fits}",
        *([f"  {'of each host: the encoder':<52}{host / 1e9:>9.2f}"] if (host := prediction["host_bytes"]) else []),
        "",
        f"time of a step (ms), {_RUN[prediction['run']]}",
        *(f"  {_TIME[kind]:<52}{seconds[kind] * 1e3:>9.1f}" for kind in _TIME),
        f"limited by {prediction['limit']}; {prediction['tokens_per_s']:,.0f} tokens/s (prompts and targets), "
        f"MFU {prediction['mfu']:.0%}",
        *_price(job, world, seconds),
    ]
    return "\n".join(rows) + "\n"


def _price(job: Job, world: World, seconds: Mapping[str, float]) -> list[str]:
    """Say what the whole training takes, where the recipe says how long it is."""
    if job.steps is None:
        return []
    hours = [job.steps * seconds[kind] / 3600 for kind in ("step_at_best", "step")]
    whole, paid = (
        " to ".join(f"{h:,.1f}" if h >= 10 else f"{h:.2g}" for h in (n * hour for hour in hours))
        for n in (1, world.gpus)
    )
    return [f"{job.steps:,} steps: {whole} hours, {paid} GPU-hours, without validation and checkpoints"]


def _advice(job: Job, world: World) -> str:
    """Name the settings that save the most memory and are not used yet."""
    can = {
        "a lower data.micro_batch_size": job.rows > 1,
        "trainer.strategy llmslm.parallel.Fsdp": not job.is_sharded and world.gpus > 1,
        "encoder: sharded": job.is_sharded and job.encoder == "replicated",
        "activation_checkpointing: true": not job.activation_checkpointing and job.is_sharded,
        "a larger shard_size": job.is_sharded and world.shard < world.gpus,
        "more GPUs": job.is_sharded and world.shard == world.gpus,
    }
    names = [name for name, is_open in can.items() if is_open]
    return "try " + ", ".join(names or ["shorter data.max_prompt_tokens and data.max_target_tokens", "a smaller model"])


def measure(job: Job, world: World, steps: int = 8, warmups: int = 3) -> dict[str, float]:
    """Run the same steps on the devices that are here; under torchrun for more than one.

    Returns:
        peak_memory_bytes of this rank's device (0 without CUDA) and step_s, the median.
    """
    device = _join(world)
    model = _prepared(job, world, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    entropy, packs = cross_entropy, job.packs(model)
    if packs:
        keep_examples_apart(model, job)
    if job.compiled:
        compile_blocks(model, fixed_shapes=packs)
        entropy = torch.compile(cross_entropy, dynamic=None if packs else True)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=job.fused_optimizer)
    tensors = batch(model, job, device)

    def compute(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=job.mixed, cache_enabled=False):
            return loss(model, job, inputs, entropy)

    loss_of = GraphedLoss(compute, trained) if job.is_graphed(model, world.gpus) else compute
    times = []
    for step in range(warmups + steps):
        if step == 1 and device.type == "cuda":  # all is compiled; what a graph takes counts in its capture alone
            torch.cuda.reset_peak_memory_stats(device)
        begin = _now(device)
        for micro_batch in range(job.accumulate):
            value = loss_of(tensors)
            if micro_batch == 0:  # where the Trainer does it
                optimizer.zero_grad(set_to_none=True)
            (value / job.accumulate).backward()
            del value  # a graph is not captured while the way to an earlier loss is kept
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        times.append(_now(device) - begin)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    if dist.is_initialized():
        dist.destroy_process_group()
    return {"peak_memory_bytes": float(peak), "step_s": statistics.median(times[warmups:])}


def _prepared(job: Job, world: World, device: torch.device) -> Any:
    """Build the system with random weights, sharded or copied as the recipe says."""
    if job.encoder_options.get("quantization"):
        raise UserError("--measure has random weights, which are not quantised; leave out model.encoder.quantization")
    torch.manual_seed(0)
    with device if job.encoder != "offloaded" else nullcontext():
        model: PreTrainedModel = build(job)
    if job.is_sharded:
        parallelize(
            model,
            mesh=make_mesh(device.type, world.gpus, world.shard),
            encoder=job.encoder,
            reshard_after_forward=job.reshard_after_forward,
            compute_dtype=torch.bfloat16 if job.mixed else None,
            activation_checkpointing=job.activation_checkpointing,
        )
        return model
    if job.activation_checkpointing:
        parallelize(model, activation_checkpointing=True)
    if world.gpus == 1:
        return model
    raise UserError("--measure takes one GPU, or a recipe with trainer.strategy llmslm.parallel.Fsdp")


def _join(world: World) -> torch.device:
    """Take this rank's device, and find the others."""
    here = int(os.environ.get("WORLD_SIZE", "1"))
    if here != world.gpus:
        start = f"torchrun --nproc-per-node {world.gpus} -m llmslm plan ..."
        raise UserError(f"--measure for {world.gpus} GPUs was started on {here}; start it with {start}")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if here > 1:
        dist.init_process_group()
    return device


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _record(
    names: Sequence[str], world: World, prediction: Mapping[str, Any], measured: Mapping[str, float] | None = None
) -> dict[str, Any]:
    record = {"recipe": list(names), "device": world.device.name, "gpus": world.gpus, "shard": world.shard}
    record |= {"predicted": dict(prediction)}
    if measured is None:
        return record
    ratios = {
        "peak_memory": prediction["memory_bytes"]["peak"] / measured["peak_memory_bytes"]
        if measured["peak_memory_bytes"]
        else None,
        "step": prediction["seconds"]["step"] / measured["step_s"],
    }
    return record | {"measured": dict(measured), "predicted_over_measured": ratios, "provenance": provenance()}


def _world(options: argparse.Namespace, trainer: Mapping[str, Any], job: Job) -> World:
    devices = trainer.get("devices", 1)
    gpus = options.gpus or _count(devices) * trainer.get("num_nodes", 1)
    strategy = translated(trainer.get("strategy") or "auto", devices)
    given = None if isinstance(strategy, str) else (strategy.get("init_args") or {}).get("shard_size")
    device: Device = DEVICES[options.gpu]
    return World(device, gpus, options.gpus_per_node, (given or gpus) if job.is_sharded else 1)


def _count(devices: Any) -> int:
    """Count the devices of a node as the Trainer does; where it takes all that there are, one."""
    if isinstance(devices, str) and "," in devices:
        devices = devices.strip(",").split(",")
    if isinstance(devices, list):
        return len(devices)
    return max(int(devices), 1) if str(devices).isdigit() else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmslm plan", usage=USAGE, allow_abbrev=False)
    parser.add_argument("--config", action="append", required=True, help="recipe or overlay; several are merged")
    parser.add_argument("--gpus", type=int, default=None, help="GPUs in all; default: the recipe's devices x num_nodes")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu", choices=sorted(DEVICES), default="h200", help="kind of GPU")
    parser.add_argument("--prompt-tokens", type=int, default=None, help="default: the recipe's data.max_prompt_tokens")
    parser.add_argument("--target-tokens", type=int, default=None, help="default: the recipe's data.max_target_tokens")
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    parser.add_argument("--measure", action="store_true", help="run the steps here too and print both as one JSON line")
    return parser
