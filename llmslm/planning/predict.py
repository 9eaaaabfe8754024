"""`llmslm plan`: memory per GPU and time per step of a recipe on a given world, before anything is paid for.

The system is built without weights and one step of it is run on tensors without memory, which gives activations and
arithmetic as they will be (`llmslm.planning.step`); what sharding divides, gathers and sends is then counted.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from llmslm.errors import UserError
from llmslm.models.blocks import blocks
from llmslm.models.modeling import LlmToSlm, language_model_of
from llmslm.models.trained import base_names
from llmslm.planning.costs import Cost, allocated
from llmslm.planning.job import Job, World
from llmslm.planning.step import build, recomputed_bytes, trial

_EAGER = 1.4
"""Time of an eager step over the roofline of its operations: 1.28 to 1.57 where steps of 32 and 64 rows were measured
on H200s (docs/distributed.md)."""
_LEFT = 0.5
"""Share of what is not matrix products that compiling leaves. So a step of 350M parameters on one H200 is predicted
within 1 % and one of llm_to_slm 10 % too short; with all of it they were half too long (docs/distributed.md)."""
_SHARDED_HOST = 2
"""Work of the host that shards, over that without: one H200 took 144 to 163 ms for two rows, 77 without sharding."""


@dataclass(frozen=True)
class Sizes:
    """Weights of a system, in numbers of them."""

    trained: int
    frozen: int
    frozen_bytes: float
    """Of the frozen encoder, as it is stored."""
    base: int
    """Frozen weights of the language model beside which adapters are trained."""
    root: int
    """Weights outside of the blocks that train: embeddings, head, projector."""
    block: int
    """The largest block through which gradients go."""
    tensors: tuple[int, ...]
    """What is trained, tensor by tensor."""
    frozen_block: int
    frozen_root: int
    """Weights of the frozen encoder outside of its blocks: its embeddings."""

    @property
    def sharded(self) -> int:
        """Weights that lie in float32 beside the encoder."""
        return self.trained + self.base

    def trained_bytes(self, shard: int) -> float:
        """Return what a copy of all that is trained takes in float32: weights, gradients, a moment."""
        return sum(allocated(numel * 4 / shard) for numel in self.tensors)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Sizes":
        """Count a system, built with or without memory."""
        encoder = model.encoder if isinstance(model, LlmToSlm) else None
        tensors = tuple(p.numel() for p in model.parameters() if p.requires_grad)
        trained = sum(tensors)
        frozen = [] if encoder is None else list(encoder.parameters())
        base = sum(p.numel() for name, p in model.named_parameters() if name in base_names(model))
        ours = blocks(language_model_of(model))
        own = [_numel(block) for block in ours if base or any(p.requires_grad for p in block.parameters())]
        fixed = [] if encoder is None else [_numel(block) for block in blocks(encoder)]
        return cls(
            trained,
            sum(p.numel() for p in frozen),
            float(sum(p.nbytes for p in frozen)),
            base,
            trained + base - sum(own),
            max(own, default=0),
            tensors,
            max(fixed, default=0),
            sum(p.numel() for p in frozen) - sum(fixed),
        )

    def quantised(self, quantization: str | None) -> "Sizes":
        """Return the sizes with the encoder's blocks in fewer bits, with what their scales take."""
        if quantization is None or not self.frozen:
            return self
        root = self.frozen_bytes * self.frozen_root / self.frozen
        bytes_each = {"8bit": 1.0, "4bit": 0.5625}[quantization]
        return replace(self, frozen_bytes=root + (self.frozen - self.frozen_root) * bytes_each)


def predict(job: Job, world: World) -> dict[str, Any]:
    """Predict memory per GPU and the time of an optimizer step.

    Returns:
        Tokens of a row; how the step is run (eager, compiled, or compiled as one CUDA graph); bytes by kind and their
        peak; bytes of an offloaded encoder in the memory of a node's host; seconds by kind, of a step run so, and of
        one in which all but matrix products is fused away; tokens a second of all GPUs, prompts and targets; what
        limits it.
    """
    half = job.mixed and job.is_sharded  # blocks are gathered in it
    # Of one rank that does not accumulate, gradients go before the backward makes new ones; others add to theirs.
    anew = not job.is_sharded and world.gpus == job.accumulate == 1
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # a speed that is not ours
        warnings.filterwarnings(
            "ignore", message="The .grad attribute of a Tensor"
        )  # the compiler looks at all tensors
        model = build(job)
        sizes = Sizes.of(model).quantised(job.encoder_options.get("quantization"))
        prompt, target = job.lengths(model)
        dtype = torch.bfloat16 if half else torch.float32
        cost = trial(build(job, dtype), job, world.device, anew=anew)
        if job.compiled:
            again = recomputed_bytes(job, dtype)
            cost.peak_bytes, cost.forward_bytes = cost.peak_bytes - again, cost.forward_bytes - again
    graphed = job.is_graphed(model, world.gpus)
    memory = _memory(job, world, sizes, cost, anew, graphed)
    seconds = _seconds(job, world, sizes, cost, graphed)
    tokens = job.rows * (prompt + target) * world.gpus * job.accumulate
    return {
        "row_tokens": {"prompt": prompt, "target": target},
        "run": "one graph" if graphed else "compiled" if job.compiled else "eager",
        "weights": {"trained": sizes.trained, "frozen": sizes.frozen + sizes.base},
        "memory_bytes": memory,
        "host_bytes": _offloaded(job, world, sizes),
        "fits": memory["peak"] < world.device.memory_bytes * 0.94,  # the driver and fragments take some
        "seconds": seconds,
        "tokens_per_s": tokens / seconds["step"],
        "mfu": cost.flops * job.accumulate / seconds["step"] / world.device.matmul_flops,
        "limit": max(("compute", "host", "communication"), key=lambda kind: seconds[kind]),
    }


