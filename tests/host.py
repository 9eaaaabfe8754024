"""Shows on a CPU what a CUDA graph's capture would refuse: work for which the host waits for the device.

A capture refuses operations whose result the host must know (`.item()`, `if tensor:`, `nonzero`, indexing by booleans)
and tensors that are made of the host's numbers, which are copied to the device. On a CPU all of these just run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmslm import graphed

_aten = torch.ops.aten
_BY_INDEX = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index)
_READ = {"cpu", "numpy", "tolist"}
"""Methods that are no operations where the tensor is the host's already."""
_MADE = {"tensor", "as_tensor", "asarray", "from_numpy", "new_tensor"}
"""Functions that copy what is no tensor to the device, and wait for it."""


@contextmanager
def asked(found: list[str]) -> Iterator[None]:
    """Add to `found` the name of each operation inside, forward or backward, for which a capture would fail."""
    with _Methods(found), _Operations(found):
        yield


def watch_graphs(monkeypatch: Any) -> tuple[list[str], list[Any]]:
    """Watch the runs that `GraphedLoss` would capture; return what they ask of the host, and their losses."""
    found: list[str] = []
    results: list[Any] = []
    graph = graphed._Graph

    def watched(inputs: graphed.Batch, replay: Any) -> Any:
        def run() -> Any:
            with asked(found):
                result = replay()
            results.append(result[0])
            return result

        return graph(inputs, run)

    monkeypatch.setattr(graphed, "_Graph", watched)
    return found, results


class _Operations(TorchDispatchMode):
    """Sees operations as they come to the device, those of a backward too."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _asks(func, args):
            self._found.append(str(func))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Sees calls of Python that never become operations on a CPU."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        made = name in _MADE and not (name != "new_tensor" and args and isinstance(args[0], Tensor))
        if made or (name in _READ and isinstance(args[0], Tensor)):
            self._found.append(name)
        return func(*args, **(kwargs or {}))


def _asks(func: Any, args: Any) -> bool:
    if func._overloadpacket in _BY_INDEX:
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1]))
    # A list that is an index. A number that is written into a tensor comes here, too: on a GPU it is filled in there.
    made_of_numbers = func is _aten.lift_fresh.default and args[0].dim() > 0
    waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    return made_of_numbers or bool(waits)
