"""One step of a recipe: built without weights and run on tensors without memory, or with random weights on a device."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmslm.distillation.loss import Distillation
from llmslm.models.blocks import blocks
from llmslm.models.configuration import LlmToSlmConfig
from llmslm.models.document_attention import attend_within_documents, reads_plainly
from llmslm.models.dropout import add_dropout
from llmslm.models.encoder import Encoder
from llmslm.models.language_model import ModelSource, load_config
from llmslm.models.modeling import LlmToSlm, language_model_of
from llmslm.models.packing import check_packing
from llmslm.models.shortened import shortened_config
from llmslm.models.trained import FrozenBase, Lora, adapters, freeze
from llmslm.parallel import checkpoint_activations
from llmslm.planning.costs import Cost, Counter, Device
from llmslm.planning.job import Job
from llmslm.planning.rows import batch, states_width
from llmslm.target_logits import cross_entropy, target_logits

_WITHOUT_MASKS = "without masks"
ALL_ATTENTION_FUNCTIONS.register(_WITHOUT_MASKS, sdpa_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(_WITHOUT_MASKS, lambda *_args, **_kwargs: None)
_STORED = 64
"""Tokens that `llmslm logits` keeps of each target unless told otherwise."""
_PARTS = {"projector": "MlpProjector", "alignment": "SameTokenizer", "fusion": "Add"}


def build(job: Job, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build a recipe's system with random weights, or with none under a FakeTensorMode.

    Args:
        job: what of the recipe counts.
        dtype: of all weights; None takes float32 for those that are trained, the recipe's for the frozen encoder.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        return _build(job, dtype).train()
    finally:
        torch.set_default_dtype(default)


def _build(job: Job, dtype: torch.dtype | None) -> PreTrainedModel:
    if (system := job.model.get("system", "llm_to_slm")) != "llm_to_slm":
        config = _config(job, system)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return _trained(auto.from_config(config, dtype=dtype or torch.float32), job, system)
    encoder, slm_config = _encoder(job, dtype), _config(job, "slm")
    parts: dict[str, Any] = {name: _spec(job.model.get(name), name) for name in _PARTS}
    options = job.encoder_options
    # A copy: a composition without weights resets the attention of the configs that it is given.
    config = LlmToSlmConfig(
        encoder_config=copy.deepcopy(encoder.config),
        slm_config=slm_config,
        encoder_layer=options.get("layer", "last"),
        **parts,
    )
    model = LlmToSlm(config)
    auto = AutoModelForSeq2SeqLM if slm_config.is_encoder_decoder else AutoModelForCausalLM
    slm = auto.from_config(slm_config, dtype=dtype or torch.float32)  # with the attention that training takes
    model.slm = _trained(slm, job, "slm")
    model.fusion.attach(model.slm)
    model.encoder = None if options.get("features") else encoder
    return model


def _trained(model: PreTrainedModel, job: Job, key: str) -> PreTrainedModel:
    """Add dropout to a language model and freeze what a recipe does not train of it, as training does."""
    if dropout := job.model.get("dropout", 0.0):
        add_dropout(model, dropout)
    train = job.model[key].get("train", "full")
    if train != "full":
        lora = asdict(Lora(**train)) if isinstance(train, Mapping) else None
        model.config.frozen_base = FrozenBase(source="", revision=None, hash="", lora=lora)
        with torch.device("meta"):  # peft moves adapters that lie elsewhere, which tensors without memory cannot
            freeze(model)
        for name, weight in adapters(dict(model.named_parameters())).items():
            owner, _, own_name = name.rpartition(".")
            empty = torch.empty(weight.shape, dtype=weight.dtype)
            setattr(model.get_submodule(owner), own_name, nn.Parameter(empty, weight.requires_grad))
    return model


def loss(
    model: PreTrainedModel,
    job: Job,
    tensors: Mapping[str, Tensor],
    cross_entropy: Callable[[Tensor, Tensor, float], Tensor] = cross_entropy,
) -> Tensor:
    """Compute the loss as `SystemModule.training_step` does; where it learns from an LLM's logits, any will do."""
    logits, targets = target_logits(model, tensors, pad_id=0)
    entropy = cross_entropy(logits, targets, job.label_smoothing)
    if not job.distils:
        return entropy
    count = min(_STORED, logits.shape[1] - 1)
    tokens = torch.arange(count, device=logits.device).expand(len(logits), count)
    log_probs = logits.new_zeros(len(logits), count + 1)
    return Distillation().mix(entropy, Distillation().divergence(logits, tokens, log_probs))


