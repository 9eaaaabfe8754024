"""What of a recipe and of its devices decides about memory and time."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from transformers import PreTrainedModel

from llmslm.errors import UserError
from llmslm.fsdp1 import FSDP2, translated
from llmslm.graphed import MOST_OF_COPIES
from llmslm.models.modeling import LlmToSlm
from llmslm.models.trained import count_parameters
from llmslm.parallel import EncoderPlace, Fsdp
from llmslm.planning.costs import Device

Values = Mapping[str, Any]
MOMENTS = {"AdamW": 8, "Adam": 8, "NAdam": 8, "RAdam": 8, "SGD": 4, "Adafactor": 0}
"""Bytes of optimizer state a weight; an optimizer that is not named here counts as AdamW."""


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


def _is_mixed(precision: Any) -> bool:
    """Read the Trainer's precision, its short names too."""
    names = {"32": False, "32-true": False, "16": True, "16-mixed": True, "bf16": True, "bf16-mixed": True}
    if str(precision) not in names:
        raise UserError(
            f"trainer.precision is {precision}; a plan knows {', '.join(names)}, whose master weights are float32"
        )
    return names[str(precision)]


def _check_options(sharding: Values) -> None:
    """Refuse what training would refuse: another key of the strategy, or no such place of the encoder."""
    prefix, known = "trainer.strategy.init_args", inspect.signature(Fsdp).parameters
    if unknown := sorted(set(sharding) - set(known)):
        raise UserError(f"{prefix}.{unknown[0]} is not known; expected one of {', '.join(known)}")
    place = sharding.get("encoder", "sharded")
    if place not in get_args(EncoderPlace):
        raise UserError(f"{prefix}.encoder is {place}; expected one of {', '.join(get_args(EncoderPlace))}")


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
    masked: bool
    """Whether rows are padded, so that layers keep a mask."""
    compiled: bool
    """Whether blocks and loss are compiled."""
    label_smoothing: float
    distils: bool
    """Whether the slm learns from the LLM's stored logits, too."""
    steps: int | None
    """Optimizer steps of the whole training, where the recipe says."""

    @classmethod
    def of(cls, recipe: Values, prompt_tokens: int | None = None, target_tokens: int | None = None) -> "Job":
        """Read a recipe; batches are as long as its limits allow unless lengths are given."""
        data, trainer = recipe.get("data", {}), recipe.get("trainer", {})
        strategy = translated(trainer.get("strategy") or "auto", trainer.get("devices"))
        sharding = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
        name = strategy if isinstance(strategy, str) else strategy["class_path"]
        if name == FSDP2:
            _check_options(sharding)
        optimizer = recipe["model"].get("optimizer") or {"class_path": "torch.optim.AdamW"}
        target = target_tokens or data.get("max_target_tokens", 128)
        prompt = prompt_tokens or data.get("max_prompt_tokens", 512)
        return cls(
            model=recipe["model"],
            vocab_size=(data.get("tokenizer") or {}).get("vocab_size"),
            rows=data.get("micro_batch_size", 32),
            prompt_tokens=prompt,
            target_tokens=target,
            mixed=_is_mixed(trainer.get("precision") or "32-true"),
            accumulate=trainer.get("accumulate_grad_batches", 1),
            is_sharded=name == FSDP2,
            encoder=sharding.get("encoder", "sharded"),
            reshard_after_forward=sharding.get("reshard_after_forward", True),
            activation_checkpointing=sharding.get("activation_checkpointing", False),
            fused_optimizer=bool((optimizer.get("init_args") or {}).get("fused", False)),
            moment_bytes=MOMENTS.get(optimizer["class_path"].rpartition(".")[2], 8),
            pack_tokens=data.get("pack_tokens"),
            masked=data.get("pack_tokens") is None,
            compiled=recipe["model"].get("compile", False),
            label_smoothing=recipe["model"].get("label_smoothing", 0.0),
            distils=recipe["model"].get("system") != "llm"
            and bool((recipe["model"].get("distillation") or {}).get("logits")),
            steps=steps if (steps := trainer.get("max_steps", -1)) > 0 else None,
        )

    @property
    def encoder_options(self) -> Values:
        """The recipe's `model.encoder`."""
        return self.model.get("encoder") or {}

    def is_graphed(self, model: PreTrainedModel, gpus: int) -> bool:
        """Whether forward and backward of a step are one CUDA graph; see `llmslm.graphed`."""
        alone = gpus == 1 or count_parameters(model)["trained"] <= MOST_OF_COPIES
        # With the LLM's logits each batch has another number of targets.
        fixed = self.packs(model) and not self.distils
        return self.compiled and fixed and alone and not self.is_sharded

    def packs(self, model: PreTrainedModel) -> bool:
        """Whether several examples share a row: the recipe asks for it, and the system can."""
        return self.pack_tokens is not None and (model.can_pack if isinstance(model, LlmToSlm) else True)

    def examples(self, model: PreTrainedModel) -> int:
        """Return how many examples of the given lengths a row holds."""
        if self.pack_tokens is None or not self.packs(model):
            return 1
        of_an_example = self.prompt_tokens + (0 if model.config.is_encoder_decoder else self.target_tokens)
        return max(1, self.pack_tokens // of_an_example)

    def lengths(self, model: PreTrainedModel) -> tuple[int, int]:
        """Return tokens of prompts and of targets in a row; packed examples keep the proportion of the two."""
        prompt, target = self.prompt_tokens, self.target_tokens
        if self.pack_tokens is None or not self.packs(model):
            return prompt, target
        if not model.config.is_encoder_decoder:
            prompt = round(self.pack_tokens * prompt / (prompt + target))
            return prompt, self.pack_tokens - prompt
        return self.pack_tokens, max(target, math.ceil(self.pack_tokens * target / prompt))
