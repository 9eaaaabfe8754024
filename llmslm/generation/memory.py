"""What a call of the engine needs at its peak, predicted before it runs: weights, caches, the prompt's pass, workspace.

The prompt's pass, and that of a frozen encoder before it, are walked with tensors that have shapes and no data; their
bytes are counted as they come and go.
"""

import copy
import sys
import weakref
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from llmslm.errors import UserError
from llmslm.generation.plan import Decoder
from llmslm.generation.prefill import causal_mask, prompt_positions
from llmslm.generation.products import row_bucket
from llmslm.generation.state import CacheShape

_CUBLAS_WORKSPACE = 2 * 33 * 2**20  # of PyTorch's cuBLAS on Hopper: one of the stream, one of the captured graphs
_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
_FEW_ROWS = 8  # of a step, that no model leaves to cuBLAS
_SURE = 0.25  # of the free memory: a rough bound below it needs no exact prediction


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak."""

    weights: int
    """Of the model, and the engine's copies of them."""
    state: int
    """Caches and all that is kept from token to token."""
    pass_: int
    """Of the prompt's pass, or that of a frozen encoder before it, at its peak, beside the two."""
    workspace: int
    """Of libraries."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.state + self.pass_ + self.workspace

    @property
    def added(self) -> int:
        """What a call adds to the weights."""
        return self.total - self.weights


@dataclass(frozen=True)
class Call:
    """Sizes of a call: rows, prompt tokens, positions of both caches; whether a penalty or embeddings are given."""

    batch: int
    length: int
    capacity: int
    encoder_capacity: int
    penalised: bool = False
    embedded: bool = False


@dataclass(frozen=True)
class Front:
    """What runs before a language model starts: a frozen encoder, a projector and a fusion, on a batch."""

    module: nn.Module
    method: str
    """Of the module, called with the batch by keyword."""
    batch: Mapping[str, Tensor]
    """Each (rows, tokens, ...)."""
    stack: Decoder | None = None
    """Of the frozen encoder, where fused kernels run it: it has copies of weights."""

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return int(next(iter(self.batch.values())).shape[0])

    @property
    def tokens(self) -> int:
        """Of a row, on all sides together: no fewer than come of it where the projector keeps positions."""
        return sum(value.shape[1] for value in self.batch.values() if value.dim() == 2)

    @property
    def is_full(self) -> bool:
        """Whether no row is padded; models then make no mask."""
        return all(bool(value.all()) for name, value in self.batch.items() if "mask" in name)


@dataclass(frozen=True)
class Walked:
    """What a `Front` needs, in bytes."""

    peak: int
    """At its peak."""
    kept: int
    """Of what it leaves behind."""
    length: int
    """Positions that the language model starts from."""
    multiplies: bool
    """Whether it has products by cuBLAS."""


class _FusedAttention(TorchFunctionMode):
    """Attention as devices run it, without a matrix of scores; tensors without data would be given the plain form."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace scaled_dot_product_attention by its result's shape."""
        if func is torch.nn.functional.scaled_dot_product_attention:
            values = args[2] if len(args) > 2 else (kwargs or {})["value"]
            query = args[0] if args else (kwargs or {})["query"]
            return query.new_empty(*query.shape[:-1], values.shape[-1])
        return func(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is entered: `now` and at their `peak`; `multiplies`: whether by cuBLAS.

    Args:
        answer: to whoever asks a tensor without data for its value, such as whether a mask is all ones.
    """

    def __init__(self, answer: bool = False) -> None:
        super().__init__()
        self._answer = answer
        self.now = self.peak = 0
        self.multiplies = False
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self._answer
        self.multiplies |= getattr(func, "overloadpacket", None) in _PRODUCTS
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), known)
        return result

    def _count(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in known:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def weight_bytes(model: nn.Module, *decoders: Decoder) -> int:
    """Bytes of the model's weights and of the copies that decoders of its parts have."""
    copies = []
    for decoder in decoders:
        linears = [linear for sublayer in decoder.sublayers for linear in (sublayer.into, sublayer.out)]
        linears += [decoder.head, *(cross.key_value for cross in decoder.crosses)]
        copies += [linear.weight for linear in linears]
    tensors = [*model.parameters(), *model.buffers(), *copies]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def state_bytes(shape: CacheShape, call: Call, element_size: int) -> int:
    """Bytes of a `DecodeState` on its device; its words, on CUDA, are in pinned memory of the host."""
    caches = shape.bytes(call.batch, call.capacity, call.encoder_capacity, element_size)
    ids_and_masks = call.batch * (9 * call.capacity + call.encoder_capacity)
    return caches + ids_and_masks + (call.batch * shape.vocabulary if call.penalised else 0)


def step_bytes(decoder: Decoder, call: Call) -> int:
    """Bytes that a step keeps or makes for each token: its inputs and outputs between products, and the logits."""
    width = decoder.embedding.shape[1]
    widest = max(max(*sublayer.into.weight.shape, *sublayer.out.weight.shape) for sublayer in decoder.sublayers)
    return 4 * call.batch * (2 * width + 2 * widest + decoder.shape.vocabulary)


def predict(model: PreTrainedModel, decoder: Decoder, call: Call) -> Memory:
    """Predict the peak of a call."""
    element_size = decoder.embedding.element_size()
    state = state_bytes(decoder.shape, call, element_size) + step_bytes(decoder, call)
    walked = _walked_pass(model, decoder, call)
    pass_ = max(walked.peak, 4 * call.batch * decoder.shape.vocabulary)
    # Steps of few rows have kernels of their own, and short prompts may.
    by_cublas = walked.multiplies or call.batch > _FEW_ROWS
    return Memory(weight_bytes(model, decoder), state, pass_, _workspace(model.device, by_cublas))


def _workspace(device: torch.device, by_cublas: bool) -> int:
    return _CUBLAS_WORKSPACE if by_cublas and device.type == "cuda" else 0


def require(model: PreTrainedModel, decoder: Decoder, call: Call, available: int | None = None) -> None:
    """Refuse a call that cannot fit.

    Args:
        model: whose weights are there already.
        decoder: of it.
        call: its sizes.
        available: bytes that are free; asked of the device if not given.

    Raises:
        UserError: with the batch that would fit.
    """
    free = available_bytes(model.device) if available is None else available
    if free is not None and _rough_bound(model, decoder, call) >= _SURE * free:
        _refuse_more(predict(model, decoder, call).added, free, call, model.device)


def require_with(
    front: Front,
    call_of: Callable[[int], Call],
    model: PreTrainedModel,
    decoder: Decoder,
    known: MutableMapping[Hashable, tuple[int, Call]],
    available: int | None = None,
) -> None:
    """Refuse a call that cannot fit, before what comes in front of the language model has run.

    Args:
        front: what comes first.
        call_of: the sizes of the call, from the positions that the language model starts from.
        model: the language model.
        decoder: of it.
        known: what calls of the same sizes were found to need, roughly or exactly; what is found here is added.
        available: bytes that are free; asked of the device if not given.

    Raises:
        UserError: with the batch that would fit.
    """
    free = available_bytes(model.device) if available is None else available
    if free is None:
        return
    most = call_of(front.tokens)
    key = (most, *(value.shape for value in front.batch.values()))
    if key not in known:
        known[key] = front_bound(front) + _rough_bound(model, decoder, most), most
    if known[key][0] < _SURE * free:
        return
    exact = (front.is_full, key)
    if exact not in known:
        memory, call = predict_with(front, call_of, model, decoder)
        known[exact] = memory.added, call
    _refuse_more(known[exact][0], free, known[exact][1], model.device)


def predict_with(
    front: Front, call_of: Callable[[int], Call], model: PreTrainedModel, decoder: Decoder
) -> tuple[Memory, Call]:
    """Predict the peak of a call and of what comes in front of it, whichever is higher; and the sizes of the call."""
    walked = walk(front)
    call = call_of(walked.length)
    later = predict(model, decoder, call)
    later = replace(later, workspace=max(later.workspace, _workspace(model.device, walked.multiplies)))
    pass_ = max(walked.peak - later.state - later.workspace, walked.kept + later.pass_)
    decoders = (decoder,) if front.stack is None else (decoder, front.stack)
    return replace(later, weights=weight_bytes(front.module, *decoders), pass_=pass_), call


def _refuse_more(added: int, free: int, call: Call, device: torch.device) -> None:
    if added <= free:
        return
    fits = int(call.batch * free / added)
    advice = f"a batch of {fits} would fit" if fits else "not even one row would fit: shorten the prompt or the output"
    raise UserError(
        f"a batch of {call.batch} with {call.length} prompt tokens and {call.capacity} positions needs "
        f"{added / 2**30:.2f} GiB beside the weights; {free / 2**30:.2f} GiB are free on {device}; {advice}"
    )


def _rough_bound(model: PreTrainedModel, decoder: Decoder, call: Call) -> int:
    """More than a call can need."""
    heads = max(decoder.shape.kv_heads, decoder.shape.cross_heads, getattr(model.config, "num_attention_heads", 1))
    widest = max(max(sublayer.into.weight.shape) for sublayer in decoder.sublayers)
    row = call.length * (12 * widest + 6 * heads * call.length) + 4 * decoder.shape.vocabulary
    caches = state_bytes(decoder.shape, call, decoder.embedding.element_size())
    return 2 * caches + 4 * call.batch * row + _CUBLAS_WORKSPACE


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None if that cannot be told."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    machine, container = int(lines["MemAvailable"].split()[0]) * 1024, _left_in_container(Path("/sys/fs/cgroup"))
    return machine if container is None else min(machine, container)


def _left_in_container(cgroup: Path) -> int | None:
    """Bytes that a container, or a job of a cluster, may still take before it is killed; None without a limit."""
    limit = cgroup / "memory.max"
    if not limit.exists() or limit.read_text().strip() == "max":
        return None
    used = int((cgroup / "memory.current").read_text())
    kinds = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return int(limit.read_text()) - used + int(kinds["inactive_file"])  # files read once are given up first


@torch.inference_mode(False)  # in which operations would be seen before they are taken apart
@torch.no_grad()
def _walked_pass(model: Any, decoder: Decoder, call: Call) -> LiveBytes:
    """Walk the prompt's pass on the meta device and count."""
    if model.device.type == "cuda" and decoder.reads_prompts and not model.config.is_encoder_decoder:
        return _walked_fused_pass(decoder, call)
    module = twin(model.get_encoder() if model.config.is_encoder_decoder else model)
    dtype = decoder.embedding.dtype
    size = (call.batch, call.length)
    mask = torch.ones(size, dtype=torch.long, device="meta")
    width = decoder.embedding.shape[1]
    ids = torch.zeros(size, dtype=torch.long, device="meta")
    prompt = torch.zeros(*size, width, dtype=dtype, device="meta") if call.embedded else ids
    with LiveBytes() as live, _FusedAttention():
        if not model.config.is_encoder_decoder:
            inputs = {"inputs_embeds" if call.embedded else "input_ids": prompt}
            inputs |= {"attention_mask": causal_mask(mask.bool(), dtype), "position_ids": mask.cumsum(dim=1)}
            module(**inputs, use_cache=True, logits_to_keep=1)
        else:
            if not call.embedded:
                seen = torch.zeros(call.batch, 1, *2 * size[1:], device="meta")
                prompt = module(input_ids=ids, attention_mask=seen).last_hidden_state
            rows = call.batch * call.length
            if model.device.type == "cpu":  # where products take a padded copy
                rows = row_bucket(rows)
                prompt = torch.empty(rows, width, dtype=dtype, device="meta")
            for cross in decoder.crosses:
                torch.empty(rows, cross.key_value.weight.shape[0], dtype=dtype, device="meta")
    return live


def _walked_fused_pass(decoder: Decoder, call: Call) -> LiveBytes:
    """The same of the pass by fused kernels."""
    from llmslm.generation.fused_prefill import FusedDecoder, Prompts

    shape, width = decoder.shape, decoder.embedding.shape[1]
    mask = torch.ones(call.batch, call.length, dtype=torch.long, device="meta")
    wide = (shape.layers, 2, call.batch, shape.kv_heads, call.capacity, shape.head_dim)
    bare = _without_data(decoder)
    prompt = bare.embedding.new_empty(*mask.shape, width) if call.embedded else mask
    cache = bare.embedding.new_empty(wide)
    with LiveBytes() as live, _FusedAttention():
        FusedDecoder(bare).last_logits(prompt, Prompts(mask, prompt_positions(mask)), cache)
    return live


def _without_data(given: Any) -> Any:
    """A plan, or a part of one, whose tensors have shapes alone."""
    if isinstance(given, Tensor):
        return torch.empty_like(given, device="meta")
    if isinstance(given, list):
        return [_without_data(part) for part in given]
    if not is_dataclass(given) or isinstance(given, type):
        return given
    return replace(given, **{field.name: _without_data(getattr(given, field.name)) for field in fields(given)})


def twin(module: nn.Module) -> Any:
    """Copy a module with weights that have shapes and no data; other threads may go on using the original."""
    tensors = [*module.parameters(), *module.buffers()]
    copies: dict[int, Any] = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
    for parameter in module.parameters():
        copies[id(parameter)] = nn.Parameter(copies[id(parameter)], requires_grad=False)
    return copy.deepcopy(module, copies)


@torch.inference_mode(False)
@torch.no_grad()
def walk(front: Front) -> Walked:
    """Walk a front on the meta device and count."""
    module = twin(front.module)  # may keep some of what it makes
    batch = {name: torch.empty_like(value, device="meta") for name, value in front.batch.items()}
    with LiveBytes(front.is_full) as live, _FusedAttention():
        output = getattr(module, front.method)(**batch)
    shapes = [value.shape for value in tree_iter(output) if isinstance(value, Tensor)]
    return Walked(live.peak, live.now, int(shapes[0][1]), live.multiplies)


def front_bound(front: Front) -> int:
    """More than a front can need; beyond all bounds where its projector makes as many states as it likes."""
    if not getattr(getattr(front.module, "projector", None), "keeps_positions", True):
        return sys.maxsize
    modules = list(front.module.modules())
    tables = {module.num_embeddings for module in modules if isinstance(module, nn.Embedding)}
    widest = max(size for p in front.module.parameters() if p.dim() == 2 for size in p.shape if size not in tables)
    configs = [module.config for module in modules if hasattr(module, "config")]
    heads = max((getattr(config, "num_attention_heads", 1) for config in configs), default=1)
    layers = max((len(getattr(module, "depths", ())) for module in modules), default=0)
    return 4 * front.rows * front.tokens * ((12 + 2 * layers) * widest + 6 * heads * front.tokens)
