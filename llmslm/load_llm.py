"""An llm system from a folder that was trained here, or from a bare model, which takes a prompt format."""

from pathlib import Path

import torch

from llmslm.checkpoint import codec_for, find_system
from llmslm.data.codec import TextFormat
from llmslm.data.tokenizer import load_tokenizer
from llmslm.errors import UserError
from llmslm.models.language_model import ModelSource, load_language_model
from llmslm.system import System


def load_llm(
    source: str | Path, text_format: TextFormat, key: str, *, device: str | torch.device, dtype: torch.dtype | None
) -> System:
    """Load any system from its folder, or a bare model as an llm.

    Args:
        source: run or system folder; or a hub name, a folder in the hub's format, a GGUF file.
        text_format: how a bare model reads prompts.
        key: what names the source, for messages.
        device: where it goes.
        dtype: of the weights; float32 if not given.

    Raises:
        UserError: if there is neither.
    """
    try:
        folder = find_system(source)
    except UserError:
        model = load_language_model(ModelSource(source=str(source)), None, key, dtype or torch.float32).to(device)
        codec = codec_for(model, load_tokenizer(str(source)), None, text_format)
        return System("llm", model, codec, {"system": "llm"})
    return System.load(folder, device=device, dtype=dtype)
