"""Faster matrix products of many rows on the CPU: a prompt's, or those of a wide batch."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

_FEWEST_ROWS = 8  # below it nothing is gained


def fast_products(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While entered, float32 products of many rows are oneDNN's where PyTorch would take MKL's.

    On an AMD EPYC with AVX-512, two threads, oneDNN takes 0.5 to 0.9 of MKL's time for 8 to 512 rows and matrices of
    512 x 512 to 4096 x 1024; PyTorch prefers MKL in float32 on any machine. Sums are in another order, no less exact.
    """
    usable = device.type == "cpu" and torch.backends.mkldnn.is_available() and not torch.is_grad_enabled()
    return _OneDnnProducts() if usable else contextlib.nullcontext()


class _OneDnnProducts(TorchFunctionMode):
    """Takes the place of the products that linear layers and transformers' Conv1D ask for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, products by oneDNN."""
        if func is torch.nn.functional.linear and _suits(args, kwargs, rows=0, weight=1):
            return _product(args[0], args[1], args[2] if len(args) > 2 else None)
        if func is torch.addmm and _suits(args, kwargs, rows=1, weight=2) and args[0].dim() == 1:
            return _product(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))


def _suits(args: Any, kwargs: Any, *, rows: int, weight: int) -> bool:
    if kwargs or len(args) <= weight:
        return False
    x, matrix = args[rows], args[weight]
    if type(x) is not Tensor or type(matrix) not in (Tensor, Parameter):  # a quantised weight has products of its own
        return False
    if matrix.dtype != torch.float32 or x.dtype != torch.float32 or matrix.dim() != 2:
        return False
    return x.device.type == "cpu" and x.dim() > 1 and x.numel() >= _FEWEST_ROWS * x.shape[-1]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.flatten(0, -2)
    count, missing = rows.shape[0], row_bucket(rows.shape[0]) - rows.shape[0]
    padded = torch.nn.functional.pad(rows, (0, 0, 0, missing)) if missing else rows
    y: Tensor = torch.ops.mkldnn._linear_pointwise(padded, weight, bias, "none", [], "")
    return y[:count].view(*x.shape[:-1], -1)


def row_bucket(rows: int) -> int:
    """Round a number of rows of a product up by a quarter at most.

    oneDNN makes and keeps code for each shape, some 100 kB of it: prompts of any length would fill hundreds of MiB.
    """
    step = max(_FEWEST_ROWS, 1 << max(rows.bit_length() - 3, 0))
    return -(-rows // step) * step
