"""Linear layers with weights of 8 bits, a scale for each output, for models on the CPU.

A prompt is read with inputs of 8 bits too, as the machine's 8-bit products want them; the engine's step reads the
weights alone in 8 bits. Embeddings, norms and caches stay as they are.
"""

from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmslm.errors import UserError


class Int8Linear(nn.Module):
    """What `nn.Linear` computes, on the CPU, without gradients.

    Args:
        weight: (out, in).
        bias: (out,), if any.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scale = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight.float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("row_scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in) by the weight: (..., out)."""
        if x.is_meta:  # a walk for its shapes, as for the prediction of memory
            return x.new_empty(*x.shape[:-1], cast(Tensor, self.weight).shape[0])
        bias = cast(Tensor | None, self.bias)
        return int8_product(x, cast(Tensor, self.weight), cast(Tensor, self.row_scale), bias).to(x.dtype)


def int8_product(x: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Weight x + bias in float32, for x (..., in), each row of it rounded to 8 bits."""
    rows = x.float().flatten(0, -2)
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    y = torch._int_mm((rows / scale).round().to(torch.int8), weight.t()) * (scale * row_scale)
    y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], -1)


def to_int8(model: nn.Module) -> None:
    """Replace the linear layers of a model on the CPU by layers with weights of 8 bits, in place.

    Raises:
        UserError: if the model lies elsewhere.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices - {"cpu"}:
        raise UserError(f"the model is on {devices.pop()}; 8-bit weights of the engine are for the CPU, use bfloat16")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child.weight.detach(), child.bias))
            elif type(child) is Conv1D:
                setattr(module, name, Int8Linear(cast(Tensor, child.weight).detach().t(), cast(Tensor, child.bias)))


def weights(model: nn.Module) -> list[Tensor]:
    """All weights of a model, those of 8 bits (buffers, since nothing trains them) too; a tied head counts twice."""
    rounded = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    return [
        *model.parameters(),
        *(cast(Tensor, tensor) for layer in rounded for tensor in (layer.weight, layer.bias) if tensor is not None),
    ]
