"""A random model converted to CTranslate2, to time what a CPU user would run today."""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_TYPES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8"}


def reason_against(device: torch.device, dtype: str) -> str | None:
    """Say why CTranslate2 cannot be timed here, or None."""
    if importlib.util.find_spec("ctranslate2") is None:
        return "ctranslate2 is not installed"
    if device.type != "cpu":
        return "timed on the CPU only"
    import ctranslate2

    known = ctranslate2.get_supported_compute_types("cpu")
    return None if _TYPES[dtype] in known else f"ctranslate2 has no {dtype} on this processor"


def run_of(model: PreTrainedModel, ids: Tensor, dtype: str) -> Callable[[int], Any]:
    """A function that produces a number of tokens from these prompts (batch, length), all exactly as long.

    Args:
        model: converted; its weights are random.
        ids: prompts.
        dtype: of CTranslate2's weights.
    """
    import ctranslate2

    words = [[_word(token) for token in row] for row in ids.tolist()]
    encoder_decoder = bool(model.config.is_encoder_decoder)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "converted")
        model.save_pretrained(source)
        _tokenizer(int(model.get_output_embeddings().weight.shape[0])).save_pretrained(source)
        ctranslate2.converters.TransformersConverter(str(source)).convert(str(target), quantization=_TYPES[dtype])
        kind = ctranslate2.Translator if encoder_decoder else ctranslate2.Generator
        threads = torch.get_num_threads()
        peer: Any = kind(str(target), device="cpu", compute_type=_TYPES[dtype], inter_threads=1, intra_threads=threads)
    if encoder_decoder:
        return lambda new: peer.translate_batch(
            words, beam_size=1, max_decoding_length=new, min_decoding_length=new, max_batch_size=0, max_input_length=0
        )
    return lambda new: peer.generate_batch(
        words, beam_size=1, max_length=new, min_length=new, max_batch_size=0, include_prompt_in_result=False
    )


def _word(token: int) -> str:
    return f"w{token}"


def _tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    known = {_word(token): token for token in range(vocabulary)}
    special = {"pad_token": _word(0), "eos_token": _word(1), "unk_token": _word(2), "bos_token": _word(0)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(known, _word(2))), **special)
