"""What a composition does before its slm decodes; small batches on CUDA are launched as one graph.

The frozen encoder, the projector and the fusion are hundreds of small kernels: launched one by one they can take longer
than the slm takes for its answer.
"""

import copy
import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmslm.generation.dispatch import encoder_pass_for, projector_pass_for
from llmslm.generation.families import UnreadableModelError, sliding_window
from llmslm.generation.graphs import MOST_TOKENS, Captured
from llmslm.generation.plan import Decoder
from llmslm.generation.self_check import encoded_difference, projected_difference, reason_against, tolerance_of
from llmslm.generation.state import prompt_bucket
from llmslm.models.encoder import Encoder
from llmslm.models.modeling import LlmToSlm

_READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}
_SIDES = ("input_ids", "prompt_ids", "prompt_spans")


class PromptPass:
    """Encodes, projects and fuses: `LlmToSlm.slm_inputs`, whatever runs it.

    A graph is trusted once its result was held against the model's own on a first batch. The encoder's and the
    projector's passes by fused kernels, without which the graph has their own forward, are held against that on random
    prompts.

    Args:
        model: the composition, in eval mode on its device.
    """

    def __init__(self, model: LlmToSlm) -> None:
        self.model = model
        self._fused: dict[str, Any] = {}
        if model.encoder is not None and not model.fusion.step_parameters():
            encoder = encoder_pass_for(model.encoder, MOST_TOKENS)
            projector = projector_pass_for(model.projector, MOST_TOKENS)
            self._fused = {part: run for part, run in (("encoder", encoder), ("projector", projector)) if run}
        self._trusted: bool | None = None
        self._window = _sight(model)
        # Looked up once: configs and modules take microseconds for each of their attributes.
        self._weight = next(model.parameters())  # is where the model is, wherever that is moved
        self._encoder_decoder: bool = model.config.is_encoder_decoder
        self._suits = not model.config.encoder_quantization and not model.fusion.step_parameters()
        own = getattr(model.slm.config, "max_position_embeddings", None)
        self._limits = {"prompt": None if model.encoder is None else model.encoder.max_positions, "own": own}
        self.forget()

    def forget(self) -> None:
        """Give up the graphs that are kept for further calls."""
        pool = torch.cuda.graph_pool_handle() if self.model.device.type == "cuda" else None
        self._graphs = Captured(self._of_padded, self.model.device, pool=pool)

    def twin(self) -> Self:
        """Return one with the same copies of weights and graphs of its own, which may hold another forward.

        The projector runs by its own, hooks included.
        """
        twin = copy.copy(self)
        twin._fused = {part: run for part, run in self._fused.items() if part != "projector"}
        twin._trusted = None
        twin.forget()
        return twin

    @property
    def stack(self) -> Decoder | None:
        """What the encoder's fused pass computes, with copies of weights; None where its own forward runs."""
        return self._fused["encoder"].decoder if "encoder" in self._fused else None

    def lengths(self, rows: int, longest: Mapping[str, int]) -> Mapping[str, int]:
        """Return how long each side of a batch is to be: one of a few lengths if it is to run as a graph.

        Args:
            rows: of the batch.
            longest: tokens of the longest row of input_ids, prompt_ids and, where there are any, prompt_spans.
        """
        if not self._pays(rows, longest):
            return longest
        return {name: self._length(name, length) for name, length in longest.items()}

    def is_captured(self, batch: dict[str, Tensor]) -> bool:
        """Say whether there is a graph for a batch as `__call__` takes it, which then needs no further memory."""
        if not self._trusted or not self._pays(*_sizes(batch)):
            return False
        return self._graphs.knows(*(batch[name] for name in sorted(batch)))

    @torch.inference_mode()
    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Return what the bare slm takes for its prefill; valid until the next call, which `System`'s lock holds back.

        Args:
            batch: of the codec, of these `lengths`; on any device, since a graph copies it.
        """
        if not self._pays(*_sizes(batch)):
            return self._own(batch)
        if self._trusted is None:
            self._trusted = self._is_to_be_trusted(batch)
        if not self._trusted:
            return self._own(batch)
        try:
            result: dict[str, Any] = self._graphs(*(batch[name] for name in sorted(batch)))
        except RuntimeError as error:  # some operation of this encoder cannot be captured
            warnings.warn(f"the encoder runs without a CUDA graph, which is slower: {error}", stacklevel=2)
            self._trusted = False
            return self._own(batch)
        return result

    def _own(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        inputs: dict[str, Any] = self.model.slm_inputs(**self._there(batch))
        return inputs

    def _there(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.model.device) for name, value in batch.items()}

    @torch.inference_mode()
    def agrees(self, batch: dict[str, Tensor]) -> bool:
        """Say whether a graph can run this, and gives what the model does."""
        return self._error(batch) <= tolerance_of(self.model.slm.dtype)

    def _is_to_be_trusted(self, batch: dict[str, Tensor]) -> bool:
        """Hold fused passes against the parts' own, then a graph's result against the model's."""
        model, tolerance = self.model, tolerance_of(self.model.slm.dtype)
        measures = {
            "encoder": lambda run: encoded_difference(cast(Encoder, model.encoder), run),
            "projector": lambda run: projected_difference(model.projector, run, model.slm.dtype),
        }
        for part, run in list(self._fused.items()):
            if reason := reason_against(functools.partial(measures[part], run), tolerance, "states"):
                del self._fused[part]
                warnings.warn(f"the {part} runs by its own forward, which is slower: {reason}", stacklevel=3)
        reason = reason_against(lambda: self._error(batch), tolerance, "states")
        if reason is None or not self._fused:
            return reason is None
        parts, self._fused = " and the ".join(self._fused), {}
        if not self.agrees(batch):  # with or without them
            return False
        warnings.warn(f"the kernels of the {parts} are left out, which is slower: {reason}", stacklevel=3)
        return True

    def _error(self, batch: dict[str, Tensor]) -> float:
        """By how much a graph is off, in units of what the model gives; beyond all bounds if no graph can run this."""
        batch = self._there(batch)
        with HostReads() as reads:
            ours = self._of_padded(*(batch[name] for name in sorted(batch)))
        own = self.model.slm_inputs(**batch)
        states, expected = (_attended(result) for result in (ours, own))
        if reads.found or states.shape != expected.shape:
            return math.inf
        return float((states - expected).norm() / expected.norm().clamp(min=1e-9))

    def _pays(self, rows: int, lengths: Mapping[str, int]) -> bool:
        if not self._suits or self._weight.device.type != "cuda":
            return False
        if self._window is not None and max(lengths.values()) > self._window:
            return False
        return rows * (lengths["input_ids"] + lengths["prompt_ids"]) <= MOST_TOKENS

    def _length(self, name: str, length: int) -> int:
        """Pad to a bucket, but no further than there are positions."""
        limit = self._limits["prompt" if name in ("prompt_ids", "prompt_attention_mask") else "own"]
        bucket = prompt_bucket(length) if length > 1 else length  # one start token is always one
        return bucket if limit is None else max(length, min(bucket, limit))

    def _of_padded(self, *values: Tensor) -> dict[str, Any]:
        names = ["attention_mask", "input_ids", "prompt_attention_mask", "prompt_ids", "prompt_spans"]
        batch = dict(zip(names, values, strict=False))
        encoder, projector = self._fused.get("encoder"), self._fused.get("projector")
        if encoder is not None:
            batch["hidden_states"] = encoder(batch["prompt_ids"], batch["prompt_attention_mask"])
        fused = encoder is not None and projector is not None
        if fused and not self._encoder_decoder and not self.model.alignment.needs_token_embeds:
            documents = None  # nobody reads them
        else:
            documents = batch["prompt_attention_mask"] - 1
        return self.model.slm_inputs(**batch, prompt_documents=documents, projector=projector)


def _sizes(batch: dict[str, Tensor]) -> tuple[int, dict[str, int]]:
    """Rows of a batch, and the tokens of each of its sides; masks are as long as what they are of."""
    lengths = {name: batch[name].shape[1] for name in _SIDES if name in batch}
    return len(batch["input_ids"]), lengths


def _sight(model: LlmToSlm) -> int | None:
    """How many tokens all layers of the encoder look back, in which the one mask for all layers is right."""
    try:
        return None if model.encoder is None else sliding_window(model.encoder.config)
    except UnreadableModelError:
        return 0


class HostReads(TorchDispatchMode):
    """Finds out whether the host asks tensors for their values, which a graph cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        self.found |= func.overloadpacket.__name__ in _READS
        return func(*args, **(kwargs or {}))


def _attended(result: dict[str, Any]) -> Tensor:
    """Return (attended positions of all rows, width) of what the slm reads, in order."""
    states: Tensor = result["inputs_embeds"] if "inputs_embeds" in result else result["encoder_outputs"][0]
    return states[result["attention_mask"].bool()].double()