def keep_examples_apart(model: PreTrainedModel, job: Job) -> None:
    """Take the attention that `SystemModule` takes for packed rows on this device, or end with its error."""
    composed = isinstance(model, LlmToSlm)
    stored = states_width(model) if composed and model.encoder is None else None
    check = partial(check_packing, model, reads_states=composed, stored_width=stored)
    check()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=job.mixed):
        attend_within_documents(language_model_of(model), check)


def trial(model: PreTrainedModel, job: Job, device: Device, anew: bool) -> Cost:
    """Run forward and backward of one micro-batch and count; call it under a FakeTensorMode.

    Args:
        model: the system.
        job: what of the recipe counts.
        device: whose arithmetic it is.
        anew: gradients take memory when they are made; else each goes at once into memory that is there.
    """
    if job.activation_checkpointing:
        checkpoint_activations(language_model_of(model), preserve_rng_state=False)
    if not anew:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
    _attend(model, job)
    tensors = batch(model, job)
    with Counter(device) as counter, torch.autocast("cpu", torch.bfloat16, enabled=job.mixed, cache_enabled=False):
        value = loss(model, job, tensors, _one_pass if job.compiled else cross_entropy)
        counter.cost.forward_bytes = counter.cost.peak_bytes
        value.backward()
    return counter.cost


def _attend(model: PreTrainedModel, job: Job) -> None:
    """Read rows without padding as `attend_within_documents` does on a GPU: no layer keeps a mask."""
    decodes = language_model_of(model)
    if not job.masked and reads_plainly(decodes.config):
        decodes.set_attn_implementation(_WITHOUT_MASKS)


def recomputed_bytes(job: Job, dtype: torch.dtype) -> int:
    """Count what compiled blocks compute again in the backward instead of keeping it; under a FakeTensorMode.

    What is compiled cannot be counted operation by operation. Of two forwards, what each keeps for its backward can.
    """
    models = build(job, dtype), build(job, dtype)
    trained = [block for block in blocks(models[1]) if any(p.requires_grad for p in block.parameters())]
    for block in trained:
        block.compile(backend="aot_eager_decomp_partition")  # divides forward from backward as training's compiler does
    saved = _kept_bytes(models[0], job) - _kept_bytes(models[1], job)
    # Checkpoints keep the inputs of blocks, and what is between them of one block at a time.
    return max(0, saved // len(trained) if job.activation_checkpointing else saved)


def _kept_bytes(model: PreTrainedModel, job: Job) -> int:
    """Count the storages that a forward keeps for its backward."""
    _attend(model, job)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=job.mixed, cache_enabled=False),
    ):
        loss(model, job, batch(model, job), _one_pass)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _OnePass(torch.autograd.Function):
    """What a compiled cross-entropy keeps and reads: the logits, once each way, and no copy in float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.sum(dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])


def _one_pass(logits: Tensor, _targets: Tensor, _label_smoothing: float) -> Tensor:
    result: Tensor = _OnePass.apply(logits)
    return result


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _config(job: Job, key: str) -> Any:
    options = job.model[key]
    if options.get("source"):
        config = load_config(ModelSource(options["source"], options.get("revision")), None, f"model.{key}")
        layers = options.get("layers")
        return config if layers is None else shortened_config(config, layers, f"model.{key}")
    values = dict(options["config"])
    if job.vocab_size is not None:
        values.setdefault("vocab_size", job.vocab_size)
    values = {"decoder_start_token_id": 0, "pad_token_id": 0} | values
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _encoder(job: Job, dtype: torch.dtype | None) -> Encoder:
    options, llm = job.encoder_options, job.model["llm"]
    key, source = ("encoder", options["source"]) if options.get("source") else ("llm", llm.get("source"))
    # A source is read whole: `model.llm.layers` is of the llm's own training.
    values = {"source": source, "revision": options.get("revision")} if source else llm
    config = _config(Job(**vars(job) | {"model": {key: values}}), key)
    if dtype is None:
        dtype = getattr(torch, options["dtype"]) if options.get("dtype") else getattr(config, "dtype", None)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModel
    model = auto.from_config(config, dtype=dtype or torch.float32)
    return Encoder(model.get_encoder() if config.is_encoder_decoder else model, options.get("layer", "last"))


def _spec(value: Any, name: str) -> dict[str, Any]:
    """Name a part as a composition's config does."""
    value = {"class_path": value} if isinstance(value, str) else dict(value or {"class_path": _PARTS[name]})
    path = value["class_path"]
    return {
        "class_path": path if "." in path else f"llmslm.models.{name}.{path}",
        "init_args": value.get("init_args") or {},
    }
