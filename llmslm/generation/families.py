"""Reads a transformers model into a `Decoder`, family by family. Fused weights (q/k/v, gate/up) are copies."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmslm.generation.int8 import Int8Linear
from llmslm.generation.plan import CrossAttention, Decoder, Linear, Norm, SelfAttention, Sublayer
from llmslm.generation.state import CacheShape

_ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class UnreadableModelError(Exception):
    """The model cannot be read into a `Decoder`; the text says why."""


def read(model: PreTrainedModel, max_positions: int) -> Decoder:
    """Read a model's decoder.

    Args:
        model: a causal or sequence-to-sequence language model.
        max_positions: positions for which tables of angles are laid out, where the model has no limit of its own.

    Raises:
        UnreadableModelError: if its family or a setting of it is not known here.
    """
    if any(module._forward_pre_hooks or module._forward_hooks for module in model.modules()):
        raise UnreadableModelError("hooks change what its layers do (as fusion CrossAttend does)")
    return _read(model, max_positions)


def read_stack(model: PreTrainedModel, max_positions: int) -> Decoder:
    """Read a decoder-only base model, as a frozen encoder is one; arguments and errors as for `read`.

    Hooks are let be: an `Encoder` takes the states of an inner layer by one.
    """
    return _read(model, max_positions)


def _read(model: PreTrainedModel, max_positions: int) -> Decoder:
    reader = _READERS.get(model.config.model_type)
    if reader is None:
        raise UnreadableModelError(f"model_type {model.config.model_type!r} has no step of its own")
    try:
        return reader(model, max_positions)
    except AttributeError as error:
        raise UnreadableModelError(f"{type(model).__name__} is not built as its family is: {error}") from error


def _weights(module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight (out, in), bias, and the scales of rows of 8 bits."""
    if type(module) is Conv1D:
        weight, bias = cast(Tensor, module.weight), cast(Tensor, module.bias)
        return weight.detach().t().contiguous(), bias.detach(), None
    if type(module) is Int8Linear:
        buffers = (module.weight, module.bias, module.row_scale)
        return cast(tuple[Tensor, Tensor | None, Tensor | None], buffers)
    if type(module) is not nn.Linear:
        raise UnreadableModelError(f"a {type(module).__name__} stands where a plain linear layer is expected")
    return module.weight.detach(), None if module.bias is None else module.bias.detach(), None


def _linear(*modules: nn.Module, activation: str | None = None, gated: bool = False) -> Linear:
    """Fuse linear layers that read the same input into one."""
    parts = [_weights(module) for module in modules]
    if len(parts) == 1:
        weight, bias, scale = parts[0]
        return Linear(weight, bias, activation, gated, scale)
    weights, biases, scales = zip(*parts, strict=True)
    if len({weight.dtype for weight in weights}) > 1:
        raise UnreadableModelError("layers that read the same input have different dtypes")
    bias = None
    if any(bias is not None for bias in biases):
        bias = torch.cat([_or_zeros(bias, weight) for weight, bias in zip(weights, biases, strict=True)])
    return Linear(torch.cat(weights), bias, activation, gated, None if scales[0] is None else torch.cat(scales))


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    return torch.zeros(weight.shape[0], device=weight.device, dtype=dtype) if bias is None else bias


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise UnreadableModelError(f"activation {name!r} is not known")
    return _ACTIVATIONS[name]


def _layer_norm(module: nn.Module | None) -> Norm | None:
    if module is None:
        return None
    if type(module) is not nn.LayerNorm or module.weight is None:
        raise UnreadableModelError(f"a {type(module).__name__} stands where a plain layer norm is expected")
    return Norm(module.weight.detach(), None if module.bias is None else module.bias.detach(), module.eps, True)


def _rms_norm(module: Any, scale: float = 1.0) -> Norm:
    return Norm(module.weight.detach(), None, module.variance_epsilon, False, scale)


def _head(model: Any) -> Linear:
    """Read what gives the logits; where a base model has none, its embeddings stand there, as those of a tied head."""
    if hasattr(model, "lm_head"):
        return _linear(model.lm_head)
    return Linear(model.get_input_embeddings().weight.detach())


def _shape(head: Linear, inner: SelfAttention, *, layers: int, cross: bool) -> CacheShape:
    vocabulary = head.weight.shape[0]
    return CacheShape(layers, inner.kv_heads, inner.head_dim, vocabulary, inner.heads if cross else 0)


def _gemma_norm(module: Any) -> Norm:
    return Norm(module.weight.detach() + 1, None, module.eps, False)


