"""One model over many devices: sharding (FSDP2), activation checkpointing, and what they ask of a training loop."""

import itertools
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from llmslm.errors import UserError
from llmslm.models.blocks import blocks
from llmslm.models.encoder import Encoder
from llmslm.models.modeling import LlmToSlm, language_model_of
from llmslm.models.trained import base_names, tied_names
from llmslm.resume import REST, aside_of, checksums, named, put, remove, seal
from llmslm.writing import is_disk_full

EncoderPlace = Literal["sharded", "replicated", "offloaded"]
_OUTSIDE_FORWARD = ("slm_inputs", "embed_tokens")
"""Methods beside forward that read weights."""
_RESHARDS = "frees_weights_after_forward"
"""Attribute of a sharded unit: torch does not tell what it was set to."""


def parallelize(
    model: PreTrainedModel,
    *,
    mesh: DeviceMesh | None = None,
    encoder: EncoderPlace = "sharded",
    reshard_after_forward: bool = True,
    compute_dtype: torch.dtype | None = None,
    activation_checkpointing: bool = False,
) -> None:
    """Prepare a model for its devices, in place: checkpointing, then sharding; compile its blocks afterwards.

    Every block of the language model is one unit, gathered when it is needed; embeddings, head, projector and fusion
    are the last unit, gathered as long as the model runs.

    Args:
        model: a language model or a composition, on any device.
        mesh: of one dimension: shard over all its ranks; of two: replicate over the first, shard over the second;
            None does not shard.
        encoder: the frozen encoder's weights are "sharded", "replicated" (whole on each rank: no gathers) or
            "offloaded" (sharded in the memory of the hosts, brought block by block).
        reshard_after_forward: free a block's weights after its forward and gather them again for its backward; False
            gathers once a step and needs memory for all of them. The encoder, which has no backward, always frees.
        compute_dtype: weights are gathered and multiplied in it; gradients are reduced in float32.
        activation_checkpointing: keep the inputs of the trained blocks alone and run them again in the backward.

    Raises:
        UserError: if the model does not support activation checkpointing, or a quantised encoder is to be sharded.
        RuntimeError: if a trained weight is left out of the sharding: ranks would diverge in silence.
    """
    if isinstance(model, FSDPModule):
        return
    frozen = model.encoder if isinstance(model, LlmToSlm) else None
    fixed = [] if frozen is None else blocks(frozen)
    trained = [block for block in blocks(model) if all(block is not one for one in fixed)]
    if activation_checkpointing:
        checkpoint_activations(language_model_of(model))
    if mesh is not None:
        reduce_dtype = None if compute_dtype is None else torch.float32
        policy: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype),
        }
        ignored = _shard_encoder(frozen, encoder, policy) if frozen is not None else set()
        for unit in (*trained, model):
            reshards = reshard_after_forward and unit is not model
            fully_shard(unit, reshard_after_forward=reshards, ignored_params=ignored, **policy)
            setattr(unit, _RESHARDS, reshards)
        for module, name in itertools.product((model, frozen), _OUTSIDE_FORWARD):
            if module is not None and hasattr(module, name):
                register_fsdp_forward_method(module, name)
        _check_sharded(model)


def checkpoint_activations(model: PreTrainedModel, **options: Any) -> None:
    """Let the blocks of a language model keep their inputs alone and run again in the backward.

    Args:
        model: any of transformers' that supports it.
        options: for `torch.utils.checkpoint.checkpoint`.

    Raises:
        UserError: if the model does not support it.
    """
    # transformers renamed it after 5.17
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False} | options)
    except ValueError as error:
        raise UserError(f"{error} (trainer.strategy.init_args.activation_checkpointing)") from error


