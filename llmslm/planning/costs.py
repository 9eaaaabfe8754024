"""What a computation would cost on a device, found without one: its operations run on tensors that have no memory.

Every operation is held against the roofline (arithmetic, bytes moved), and every storage is counted from its first to
its last use.
"""

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Device:
    """What a GPU can do, as far as time and memory of training depend on it."""

    name: str
    memory_bytes: float
    matmul_flops: float
    """Operations a second of large bfloat16 products, as measured rather than as printed."""
    bytes_per_s: float
    """Of its memory."""
    link_bytes_per_s: float
    """To the other GPUs of its node, in one direction."""
    network_bytes_per_s: float
    """To other nodes, its share."""
    launch_s: float = 16e-6
    """Of one operation, by the host: 77 ms for the 4,826 of a step of two rows on an H200's host. Others differ."""


DEVICES = {
    "h200": Device("h200", 140e9, 790e12, 4.2e12, 350e9, 45e9),
    "h100": Device("h100", 80e9, 750e12, 2.9e12, 350e9, 45e9),
    "a100": Device("a100", 80e9, 270e12, 1.8e12, 220e9, 22e9),
    "l40s": Device("l40s", 46e9, 300e12, 0.78e12, 24e9, 12e9),
}


_MIB = 2**20


def allocated(size: float) -> float:
    """Return the bytes that PyTorch's CUDA allocator counts for a tensor of so many.

    From 10 MiB on a tensor has a block of whole 2 MiB, of which what is left is cut off only if it is more than 1 MiB.
    """
    block = math.ceil(size / (2 * _MIB)) * 2 * _MIB
    return block if size >= 10 * _MIB and block - size <= _MIB else size


@dataclass
class Cost:
    """Of one pass."""

    seconds: float = 0.0
    """Of the device, each operation at the roofline."""
    product_seconds: float = 0.0
    """Of matrix products and attention alone: what is left if all else is fused into them."""
    flops: float = 0.0
    operations: int = 0
    live_bytes: float = 0
    """Storages that exist now."""
    peak_bytes: float = 0
    """The most that existed at once."""
    forward_bytes: float = 0
    """The most that existed at once before the backward."""


class Counter(TorchDispatchMode):
    """Counts the operations that run inside it; parameters and what was made before it are not counted as memory."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.cost = Cost()
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it costs."""
        result = func(*args, **(kwargs or {}))
        inputs = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        outputs = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        given = {_storage(one) for one in inputs}
        made = [one for one in outputs if _storage(one) not in given]
        for one in made:
            self._count(one)
        if made or func._schema.is_mutable:
            self._add(func, args, kwargs or {}, result, sum(map(_bytes, inputs)) + sum(map(_bytes, outputs)))
        return result

    def _add(self, func: Any, args: Any, kwargs: Any, result: Any, moved: int) -> None:
        packet = func._overloadpacket
        flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
        half = any(isinstance(a, Tensor) and a.dtype in (torch.bfloat16, torch.float16) for a in tree_leaves(args))
        speed = self.device.matmul_flops * (1 if half else 1 / 16)
        self.cost.flops += flops
        self.cost.operations += 1
        roofline = max(flops / speed, moved / self.device.bytes_per_s)
        self.cost.seconds += roofline
        self.cost.product_seconds += roofline if flops else 0.0

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, allocated(storage.nbytes())
        if key in self._known:
            return
        self._known.add(key)
        self.cost.live_bytes += size
        self.cost.peak_bytes = max(self.cost.peak_bytes, self.cost.live_bytes)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: float) -> None:
        self._known.discard(key)
        self.cost.live_bytes -= size


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
