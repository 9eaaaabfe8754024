"""Weights of 8 or 4 bits for the frozen encoder, by whichever quantiser is installed."""

import importlib.util
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from llmslm.errors import UserError

Quantization = Literal["8bit", "4bit"]

# In order of preference: torchao's 8 bits keep the model's dtype, bitsandbytes' 4 bits run on any device.
_QUANTISERS = {"8bit": ("torchao", "bitsandbytes"), "4bit": ("bitsandbytes", "torchao")}


def quantization_config(quantization: Quantization) -> Any:
    """Return the `quantization_config` that transformers takes.

    Raises:
        UserError: if no quantiser is installed, it cannot do its work here, or `quantization` is not one of its kinds.
    """
    if quantization not in _QUANTISERS:
        raise UserError(f"quantization {quantization!r}; expected 8bit or 4bit (model.encoder.quantization)")
    names = _QUANTISERS[quantization]
    installed = next((name for name in names if importlib.util.find_spec(name) is not None), None)
    if installed is None:
        raise UserError(
            f"model.encoder.quantization is {quantization}, which needs {' or '.join(names)}: pip install {names[0]}"
        )
    if installed == "bitsandbytes":
        return BitsAndBytesConfig(**{f"load_in_{quantization}": True})
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if quantization == "8bit":
        return TorchAoConfig(Int8WeightOnlyConfig())
    config = Int4WeightOnlyConfig()
    try:  # one layer: of a whole model transformers gives the reason in a report alone
        quantize_(nn.Linear(128, 128, dtype=torch.bfloat16), config)
    except (ImportError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"model.encoder.quantization is 4bit, which torchao cannot do here: {error}; its 4 bits need kernels for "
            "GPUs: pip install bitsandbytes, whose 4 bits run on any device, or set model.encoder.quantization to 8bit"
        ) from error
    return TorchAoConfig(config)
