"""Texts to ids by a tokenizer, as fast as its backend gives them, and what decides about them."""

import functools
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast


def description(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all that decides about a text's tokens; the length to which the last text was cut is no part of it."""
    if not tokenizer.is_fast:
        return repr(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    described: str = backend.to_str()
    return described


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], **kwargs: Any) -> BatchEncoding:
    """Return input_ids of each text, with the characters of its tokens where the tokenizer tells them."""
    return tokenizer(texts, return_attention_mask=False, verbose=False, **kwargs)


def encode_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> BatchEncoding:
    """Do what `encode` does where nobody asks for the characters of tokens, in half of the time."""
    if not _is_plain(tokenizer.__class__):
        return encode(tokenizer, texts)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    # one text alone is not worth the threads of a batch
    encodings = backend.encode_batch_fast(texts) if len(texts) > 1 else [backend.encode(text) for text in texts]
    return BatchEncoding({"input_ids": [encoding.ids for encoding in encodings]})


@functools.cache
def _is_plain(kind: type[PreTrainedTokenizerBase]) -> bool:
    """Whether tokenizers of a kind hand texts to their backend as all do: none of the methods that do is its own."""
    if not issubclass(kind, PreTrainedTokenizerFast) or hasattr(kind, "_switch_to_input_mode"):
        return False
    names = ("__call__", "_encode_plus", "set_truncation_and_padding")
    found = [(getattr(kind, name, None), getattr(PreTrainedTokenizerFast, name, None)) for name in names]
    return all(ours is base is not None for ours, base in found)