def make_mesh(device_type: str, world_size: int, shard_size: int | None = None) -> DeviceMesh:
    """Lay all ranks out in one line, or in copies of the weights that `shard_size` neighbours share.

    Raises:
        UserError: if the world cannot be divided so.
    """
    if shard_size is None or shard_size == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    if world_size % shard_size:
        raise UserError(
            f"trainer.strategy.init_args.shard_size is {shard_size}, which does not divide the {world_size} devices of "
            "this run"
        )
    shape = (world_size // shard_size, shard_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the trained weights whole on every rank, so that each may generate at its own pace without the others.

    The frozen encoder stays as it is: it reads a batch in one pass, which all ranks must do equally often.
    """
    encoder = getattr(model, "encoder", None) if isinstance(model, LlmToSlm) else None
    units = [unit for unit in _units(model, without=encoder) if isinstance(unit, FSDPModule)]
    try:
        for unit in units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(getattr(unit, _RESHARDS), recurse=False)
            unit.reshard()


def token_share(tokens: int, device: torch.device) -> Tensor | float:
    """Weigh a rank's mean loss by its target tokens: averaged over ranks it is then the mean over all tokens."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 1.0
    everywhere = torch.full((), float(tokens), device=device)
    dist.all_reduce(everywhere)
    return tokens * dist.get_world_size() / everywhere


class Fsdp(ModelParallelStrategy):
    """Shards the trained weights, their gradients and the optimizer's state over all devices with FSDP2.

    The Trainer's precision is the policy: with bf16-mixed, weights and optimizer stay in float32, are gathered and
    multiplied in bfloat16, and gradients are reduced in float32. A checkpoint is a folder with one file a rank; it
    resumes on any number of devices, on one without this strategy too.

    Args:
        encoder: where the frozen encoder's weights lie; see `parallelize`.
        reshard_after_forward: free a block's weights between its forward and its backward.
        shard_size: devices that share one copy of the weights, for example those of a node; copies are kept in step by
            reducing gradients between them (hybrid sharding). None shards over all devices.
        activation_checkpointing: run the trained blocks again in the backward instead of keeping their activations.
    """

    def __init__(
        self,
        encoder: EncoderPlace = "sharded",
        reshard_after_forward: bool = True,
        shard_size: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1)  # not used: the mesh is made here
        self.shard_size = shard_size
        self._encoder = encoder
        self._options = {
            "encoder": encoder,
            "reshard_after_forward": reshard_after_forward,
            "activation_checkpointing": activation_checkpointing,
        }

    def setup_environment(self) -> None:
        """Start the processes' group, lay out the mesh, and give all ranks the same random weights."""
        self._setup_distributed()
        self._device_mesh = make_mesh(self.root_device.type, self.world_size, self.shard_size)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh
        if "PL_GLOBAL_SEED" not in os.environ:
            torch.manual_seed(self.broadcast(torch.initial_seed() % 2**63))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Deal data out to every rank."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def parallelize(self, model: PreTrainedModel) -> None:
        """Shard a model that was built on this rank; calling it again changes nothing."""
        precision = str(self.precision_plugin.precision)
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        parallelize(model, mesh=self._device_mesh, compute_dtype=dtype, **self._options)  # type: ignore[arg-type]

    def model_to_device(self) -> None:
        """Move what sharding has not placed; an offloaded encoder stays with the host."""
        composed = getattr(self.lightning_module, "model", None)
        if self._encoder != "offloaded" or not isinstance(composed, LlmToSlm):
            super().model_to_device()
            return
        encoder, composed.encoder = composed.encoder, None
        super().model_to_device()
        composed.encoder = encoder

    @contextmanager
    def block_backward_sync(self) -> Generator:
        """Keep gradients on their rank until the last micro-batch of a step."""
        roots = [m for m in self._root().modules() if isinstance(m, FSDPModule)]
        for root in roots:
            root.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for root in roots:
                root.set_requires_gradient_sync(True, recurse=False)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this rank's part of what is trained."""
        root = self._root()
        state = get_model_state_dict(root, options=StateDictOptions(cpu_offload=True, ignore_frozen_params=True))
        frozen = [f"{name}." for name, module in root.named_modules() if isinstance(module, Encoder)]
        left_out = base_names(root) | tied_names(root).keys()  # torch leaves the other names of tied weights in
        return {
            name: value for name, value in state.items() if not name.startswith(tuple(frozen)) and name not in left_out
        }

    def full_state_dict(self) -> dict[str, Tensor]:
        """Gather what is trained on the host of rank 0, by name in the LightningModule; empty on the others."""
        state: dict[str, Tensor] = {}
        for name, value in self.lightning_module_state_dict().items():
            whole: Tensor = value.to(self.root_device).full_tensor() if isinstance(value, DTensor) else value  # type: ignore[attr-defined]
            if self.is_global_zero:
                state[name] = whole.cpu()
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return this rank's part of an optimizer's state, by parameter name."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        return get_optimizer_state_dict(self._root(), optimizer, options=StateDictOptions(cpu_offload=True))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder of one file a rank aside, seal it, rename it: under its name it is whole.

        Raises:
            UserError: on every rank, if the disk is full.
        """
        path = Path(self.broadcast(str(filepath)))
        aside = aside_of(path)
        if self.is_global_zero:
            remove(aside)
            aside.mkdir(parents=True)
        self.barrier()
        tensors = {"state_dict": checkpoint.pop("state_dict")}
        tensors |= {f"optimizer_{i}": one for i, one in enumerate(checkpoint.pop("optimizer_states", []))}
        self._together(path, lambda: state_dict_saver.save(tensors, storage_writer=FileSystemWriter(aside)))
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, checksums(aside, f"__{self.global_rank}_*"))
        self._together(path, lambda: self._close(checkpoint, aside, path, parts))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read this rank's part of a folder, or of the file that a run on one device wrote."""
        path = Path(self.broadcast(str(checkpoint_path)))
        assert self.lightning_module is not None
        is_folder = path.is_dir()
        rest = torch.load(path / REST if is_folder else path, map_location="cpu", mmap=not is_folder, weights_only=True)
        # It refuses a checkpoint of another composition, before shapes that do not fit do.
        self.lightning_module.on_load_checkpoint(dict(rest) | {"state_dict": {}})
        self._read_folder(path) if is_folder else self._read_file(rest)
        return {"state_dict": {}} | {key: value for key, value in rest.items() if key != "state_dict"}

    def _read_folder(self, path: Path) -> None:
        model = {"state_dict": self.lightning_module_state_dict()}
        state_dict_loader.load(model, storage_reader=FileSystemReader(path))
        set_model_state_dict(self._root(), model["state_dict"], options=StateDictOptions(strict=False))
        for number, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{number}": self.optimizer_state(optimizer)}
            state_dict_loader.load(state, storage_reader=FileSystemReader(path))
            set_optimizer_state_dict(self._root(), optimizer, state[f"optimizer_{number}"])

    def _read_file(self, checkpoint: Mapping[str, Any]) -> None:
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self._root(), dict(checkpoint["state_dict"]), options=options)
        names = {id(parameter): name for name, parameter in self._root().named_parameters()}
        for number, optimizer in enumerate(self.optimizers):
            order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            state = named(checkpoint["optimizer_states"][number], order)
            set_optimizer_state_dict(self._root(), optimizer, state, options=options)

    def _close(self, rest: dict[str, Any], aside: Path, path: Path, parts: Sequence[dict[str, list[int]]]) -> None:
        if self.is_global_zero:
            torch.save(rest, aside / REST)
            files = {name: value for part in parts for name, value in part.items()}
            seal(aside, files | checksums(aside, REST) | checksums(aside, ".metadata"))
            put(aside, path)

    def _together(self, path: Path, write: Any) -> None:
        """Write on all ranks; where one fails, all say so instead of waiting for it."""
        error: BaseException | None = None
        try:
            write()
        except (Exception, CheckpointException) as caught:
            error = caught
        failures: list[Any] = [None] * self.world_size
        full = error is not None and is_disk_full(error)
        dist.all_gather_object(failures, None if error is None else (full, str(error)))
        found = [failure for failure in failures if failure is not None]
        if not found:
            return
        if self.is_global_zero:
            remove(aside_of(path))
        if any(full for full, _ in found):
            raise UserError(
                f"the disk is full: the checkpoint {path} was not written; free some space and go on with "
                "--ckpt_path last"
            ) from error
        raise RuntimeError(f"the checkpoint {path} was not written: {found[0][1]}") from error

    def _root(self) -> nn.Module:
        assert self.model is not None
        return self.model


def _shard_encoder(encoder: Encoder, place: EncoderPlace, policy: dict[str, Any]) -> set[nn.Parameter]:
    """Shard the frozen encoder; return the weights that the units around it must leave alone."""
    if place == "replicated":
        return set(encoder.parameters())
    if encoder.quantization is not None and any(True for _ in encoder.parameters()):  # stored states have none
        raise UserError(
            f"a quantised encoder cannot be {place}: its {encoder.quantization} weights are not cut into parts; set "
            "trainer.strategy.init_args.encoder to replicated, or leave model.encoder.quantization out"
        )
    offload = CPUOffloadPolicy(pin_memory=policy["mesh"].device_type != "cpu") if place == "offloaded" else None
    for unit in [*blocks(encoder), encoder]:
        fully_shard(unit, reshard_after_forward=True, offload_policy=offload or OffloadPolicy(), **policy)
    return set()


def _check_sharded(model: nn.Module) -> None:
    left_out = [n for n, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if left_out:
        raise RuntimeError(f"these trained weights are not sharded and would differ between ranks: {left_out[:5]}")


def _units(model: nn.Module, without: nn.Module | None) -> Iterator[nn.Module]:
    yield model
    for child in model.children():
        if child is not without:
            yield from _units(child, without)
