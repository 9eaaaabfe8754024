"""A prompt's products on the CPU by another library: the same numbers, only where they are asked for."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmslm.generation.products import fast_products, row_bucket

CPU = torch.device("cpu")


@pytest.mark.parametrize("layer", [nn.Linear(24, 40), nn.Linear(24, 40, bias=False), Conv1D(40, 24)])
@pytest.mark.parametrize("shape", [(1, 24), (9, 24), (2, 9, 24)])
@torch.no_grad()
def test_the_numbers_are_the_same(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with fast_products(CPU):
        fast = layer(x)
    torch.testing.assert_close(fast, layer(x), rtol=1e-5, atol=1e-5)


def test_weights_that_are_stored_otherwise_keep_their_own_product() -> None:
    class Quantised(torch.Tensor):
        """A quantiser's weights, whose product is its own."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                return 7 if func is nn.functional.linear else func(*args, **(kwargs or {}))

    with torch.no_grad(), fast_products(CPU):
        assert nn.functional.linear(torch.randn(9, 24), torch.ones(40, 24).as_subclass(Quantised)) == 7


def test_gradients_are_left_alone() -> None:
    layer = nn.Linear(24, 40)
    with fast_products(CPU):
        layer(torch.randn(9, 24)).sum().backward()
    assert layer.weight.grad is not None


def test_lengths_share_few_shapes() -> None:
    buckets = {row_bucket(rows): rows for rows in range(8, 4097)}
    assert len(buckets) < 40, "oneDNN keeps code for each"
    assert all(
        rows <= bucket <= max(8, 1.25 * rows + 8) for rows, bucket in ((n, row_bucket(n)) for n in range(8, 4097))
    )
