"""Attention of packed rows without a mask: each example is a sequence of its own to PyTorch's FlashAttention.

With a mask, a row of ten examples takes ten times the products that its examples take, in a slower kernel. transformers
knows the attention by `NAME` once this module is imported.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "documents"
_CAUSAL = (-1, 0)
_HALF = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within the sequences that begin at `cu_seq_lens_q`, or by the mask where that cannot be.

    Args:
        module: the attention layer; it says how many query heads share a key.
        query: (batch, heads, len, head_dim).
        key: (batch, key_heads, len, head_dim).
        value: likewise.
        attention_mask: (batch, 1, len, len), True = attend, of the same sequences.
        dropout: of the weights; only the mask's way has it.
        scaling: of the products.
        cu_seq_lens_q: (sequences + 1,), int32, begins of the sequences among all positions of all rows, and their end.
        max_length_q: length of the longest.
        kwargs: what else transformers hands to an attention.

    Returns:
        (batch, len, heads, head_dim), and no weights.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as it does for PyTorch's own attention: rotary positions gave float32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if cu_seq_lens_q is None or dropout or not _runs_on(query):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, repeat_kv(key, groups), repeat_kv(value, groups)))
    longest = query.shape[2] if max_length_q is None else max_length_q
    starts = cu_seq_lens_q
    attended: Any = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=_CAUSAL)
    return attended.unflatten(0, (query.shape[0], query.shape[2])), None


def attend_within_documents(model: PreTrainedModel, check: Callable[[], None]) -> None:
    """Let a decoder-only model attend so where it may and `check`, which raises, finds nothing against it."""
    if not may_attend(model):
        return
    model.set_attn_implementation(NAME)
    try:
        check()
    except Exception as error:
        attend_by_mask(model)
        warnings.warn(f"packed rows are attended to by a mask: {str(error).splitlines()[0]}", UserWarning, stacklevel=2)


def attend_by_mask(model: PreTrainedModel) -> None:
    """Let a model attend as it did before `attend_within_documents`."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def may_attend(model: PreTrainedModel) -> bool:
    """Say whether a model's rows can be read so.

    Not on other devices than CUDA's, nor where a config asks for another attention than the default one or has windows.
    """
    return reads_plainly(model.config) and model.device.type == "cuda"


def reads_plainly(config: PreTrainedConfig) -> bool:
    """Say whether a model is decoder-only, with the default attention and without windows."""
    is_plain = config._attn_implementation == "sdpa" and not has_windows(config)
    return is_plain and not config.is_encoder_decoder


def has_windows(config: PreTrainedConfig) -> bool:
    """Say whether some layers of a model see a part of what stands before, so that they want masks of their own."""
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    return bool(layers) or getattr(config, "sliding_window", None) is not None


def _runs_on(query: Tensor) -> bool:
    return query.is_cuda and query.dtype in _HALF and query.shape[-1] <= _LARGEST_HEAD


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