def check(job: Job, world: World) -> None:
    """Refuse a world that cannot be.

    Raises:
        UserError: if the shards do not divide the world, or a model of a recipe has neither source nor config.
    """
    if world.gpus % world.shard:
        raise UserError(f"{world.gpus} GPUs cannot be divided into shards of {world.shard} (shard_size)")
    for key in ("llm", "slm"):
        if not (job.model.get(key) or {}).keys() & {"source", "config"}:
            raise UserError(f"the recipe has neither model.{key}.source nor model.{key}.config")


# --- what sharding divides, gathers and sends -------------------------------------------------------------------------


def _memory(job: Job, world: World, sizes: Sizes, cost: Cost, anew: bool, graphed: bool) -> dict[str, float]:
    """Count bytes per GPU: in the worst moment of forward and backward, or in the optimizer's.

    The Trainer drops gradients between forward and backward: activations grow beside those of the step before.
    """
    shard = world.shard if job.is_sharded else 1
    width = 2 if job.mixed else 4
    encoder_shard = {"sharded": shard, "replicated": 1, "offloaded": float("inf")}[
        job.encoder if job.is_sharded else "replicated"
    ]
    trained, encoding = sizes.trained_bytes(shard), 0.0
    parts: dict[str, float] = {
        "weights": trained + sizes.base * 4 / shard,
        "encoder": sizes.frozen_bytes / encoder_shard,
        # Of copies (DDP) in buckets, into which gradients are views; a graph has its own, which are scaled into others.
        "gradients": trained * (1 if not graphed else 2 if world.gpus == 1 else 3),
        "optimizer": trained * job.moment_bytes / 4,
        "gathered": 0.0,
        "activations": max(cost.forward_bytes, cost.peak_bytes - trained) if anew else cost.peak_bytes,
    }
    if job.is_sharded:
        kept = 2 * sizes.block if job.reshard_after_forward else sizes.sharded - sizes.root
        # In the backward the last unit's weights and its gradients in float32 wait to be reduced.
        parts["gathered"] = (sizes.root + kept) * width + max(sizes.root, 2 * sizes.block) * 4
        if job.encoder != "replicated":  # while it reads; it is free again when the activations are most
            encoding = (sizes.root + sizes.frozen_root + 2 * sizes.frozen_block) * width
        if job.accumulate > 1:  # gradients wait whole until the last micro-batch
            parts["gathered"] += sizes.trained * 4 * (shard - 1) / shard
    held = parts["weights"] + parts["encoder"] + parts["optimizer"] + parts["gradients"]
    step = 0 if job.fused_optimizer else trained
    return parts | {"peak": held + max(parts["gathered"] + parts["activations"], encoding, step)}


def _offloaded(job: Job, world: World, sizes: Sizes) -> float:
    """Count what the GPUs of a node leave in the memory of its host."""
    offloads = job.is_sharded and job.encoder == "offloaded"
    return sizes.frozen_bytes / world.shard * min(world.gpus, world.gpus_per_node) if offloads else 0.0


def _seconds(job: Job, world: World, sizes: Sizes, cost: Cost, graphed: bool) -> dict[str, float]:
    """Hold arithmetic, launching and communication against each other.

    They overlap, but for the first gather and the last reduction. Of compiled blocks the host is taken to launch as
    many operations: their steps of two rows took about as long as eager ones.
    """
    shard = world.shard if job.is_sharded else 1
    copies = world.gpus // shard
    width = 2 if job.mixed else 4
    share = (shard - 1) / shard
    gathers = 2 if job.reshard_after_forward else 1
    frozen = sizes.frozen * width if job.encoder == "sharded" else 0
    gather = share * ((sizes.sharded - sizes.root) * gathers * width + sizes.root * width + frozen) / world.shard_link
    reduce = share * sizes.trained * 4 / world.shard_link
    if job.encoder == "offloaded" and job.is_sharded:
        gather += sizes.frozen_bytes / shard / 25e9 + share * sizes.frozen * width / world.shard_link
    between = 2 * (copies - 1) / copies * sizes.trained / shard * 4 / world.copy_link
    communication = job.accumulate * gather + reduce + between
    exposed = share * sizes.root * (width + 4) / world.shard_link
    passes = 8 if job.fused_optimizer else 16  # over weights, gradients and moments, clipping too
    optimizer = sizes.trained * 4 * passes / shard / world.device.bytes_per_s
    rest = cost.seconds - cost.product_seconds
    compute = job.accumulate * (cost.product_seconds + _LEFT * rest if job.compiled else _EAGER * cost.seconds)
    launches = 0 if graphed else cost.operations * (_SHARDED_HOST if job.is_sharded else 1)
    host = job.accumulate * launches * world.device.launch_s
    step = max(compute, host, communication) + exposed + optimizer
    at_best = max(job.accumulate * cost.product_seconds, communication) + exposed + optimizer
    return {
        "compute": compute,
        "host": host,
        "communication": communication,
        "exposed": exposed,
        "optimizer": optimizer,
        "step": step,
        "step_at_best": at_best,
    }


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