def sliding_window(config: Any) -> int | None:
    """How many tokens the layers with the least sight look back, themselves included; None if all see all."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise UnreadableModelError(f"layers of type {', '.join(sorted(kinds))} have no step of their own")
    slides = "sliding_attention" in kinds or (not kinds and getattr(config, "use_sliding_window", True))
    return getattr(config, "sliding_window", None) if slides else None


def _read_llama(model: Any, max_positions: int, norm: Callable[[Any], Norm] = _rms_norm) -> Decoder:
    """Llama, Mistral, Qwen2, Qwen3 and SmolLM3: RMS norms, rotary positions, gated feed-forward."""
    config, body, head = model.config, model.base_model, _head(model)
    if body.rotary_emb.rope_type in ("dynamic", "longrope"):
        raise UnreadableModelError(f"rotary angles of type {body.rotary_emb.rope_type!r} change with the length")
    activation = _activation(config.hidden_act)
    sublayers = []
    for index, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        inner = SelfAttention(
            layer=index,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            scale=attention.scaling,
            q_norm=norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            k_norm=norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            rotary=bool(getattr(attention, "use_rope", True)),  # SmolLM3 rotates in some of its layers
        )
        into = _linear(attention.q_proj, attention.k_proj, attention.v_proj)
        before = norm(layer.input_layernorm)
        sublayers.append(Sublayer(into, _linear(attention.o_proj), inner, before))
        up = _linear(mlp.gate_proj, mlp.up_proj, activation=activation, gated=True)
        before = norm(layer.post_attention_layernorm)
        sublayers.append(Sublayer(up, _linear(mlp.down_proj), before=before))
    steps = torch.arange(max_positions, device=model.device)[None]
    cos, sin = body.rotary_emb(torch.empty(0, device=model.device, dtype=torch.float32), steps)
    return Decoder(
        embedding=body.embed_tokens.weight.detach(),
        head=head,
        sublayers=sublayers,
        shape=_shape(head, inner, layers=len(body.layers), cross=False),
        final_norm=norm(body.norm),
        cos=cos[0].float().contiguous(),
        sin=sin[0].float().contiguous(),
        max_positions=max_positions,
        window=sliding_window(config),
    )


def _read_gemma(model: Any, max_positions: int) -> Decoder:
    decoder = _read_llama(model, max_positions, _gemma_norm)
    return replace(decoder, embedding_scale=model.config.hidden_size**0.5)


def _read_gpt2(model: Any, _max_positions: int) -> Decoder:
    config, body, head = model.config, model.base_model, _head(model)
    if config.add_cross_attention:
        raise UnreadableModelError("GPT-2 with cross-attention has no step of its own")
    sublayers = []
    for index, layer in enumerate(body.h):
        heads = layer.attn.num_heads
        inner = SelfAttention(index, heads, heads, layer.attn.head_dim, layer.attn.scaling)
        into, out = _linear(layer.attn.c_attn), _linear(layer.attn.c_proj)
        sublayers.append(Sublayer(into, out, inner, _layer_norm(layer.ln_1)))
        up = _linear(layer.mlp.c_fc, activation=_activation(config.activation_function))
        sublayers.append(Sublayer(up, _linear(layer.mlp.c_proj), before=_layer_norm(layer.ln_2)))
    return Decoder(
        embedding=body.wte.weight.detach(),
        head=head,
        sublayers=sublayers,
        shape=_shape(head, inner, layers=len(body.h), cross=False),
        positions=body.wpe.weight.detach(),
        final_norm=_layer_norm(body.ln_f),
        max_positions=config.n_positions,
    )


def _placed(sublayer: Sublayer, norm: Norm | None, *, first: bool) -> Sublayer:
    return replace(sublayer, before=norm) if first else replace(sublayer, after=norm)


def _bart_attention(attention: Any, index: int) -> SelfAttention:
    return SelfAttention(index, attention.num_heads, attention.num_heads, attention.head_dim, attention.scaling)


def _bart_feed_forward(layer: Any, config: Any, *, first: bool) -> Sublayer:
    up = _linear(layer.fc1, activation=_activation(config.activation_function))
    return _placed(Sublayer(up, _linear(layer.fc2)), _layer_norm(layer.final_layer_norm), first=first)


def _read_opt(model: Any, _max_positions: int) -> Decoder:
    config, body, head = model.config, model.base_model.decoder, _head(model)
    if body.project_in is not None:
        raise UnreadableModelError("OPT with projected embeddings has no step of its own")
    first, sublayers = config.do_layer_norm_before, []
    for index, layer in enumerate(body.layers):
        attention = layer.self_attn
        inner = _bart_attention(attention, index)
        into = _linear(attention.q_proj, attention.k_proj, attention.v_proj)
        sublayer = Sublayer(into, _linear(attention.out_proj), inner)
        sublayers.append(_placed(sublayer, _layer_norm(layer.self_attn_layer_norm), first=first))
        sublayers.append(_bart_feed_forward(layer, config, first=first))
    return Decoder(
        embedding=body.embed_tokens.weight.detach(),
        head=head,
        sublayers=sublayers,
        shape=_shape(head, inner, layers=len(body.layers), cross=False),
        positions=body.embed_positions.weight.detach(),
        position_offset=body.embed_positions.offset,
        final_norm=_layer_norm(body.final_layer_norm),
        max_positions=config.max_position_embeddings,
    )


def _read_bart(model: Any, _max_positions: int) -> Decoder:
    """BART, and mBART, whose norms come first and which has one more in the end."""
    config, body = model.config, model.model.decoder
    final_norm = getattr(body, "layer_norm", None)
    first, sublayers, crosses = final_norm is not None, [], []
    for index, layer in enumerate(body.layers):
        attention, cross = layer.self_attn, layer.encoder_attn
        inner = _bart_attention(attention, index)
        into = _linear(attention.q_proj, attention.k_proj, attention.v_proj)
        sublayer = Sublayer(into, _linear(attention.out_proj), inner)
        sublayers.append(_placed(sublayer, _layer_norm(layer.self_attn_layer_norm), first=first))
        key_value = _linear(cross.k_proj, cross.v_proj)
        crosses.append(CrossAttention(index, cross.num_heads, cross.head_dim, cross.scaling, key_value))
        sublayer = Sublayer(_linear(cross.q_proj), _linear(cross.out_proj), crosses[-1])
        sublayers.append(_placed(sublayer, _layer_norm(layer.encoder_attn_layer_norm), first=first))
        sublayers.append(_bart_feed_forward(layer, config, first=first))
    head = replace(_linear(model.lm_head), bias=model.final_logits_bias.detach().flatten())
    return Decoder(
        embedding=body.embed_tokens.weight.detach(),
        head=head,
        sublayers=sublayers,
        shape=_shape(head, inner, layers=len(body.layers), cross=True),
        embedding_scale=body.embed_tokens.embed_scale,
        positions=body.embed_positions.weight.detach(),
        position_offset=body.embed_positions.offset,
        embedding_norm=_layer_norm(body.layernorm_embedding),
        final_norm=_layer_norm(final_norm),
        max_positions=config.max_position_embeddings,
        crosses=crosses,
    )


def _t5_feed_forward(layer: Any, config: Any) -> Sublayer:
    dense, activation = layer.DenseReluDense, _activation(config.dense_act_fn)
    if config.is_gated_act:
        up = _linear(dense.wi_0, dense.wi_1, activation=activation, gated=True)
    else:
        up = _linear(dense.wi, activation=activation)
    return Sublayer(up, _linear(dense.wo), before=_rms_norm(layer.layer_norm))


def _t5_distance_bias(attention: Any) -> Tensor:
    """(heads, distances): the learned bias by how many tokens a key lies before its query."""
    furthest = attention.relative_attention_max_distance
    bucket = attention._relative_position_bucket(
        -torch.arange(furthest + 1, device=attention.relative_attention_bias.weight.device),
        bidirectional=False,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=furthest,
    )
    return attention.relative_attention_bias(bucket).detach().t().float().contiguous()


def _read_t5(model: Any, _max_positions: int) -> Decoder:
    config, body, head = model.config, model.decoder, _head(model)
    sublayers, crosses = [], []
    for index, block in enumerate(body.block):
        attention, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
        heads, width = attention.n_heads, attention.key_value_proj_dim
        inner = SelfAttention(index, heads, heads, width, 1.0, biased=True)
        into = _linear(attention.q, attention.k, attention.v)
        sublayers.append(Sublayer(into, _linear(attention.o), inner, _rms_norm(block.layer[0].layer_norm)))
        crosses.append(CrossAttention(index, heads, width, 1.0, _linear(cross.k, cross.v)))
        before = _rms_norm(block.layer[1].layer_norm)
        sublayers.append(Sublayer(_linear(cross.q), _linear(cross.o), crosses[-1], before))
        sublayers.append(_t5_feed_forward(block.layer[2], config))
    scale = config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else 1.0
    return Decoder(
        embedding=body.embed_tokens.weight.detach(),
        head=head,
        sublayers=sublayers,
        shape=_shape(head, inner, layers=len(body.block), cross=True),
        final_norm=_rms_norm(body.final_layer_norm, scale),
        distance_bias=_t5_distance_bias(body.block[0].layer[0].SelfAttention),
        crosses=crosses,
    )


_READERS: dict[str, Callable[[Any, int], Decoder]] = {
    "llama": _read_llama,
    "mistral": _read_llama,
    "qwen2": _read_llama,
    "qwen3": _read_llama,
    "smollm3": _read_llama,
    "gemma": _read_gemma,
    "gpt2": _read_gpt2,
    "opt": _read_opt,
    "bart": _read_bart,
    "mbart": _read_bart,
    "t5": _read_t5,
    "mt5": _read_t5,
}
