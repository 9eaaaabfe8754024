"""Training speed at every log step: tokens a second, padding, arithmetic, and its share of what the device can do."""

import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmslm.data.codec import BatchSizes
from llmslm.models.modeling import LlmToSlm, language_model_of

_HALF = {"bf16": torch.bfloat16, "16": torch.float16}


class LogThroughput(Callback):
    """Logs train/tokens_per_s, train/padding_share, train/tflops_per_s and, on CUDA, train/mfu.

    Tokens are those of prompts and targets, on both sides, without padding; tokens_per_s is of all ranks, tflops_per_s
    and mfu of one device. The arithmetic is counted from the weights: two operations a weight and token forward, four
    more backward where it is trained; attention scores are left out, as is what activation checkpointing repeats. mfu
    is the share of what a large matrix product reaches on this device in this precision, measured when training starts.
    """

    def __init__(self) -> None:
        self._monitor: Throughput
        self._flops = FlopCount(0, 0, 0, 0, 0)
        self._begun = 0.0
        self._last = -1
        self._seen = {"batches": 0, "examples": 0, "tokens": 0, "flops": 0}
        self._window = {"tokens": 0, "slots": 0}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the weights and start the clock."""
        device = pl_module.device
        precision = str(trainer.precision)
        dtype = next((kind for name, kind in _HALF.items() if name in precision), torch.float32)
        available = product_speed(device, dtype) if device.type == "cuda" else None
        self._monitor = Throughput(available, trainer.world_size, window_size=2)
        self._flops = FlopCount.of(pl_module.model)
        self._seen = dict.fromkeys(self._seen, 0)
        self._window = dict.fromkeys(self._window, 0)
        self._begun = time.perf_counter()
        self._update()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log where the step is one to log at."""
        sizes: BatchSizes = batch["sizes"]
        self._seen["batches"] += 1
        self._seen["examples"] += sizes.examples
        self._seen["tokens"] += sizes.tokens
        self._seen["flops"] += self._flops.of_batch(sizes)
        self._window["tokens"] += sizes.tokens
        self._window["slots"] += sizes.slots
        step = trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step == self._last or step % every:
            return
        self._last = step
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._update()
        pl_module.log_dict(self._values(trainer.world_size), batch_size=1)

    def _update(self) -> None:
        seen = self._seen
        self._monitor.update(
            time=time.perf_counter() - self._begun,
            batches=seen["batches"],
            samples=seen["examples"],
            lengths=seen["tokens"],
            flops=seen["flops"],
        )
        seen["flops"] = 0

    def _values(self, world_size: int) -> dict[str, float]:
        measured, window = self._monitor.compute(), self._window
        values = {
            "train/tokens_per_s": measured["device/items_per_sec"] * world_size,
            "train/padding_share": 1 - window["tokens"] / window["slots"],
            "train/tflops_per_s": measured["device/flops_per_sec"] / 1e12,
        }
        if "device/mfu" in measured:
            values["train/mfu"] = measured["device/mfu"]
        self._window = dict.fromkeys(window, 0)
        return values


class FlopCount:
    """Operations of a training step, from the weights that multiply a token of each kind.

    Args:
        frozen: weights that each token of the encoder's prompt meets, forward only.
        front: trained weights that each of these tokens' states meets on the way to the slm.
        prompt: trained weights that each token of the slm's prompt meets.
        target: trained weights that each target token meets, the head left out.
        head: weights of the language-model head, which target tokens alone meet.
    """

    def __init__(self, frozen: int, front: int, prompt: int, target: int, head: int) -> None:
        self.frozen, self.front, self.prompt, self.target, self.head = frozen, front, prompt, target, head

    @classmethod
    def of(cls, model: PreTrainedModel) -> "FlopCount":
        """Count the weights of a system."""
        slm = language_model_of(model)
        head = matmul_weights(slm.get_output_embeddings())
        body = matmul_weights(slm) - head
        frozen = front = 0
        if isinstance(model, LlmToSlm):
            frozen = 0 if model.encoder is None else matmul_weights(model.encoder)
            front = matmul_weights(model.projector) + matmul_weights(model.alignment) + matmul_weights(model.fusion)
        if not slm.config.is_encoder_decoder:
            return cls(frozen, front, body, body, head)
        encoder = matmul_weights(slm.get_encoder())
        return cls(frozen, front, encoder, body - encoder, head)

    def of_batch(self, sizes: BatchSizes) -> int:
        """Count a batch: 2 operations a weight and token forward, 4 backward."""
        forward = self.prompt * sizes.prompt + (self.target + self.head) * sizes.target
        forward += self.front * sizes.encoder_prompt
        return 2 * self.frozen * sizes.encoder_prompt + 6 * forward


def matmul_weights(module: nn.Module) -> int:
    """Count the weights that multiply: those of linear layers, tied ones too, but no embedding tables."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear | Conv1D))


def product_speed(device: torch.device, dtype: torch.dtype, size: int = 8192, runs: int = 10) -> float:
    """Measure the operations a second of a large matrix product on a CUDA device: the median of some runs."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 3)]
    for mark in marks:
        torch.mm(left, right)
        mark.record()
    torch.cuda.synchronize(device)
    milliseconds = [before.elapsed_time(after) for before, after in pairwise(marks[2:])]
    return 2 * size**3 / (statistics.median(milliseconds) / 1e3)
