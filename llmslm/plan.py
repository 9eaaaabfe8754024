"""`llmslm plan`: memory per GPU and time per step of a recipe on a given world, before anything is paid for.

The system is built without weights and one step of it is run on tensors without memory (`llmslm.costs`), which gives
activations and arithmetic as they will be; what sharding divides, gathers and sends is then counted.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from llmslm.costs import Cost, Counter, Device
from llmslm.errors import UserError
from llmslm.fsdp1 import FSDP2, translated
from llmslm.models.blocks import blocks
from llmslm.models.configuration import LlmToSlmConfig
from llmslm.models.encoder import Encoder
from llmslm.models.head import logits_at
from llmslm.models.modeling import LlmToSlm
from llmslm.models.trained import FrozenBase, Lora, adapters, base_names, freeze
from llmslm.parallel import EncoderPlace, checkpoint_activations
from llmslm.target_logits import cross_entropy

Values = Mapping[str, Any]
MOMENTS = {"AdamW": 8, "Adam": 8, "NAdam": 8, "RAdam": 8, "SGD": 4, "Adafactor": 0}
"""Bytes of optimizer state a weight; an optimizer that is not named here counts as AdamW."""
_PARTS = {"projector": "MlpProjector", "alignment": "SameTokenizer", "fusion": "Add"}


@dataclass(frozen=True)
class World:
    """The devices of a run."""

    device: Device
    gpus: int
    gpus_per_node: int
    shard: int
    """Neighbours that share one copy of the weights; 1: each has its own (one device, DDP)."""

    @property
    def shard_link(self) -> float:
        """Bytes a second between those that share a copy."""
        return self._link(self.shard <= self.gpus_per_node, self.gpus_per_node)

    @property
    def copy_link(self) -> float:
        """Bytes a second between copies."""
        return self._link(self.gpus <= self.gpus_per_node, max(1, self.gpus_per_node // self.shard))

    def _link(self, is_inside: bool, together: int) -> float:
        """Between nodes, the GPUs of one node that belong together bring in different parts over all their adapters."""
        device = self.device
        return (
            device.link_bytes_per_s
            if is_inside
            else min(device.link_bytes_per_s, together * device.network_bytes_per_s)
        )


@dataclass(frozen=True)
class Job:
    """What of a recipe decides about memory and time."""

    model: Values
    """The recipe's `model` section."""
    vocab_size: int | None
    rows: int
    prompt_tokens: int
    target_tokens: int
    mixed: bool
    accumulate: int
    is_sharded: bool
    encoder: EncoderPlace
    reshard_after_forward: bool
    activation_checkpointing: bool
    fused_optimizer: bool
    moment_bytes: int
    pack_tokens: int | None
    """Tokens of a row of several examples; None: a row is an example."""
    compiled: bool
    """Whether blocks and loss are compiled."""
    steps: int | None
    """Optimizer steps of the whole training, where the recipe says."""

    @classmethod
    def of(cls, recipe: Values, prompt_tokens: int | None = None, target_tokens: int | None = None) -> "Job":
        """Read a recipe; batches are as long as its limits allow unless lengths are given."""
        data, trainer = recipe.get("data", {}), recipe.get("trainer", {})
        strategy = translated(trainer.get("strategy") or "auto", trainer.get("devices"))
        sharding = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
        name = strategy if isinstance(strategy, str) else strategy["class_path"]
        optimizer = recipe["model"].get("optimizer") or {"class_path": "torch.optim.AdamW"}
        target = target_tokens or data.get("max_target_tokens", 128)
        prompt = prompt_tokens or data.get("max_prompt_tokens", 512)
        return cls(
            model=recipe["model"],
            vocab_size=(data.get("tokenizer") or {}).get("vocab_size"),
            rows=data.get("micro_batch_size", 32),
            prompt_tokens=prompt,
            target_tokens=target,
            mixed=str(trainer.get("precision", "32-true")) in ("bf16-mixed", "16-mixed"),
            accumulate=trainer.get("accumulate_grad_batches", 1),
            is_sharded=name == FSDP2,
            encoder=sharding.get("encoder", "sharded"),
            reshard_after_forward=sharding.get("reshard_after_forward", True),
            activation_checkpointing=sharding.get("activation_checkpointing", False),
            fused_optimizer=bool((optimizer.get("init_args") or {}).get("fused", False)),
            moment_bytes=MOMENTS.get(optimizer["class_path"].rpartition(".")[2], 8),
            pack_tokens=data.get("pack_tokens"),
            compiled=recipe["model"].get("compile", False),
            steps=steps if (steps := trainer.get("max_steps", -1)) > 0 else None,
        )

    @property
    def encoder_options(self) -> Values:
        """The recipe's `model.encoder`."""
        return self.model.get("encoder") or {}

    def lengths(self, model: PreTrainedModel) -> tuple[int, int]:
        """Return tokens of prompts and of targets in a row; packed examples keep the proportion of the two."""
        prompt, target = self.prompt_tokens, self.target_tokens
        composed, decodes_all = isinstance(model, LlmToSlm), not model.config.is_encoder_decoder
        by_token = decodes_all and model.prompt_layout in ("tokens", "placeholders") if composed else True
        if self.pack_tokens is None or not by_token:
            return prompt, target
        if decodes_all:
            prompt = round(self.pack_tokens * prompt / (prompt + target))
            return prompt, self.pack_tokens - prompt
        return self.pack_tokens, max(target, math.ceil(self.pack_tokens * target / prompt))


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
    frozen_block: int
    frozen_root: int
    """Weights of the frozen encoder outside of its blocks: its embeddings."""

    @property
    def sharded(self) -> int:
        """Weights that lie in float32 beside the encoder."""
        return self.trained + self.base

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Sizes":
        """Count a system, built with or without memory."""
        encoder = model.encoder if isinstance(model, LlmToSlm) else None
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        frozen = [] if encoder is None else list(encoder.parameters())
        base = sum(p.numel() for name, p in model.named_parameters() if name in base_names(model))
        ours = blocks(model.slm if isinstance(model, LlmToSlm) else model)
        own = [_numel(block) for block in ours if base or any(p.requires_grad for p in block.parameters())]
        fixed = [] if encoder is None else [_numel(block) for block in blocks(encoder)]
        return cls(
            trained,
            sum(p.numel() for p in frozen),
            float(sum(p.nbytes for p in frozen)),
            base,
            trained + base - sum(own),
            max(own, default=0),
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
        Tokens of a row; bytes by kind and their peak; seconds by kind, of a step run eagerly, and of one in which all
        but matrix products is fused away, which compiled blocks come near; tokens a second of all GPUs, prompts and
        targets; what limits it.
    """
    half = job.mixed and job.is_sharded  # blocks are gathered in it
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # a speed that is not ours
        warnings.filterwarnings(
            "ignore", message="The .grad attribute of a Tensor"
        )  # the compiler looks at all tensors
        model = build(job)
        sizes = Sizes.of(model).quantised(job.encoder_options.get("quantization"))
        prompt, target = job.lengths(model)
        dtype = torch.bfloat16 if half else torch.float32
        cost = trial(build(job, dtype), job, world.device)
        if job.compiled:
            cost.peak_bytes -= recomputed_bytes(job, dtype)
    memory = _memory(job, world, sizes, cost)
    seconds = _seconds(job, world, sizes, cost)
    tokens = job.rows * (prompt + target) * world.gpus * job.accumulate
    return {
        "row_tokens": {"prompt": prompt, "target": target},
        "weights": {"trained": sizes.trained, "frozen": sizes.frozen + sizes.base},
        "memory_bytes": memory,
        "fits": memory["peak"] < world.device.memory_bytes * 0.94,  # the driver and fragments take some
        "seconds": seconds,
        "tokens_per_s": tokens / seconds["step"],
        "mfu": cost.flops * job.accumulate / seconds["step"] / world.device.matmul_flops,
        "limit": "communication" if seconds["communication"] > seconds["compute"] else "compute",
    }


# --- the step, on tensors without memory ------------------------------------------------------------------------------


def build(job: Job, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build a recipe's system with random weights, or with none under a FakeTensorMode.

    Args:
        job: what of the recipe counts.
        dtype: of all weights; None takes float32 for those that are trained, the recipe's for the frozen encoder.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        return _build(job, dtype).train()
    finally:
        torch.set_default_dtype(default)


def _build(job: Job, dtype: torch.dtype | None) -> PreTrainedModel:
    if (system := job.model.get("system", "llm_to_slm")) != "llm_to_slm":
        config = _config(job, system)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return _restricted(auto.from_config(config, dtype=dtype or torch.float32), job.model[system])
    encoder, slm_config = _encoder(job, dtype), _config(job, "slm")
    parts: dict[str, Any] = {name: _spec(job.model.get(name), name) for name in _PARTS}
    options = job.encoder_options
    config = LlmToSlmConfig(
        encoder_config=encoder.config, slm_config=slm_config, encoder_layer=options.get("layer", "last"), **parts
    )
    model = LlmToSlm(config)
    auto = AutoModelForSeq2SeqLM if slm_config.is_encoder_decoder else AutoModelForCausalLM
    slm = auto.from_config(slm_config, dtype=dtype or torch.float32)  # with the attention that training takes
    model.slm = _restricted(slm, job.model["slm"])
    model.fusion.attach(model.slm)
    model.encoder = None if options.get("features") else encoder
    return model


def _restricted(model: PreTrainedModel, options: Values) -> PreTrainedModel:
    """Freeze what a recipe does not train of a language model, as training does."""
    train = options.get("train", "full")
    if train != "full":
        lora = asdict(Lora(**train)) if isinstance(train, Mapping) else None
        model.config.frozen_base = FrozenBase(source="", revision=None, hash="", lora=lora)
        with torch.device("meta"):  # peft moves adapters that lie elsewhere, which tensors without memory cannot
            freeze(model)
        for name, weight in adapters(dict(model.named_parameters())).items():
            owner, _, own_name = name.rpartition(".")
            empty = torch.empty(weight.shape, dtype=weight.dtype)
            setattr(model.get_submodule(owner), own_name, nn.Parameter(empty, weight.requires_grad))
    return model


def batch(model: PreTrainedModel, job: Job, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Make a batch of full rows."""
    rows, (prompt, target) = job.rows, job.lengths(model)
    ones = torch.ones(rows, prompt, dtype=torch.long, device=device)
    sides = {"prompt_ids": ones, "prompt_attention_mask": ones} if isinstance(model, LlmToSlm) else {}
    if isinstance(model, LlmToSlm) and model.encoder is None:  # its states were stored before
        sides["hidden_states"] = torch.zeros(
            rows, prompt, _states_width(model), dtype=torch.bfloat16 if job.mixed else None, device=device
        )
    if model.config.is_encoder_decoder:
        targets = ones[:, :1].expand(rows, target).contiguous()
        return sides | {"input_ids": ones, "attention_mask": ones, "decoder_input_ids": targets}
    ids = ones[:, :1].expand(rows, prompt + target).contiguous()
    return sides | {"input_ids": ids, "attention_mask": ids}


def loss(
    model: PreTrainedModel,
    job: Job,
    tensors: dict[str, Tensor],
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """Compute the loss as training does: logits of targets alone."""
    rows, device = job.rows, tensors["input_ids"].device
    prompt, target = job.lengths(model)
    start = 0 if model.config.is_encoder_decoder else prompt - 1
    length = target if model.config.is_encoder_decoder else prompt + target
    columns = torch.arange(start, start + target, device=device).repeat(rows)
    places = torch.arange(rows, device=device).repeat_interleave(target)
    with logits_at(model, places, columns, length):
        logits = model(**tensors, use_cache=False).logits[0]
    return cross_entropy(logits, torch.ones_like(columns))


def trial(model: PreTrainedModel, job: Job, device: Device) -> Cost:
    """Run forward and backward of one micro-batch and count; call it under a FakeTensorMode."""
    if job.activation_checkpointing:
        checkpoint_activations(model.slm if isinstance(model, LlmToSlm) else model, preserve_rng_state=False)
    if job.is_sharded:
        for parameter in model.parameters():
            if parameter.requires_grad:  # reduced and divided as soon as it is there
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
    tensors = batch(model, job)
    with Counter(device) as counter, torch.autocast("cpu", torch.bfloat16, enabled=job.mixed, cache_enabled=False):
        loss(model, job, tensors, _one_pass if job.compiled else cross_entropy).backward()
    return counter.cost


def recomputed_bytes(job: Job, dtype: torch.dtype) -> int:
    """Count what compiled blocks compute again in the backward instead of keeping it; under a FakeTensorMode.

    What is compiled cannot be counted operation by operation. Of two forwards, what each keeps for its backward can.
    """
    models = build(job, dtype), build(job, dtype)
    trained = [block for block in blocks(models[1]) if any(p.requires_grad for p in block.parameters())]
    for block in trained:
        block.compile(backend="aot_eager_decomp_partition")  # divides forward from backward as training's compiler does
    saved = _kept_bytes(models[0], job) - _kept_bytes(models[1], job)
    # Checkpoints keep the inputs of blocks, and what is between them of one block at a time.
    return max(0, saved // len(trained) if job.activation_checkpointing else saved)


def _kept_bytes(model: PreTrainedModel, job: Job) -> int:
    """Count the storages that a forward keeps for its backward."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=job.mixed, cache_enabled=False),
    ):
        loss(model, job, batch(model, job), _one_pass)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _OnePass(torch.autograd.Function):
    """What a compiled cross-entropy keeps and reads: the logits, once each way, and no copy in float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.sum(dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])


def _one_pass(logits: Tensor, _targets: Tensor) -> Tensor:
    result: Tensor = _OnePass.apply(logits)
    return result


def _states_width(model: LlmToSlm) -> int:
    layer = model.config.encoder_layer
    width: int = model.projector.encoder_hidden_size
    return width * (len(layer) if isinstance(layer, list) else 1)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _config(job: Job, key: str) -> Any:
    options = job.model[key]
    if options.get("source"):
        return AutoConfig.from_pretrained(options["source"], revision=options.get("revision"))
    values = dict(options["config"])
    if job.vocab_size is not None:
        values.setdefault("vocab_size", job.vocab_size)
    values = {"decoder_start_token_id": 0, "pad_token_id": 0} | values
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _encoder(job: Job, dtype: torch.dtype | None) -> Encoder:
    options = job.encoder_options
    source = {"source": options["source"]} if options.get("source") else job.model["llm"]
    config = _config(Job(**vars(job) | {"model": {"llm": source}}), "llm")
    if dtype is None:
        dtype = getattr(torch, options["dtype"]) if options.get("dtype") else getattr(config, "dtype", None)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModel
    model = auto.from_config(config, dtype=dtype or torch.float32)
    return Encoder(model.get_encoder() if config.is_encoder_decoder else model, options.get("layer", "last"))


def _spec(value: Any, name: str) -> dict[str, Any]:
    """Name a part as a composition's config does."""
    value = {"class_path": value} if isinstance(value, str) else dict(value or {"class_path": _PARTS[name]})
    path = value["class_path"]
    return {
        "class_path": path if "." in path else f"llmslm.models.{name}.{path}",
        "init_args": value.get("init_args") or {},
    }


# --- what sharding divides, gathers and sends -------------------------------------------------------------------------


def _memory(job: Job, world: World, sizes: Sizes, cost: Cost) -> dict[str, float]:
    """Count bytes per GPU: in the backward's worst moment, or in the optimizer's."""
    shard = world.shard if job.is_sharded else 1
    width = 2 if job.mixed else 4
    encoder_shard = {"sharded": shard, "replicated": 1, "offloaded": float("inf")}[
        job.encoder if job.is_sharded else "replicated"
    ]
    parts: dict[str, float] = {
        "weights": sizes.sharded * 4 / shard,
        "encoder": sizes.frozen_bytes / encoder_shard,
        "gradients": sizes.trained * 4 / shard,
        "optimizer": sizes.trained * job.moment_bytes / shard,
        "gathered": 0.0,
        "activations": float(cost.peak_bytes),
    }
    if job.is_sharded:
        kept = 2 * sizes.block if job.reshard_after_forward else sizes.sharded - sizes.root
        unit = max(kept, 0 if job.encoder == "replicated" else sizes.frozen_root + 2 * sizes.frozen_block)
        # In the backward the last unit's weights and its gradients in float32 wait to be reduced.
        parts["gathered"] = (sizes.root + unit) * width + max(sizes.root, 2 * sizes.block) * 4
        if job.accumulate > 1:  # gradients wait whole until the last micro-batch
            parts["gathered"] += sizes.trained * 4 * (shard - 1) / shard
    elif world.gpus > 1:
        parts["gathered"] = sizes.trained * 4.0  # DDP's buckets
    held = parts["weights"] + parts["encoder"] + parts["optimizer"]
    # Without shards the gradients are among what the trial counted; with them it dropped each one as it was there.
    backward = held + parts["gathered"] + parts["activations"] + (parts["gradients"] if job.is_sharded else 0)
    step = held + parts["gradients"] + (0 if job.fused_optimizer else sizes.trained * 4 / shard)
    if not job.is_sharded:
        step += parts["gathered"]
        parts["activations"] = max(0.0, cost.peak_bytes - parts["gradients"])
    return parts | {"peak": max(backward, step)}


def _seconds(job: Job, world: World, sizes: Sizes, cost: Cost) -> dict[str, float]:
    """Hold arithmetic against communication: they overlap, but for the first gather and the last reduction."""
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
    compute = job.accumulate * cost.seconds
    step = max(compute, communication) + exposed + optimizer
    at_best = max(job.accumulate * cost.product_seconds, communication) + exposed + optimizer
    return {
        "compute": compute,
        "communication": communication,
        "exposed": exposed,
        "optimizer": optimizer,
        "step": step,
        "step_at_best": at_best,
    }


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


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
