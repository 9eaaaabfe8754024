"""The LightningModule: one training loop for the llm, the slm and the llm_to_slm system."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torchmetrics import MeanMetric
from torchmetrics.text import SacreBLEUScore
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from llmslm.checkpoint import codec_for, find_system
from llmslm.data.codec import Codec, TextFormat
from llmslm.data.features import StoredEncoder
from llmslm.data.logits import COLUMNS
from llmslm.data.sources import Split
from llmslm.data.tokenizer import load_tokenizer, same_tokenizer
from llmslm.distillation.loss import Distillation
from llmslm.errors import UserError
from llmslm.graphed import MOST_OF_COPIES, GraphedLoss
from llmslm.models.alignment import Alignment, SameTokenizer
from llmslm.models.blocks import compile_blocks
from llmslm.models.document_attention import attend_by_mask, attend_within_documents
from llmslm.models.dropout import add_dropout
from llmslm.models.encoder import Encoder, Layers
from llmslm.models.fusion import Add, Fusion
from llmslm.models.language_model import ModelSource, load_language_model
from llmslm.models.modeling import LlmToSlm, language_model_of
from llmslm.models.packing import check_packing
from llmslm.models.projector import MlpProjector, Projector
from llmslm.models.quantization import Quantization
from llmslm.models.source import SYSTEM_FOLDER
from llmslm.models.trained import base_names, count_parameters, frozen_base, restrict, with_tied
from llmslm.parallel import Fsdp, gathered, token_share
from llmslm.progress import TrainingProgress
from llmslm.system import System
from llmslm.target_logits import cross_entropy, target_logits

SystemName = Literal["llm", "slm", "llm_to_slm"]
Batch = dict[str, Any]
ENCODER_KEY = "model.encoder."
SANITY_TOKENS = 8
"""Of a prediction before training, which only shows that validation runs."""


@dataclass
class EncoderOptions:
    """How the LLM serves as frozen encoder."""

    source: str | None = None
    """Hub name, folder or GGUF file (a path, or package:NAME for the one that an installed package carries); None takes
    the recipe's llm: its source, or the one that this recipe trained."""
    revision: str | None = None
    """Commit of the hub repository."""
    layer: Layers = "last"
    """Whose output is used: "last", an index into hidden_states, or a fraction of the depth; or a list of these, of
    which a mix is learned."""
    dtype: str | None = None
    """Weights' dtype, for example bfloat16; None keeps what is stored."""
    quantization: Quantization | None = None
    """Quantise the weights at load: 8bit (needs torchao or bitsandbytes) or 4bit (bitsandbytes or torchao)."""
    features: str | None = None
    """Folder of `llmslm features`: train from stored states, without the LLM."""


def default_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """AdamW at 1e-3, a rate for small models; a recipe with pretrained weights sets its own."""
    return AdamW(parameters, lr=1e-3, weight_decay=0.01)


class SystemModule(L.LightningModule):
    """Trains one of the three systems of a comparison with cross-entropy on the targets.

    Batches come from `TextDataModule`, which also supplies the tokenizers. Only parameters that require a gradient go
    to the optimizer, and checkpoints leave the frozen encoder out.

    Args:
        system: which of the three is trained.
        llm: the large model: trained itself as "llm", frozen encoder in "llm_to_slm".
        slm: the small model: trained in "slm" and "llm_to_slm".
        encoder: how the llm encodes.
        projector: from encoder width and slm width to a projector.
        alignment: which encoder positions feed which slm positions.
        fusion: the rule by which projected states enter the slm.
        optimizer: from parameters to an optimizer (torch.optim.AdamW, torch.optim.Adafactor, ...).
        schedule: learning rate after the warm-up.
        warmup_steps: optimizer steps of linear warm-up.
        bleu_examples: validation examples, spread evenly over the split, that are generated for val/bleu; 0 switches
            the monitor off.
        label_smoothing: share of each target's probability that training spreads over the vocabulary.
        dropout: of the trained language model's residual branches, for architectures without dropout of their own.
        distillation: from an LLM's stored logits, beside the targets.
        compile: train with compiled blocks and loss; best with data.pack_tokens, whose batches have one shape.
    """

    def __init__(
        self,
        llm: ModelSource,
        slm: ModelSource,
        system: SystemName = "llm_to_slm",
        encoder: EncoderOptions = EncoderOptions(),  # noqa: B008 (jsonargparse reads the default; it is never changed)
        projector: Callable[[int, int], Projector] = MlpProjector,
        alignment: Callable[[int, int], Alignment] = SameTokenizer,
        fusion: Callable[[int, int], Fusion] = Add,
        optimizer: Callable[[Iterable], Optimizer] = default_optimizer,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        warmup_steps: int = 100,
        bleu_examples: int = 64,
        label_smoothing: float = 0.0,
        dropout: float = 0.0,
        distillation: Distillation = Distillation(),  # noqa: B008 (as above)
        compile: bool = False,
    ) -> None:
        super().__init__()
        llm.check("model.llm")
        slm.check("model.slm")
        self.system = system
        self.llm_source = llm
        self.slm_source = slm
        self.encoder_options = encoder
        self.projector_factory = projector
        self.alignment_factory = alignment
        self.fusion_factory = fusion
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.features = Path(encoder.features) if encoder.features and system == "llm_to_slm" else None
        self.bleu_examples = bleu_examples
        self.label_smoothing = label_smoothing
        self.dropout = dropout
        self.distillation = distillation
        self.logits = Path(distillation.logits) if distillation.logits and system != "llm" else None
        self.compile_blocks = compile
        self._cross_entropy = cross_entropy
        self._graphed: GraphedLoss | None = None
        self.model: PreTrainedModel | None = None
        self.codec: Codec | None = None
        self.val_loss = MeanMetric()
        self.val_bleu = SacreBLEUScore()

    # --- what the data module asks for -----------------------------------------------------------------------------

    def tokenizer_sources(self) -> tuple[str | None, str | None]:
        """Return where the tokenizers of encoder and slm come from, None for a model that is built from a config.

        For the "llm" system both are the llm's.
        """
        if self.system == "llm":
            return self.llm_source.source, self.llm_source.source
        return self.encoder_options.source or self.llm_source.source, self.slm_source.source

    def make_codec(self, datamodule: Any) -> Codec:
        """Build the system with the data module's tokenizers, and the codec that belongs to it."""
        if self.codec is None:
            slm_tokenizer = datamodule.slm_tokenizer
            encoder_tokenizer = datamodule.encoder_tokenizer if self.system == "llm_to_slm" else None
            self._check_tokenizer(encoder_tokenizer or slm_tokenizer)
            self.model = self._build(slm_tokenizer)
            self.codec = codec_for(self.model, slm_tokenizer, encoder_tokenizer, datamodule.text_format)
            self._check_positions(datamodule.text_format)
        return self.codec

    # --- building -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the system once the data module knows its tokenizers."""
        if self.model is None:
            self.make_codec(self.trainer.datamodule)  # type: ignore[attr-defined]
        if isinstance(self.trainer.strategy, Fsdp):
            self.trainer.strategy.parallelize(self._built)

    def _build(self, slm_tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        if self.system == "llm":
            return self._trained(self.llm_source, slm_tokenizer, "model.llm").train()
        slm = self._trained(self.slm_source, slm_tokenizer, "model.slm")
        if self.system == "slm":
            return slm.train()
        source, options = self.encoder_source(), self.encoder_options
        if self.features is not None:
            encoder: Encoder = StoredEncoder(self.features)
        else:
            encoder = Encoder.from_source(
                source,
                revision=options.revision,
                layer=options.layer,
                dtype=options.dtype,
                quantization=options.quantization,
            )
        widths = (encoder.hidden_size, slm.config.hidden_size)
        return LlmToSlm.compose(
            encoder,
            slm,
            projector=self.projector_factory(*widths),
            alignment=self.alignment_factory(*widths),
            fusion=self.fusion_factory(*widths),
            encoder_source=source,
            encoder_revision=options.revision,
        ).train()

    def _trained(self, source: ModelSource, tokenizer: PreTrainedTokenizerBase, key: str) -> PreTrainedModel:
        model = load_language_model(source, tokenizer, key)
        if self.dropout:
            add_dropout(model, self.dropout)
        if self.system != "llm_to_slm" and source.train == "nothing":
            raise UserError(f"{key}.train is nothing, so the system {self.system} has nothing to train; set it to full")
        restrict(model, source.train, source.source, source.revision, key)
        return model

    def encoder_source(self) -> str:
        """Return the encoder's source: the recipe's, the llm's, or the llm that the same recipe trained before.

        Raises:
            UserError: if the llm is to be trained by the recipe and has not been.
        """
        if source := self.encoder_options.source or self.llm_source.source:
            return source
        trained = Path(self.trainer.default_root_dir).parent / "llm"
        try:
            return str(find_system(trained))
        except UserError as error:
            raise UserError(
                f"the encoder is the llm that this recipe trains, and {trained / SYSTEM_FOLDER} is not there; train it "
                "first with --model.system llm, or set model.encoder.source"
            ) from error

    def _check_tokenizer(self, read: PreTrainedTokenizerBase) -> None:
        """See to it that an encoder that the recipe has trained reads the tokens that it was trained with."""
        if self.system != "llm_to_slm" or self.features is not None or self.tokenizer_sources()[0] is not None:
            return
        source = self.encoder_source()
        if not same_tokenizer(load_tokenizer(source), read):
            raise UserError(
                f"the llm in {source} was trained with another tokenizer than this data's; set model.encoder.source to "
                "that folder and data.tokenizer to null, or train the llm on this data (--model.system llm)"
            )

    def _check_positions(self, text_format: TextFormat) -> None:
        encoder = self.model.encoder if isinstance(self.model, LlmToSlm) else None
        limit = None if encoder is None else encoder.max_positions
        if limit is not None and text_format.max_prompt_tokens > limit:
            raise UserError(
                f"data.max_prompt_tokens is {text_format.max_prompt_tokens}, but the encoder has {limit} positions; "
                f"set data.max_prompt_tokens to at most {limit} (and data.truncate_prompt if prompts are longer)"
            )

    # --- training and validation ------------------------------------------------------------------------------------

    def forward(self, **batch: Any) -> Any:
        """Run the system on a training batch."""
        return self._built(**batch)

    def on_fit_start(self) -> None:
        """Compile what the recipe wants compiled, and see to it that packed examples cannot mix."""
        self._tell_parameters()
        packs: bool = self.trainer.datamodule.packs  # type: ignore[attr-defined]
        if packs:
            self._keep_examples_apart()
        if self.compile_blocks:
            compile_blocks(self._built, fixed_shapes=packs)
            # Eager, it is most of a small slm's step: five passes over float32 logits.
            self._cross_entropy = torch.compile(cross_entropy, dynamic=None if packs else True)
        self._graphed = GraphedLoss(self._entropy, self._built.parameters()) if packs and self._may_be_graphed else None

    def on_fit_end(self) -> None:
        """Decode by masks, as everywhere else, and give the graph's memory back."""
        attend_by_mask(self._decodes)
        self._graphed = None

    def _keep_examples_apart(self) -> None:
        """Take the fastest attention that does, or end with an error."""
        attend_by_mask(self._decodes)  # a fit that failed may have left the other
        stored = StoredEncoder(self.features).width if self.features else None
        check = partial(check_packing, self._built, reads_states=self.system == "llm_to_slm", stored_width=stored)
        check()
        with self.trainer.precision_plugin.forward_context():
            attend_within_documents(self._decodes, check)

    @property
    def _decodes(self) -> PreTrainedModel:
        """The language model that is trained."""
        return language_model_of(self._built)

    @property
    def _may_be_graphed(self) -> bool:
        """Whether it is on GPUs that compute alone, and the host decides nothing meanwhile.

        In float16 it scales the loss by what the gradients were, and some models have it drop layers.
        """
        drops = any(getattr(self._decodes.config, f"{side}layerdrop", 0) for side in ("", "encoder_", "decoder_"))
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        return (
            self.compile_blocks
            and self._averages_afterwards
            and self.device.type == "cuda"
            and not scaled
            and not drops
        )

    @property
    def _averages_afterwards(self) -> bool:
        """Whether it is one device, or copies whose gradients are so few that they may be averaged after the backward.

        DDP averages while the backward runs, but those of a graph come all at once.
        """
        strategy, few = self.trainer.strategy, count_parameters(self._built)["trained"] <= MOST_OF_COPIES
        return isinstance(strategy, SingleDeviceStrategy) or (isinstance(strategy, DDPStrategy) and few)

    def _entropy(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What training minimises where there is nothing but targets."""
        return self.loss_terms(dict(tensors), self.label_smoothing)[0]["cross_entropy"]

    def _tell_parameters(self) -> None:
        counts = count_parameters(self._built)
        rank_zero_info(f"{counts['trained']:,} of {counts['total']:,} parameters are trained")
        for logger in self.loggers:
            logger.log_hyperparams({f"parameters/{name}": count for name, count in counts.items()})

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the mean cross-entropy in nats a target token, and the number of target tokens."""
        terms, tokens = self.loss_terms(batch)
        return terms["cross_entropy"], tokens

    def loss_terms(self, batch: Batch, label_smoothing: float = 0.0) -> tuple[dict[str, Tensor], int]:
        """Return the parts of the loss, each a mean over target tokens, and the number of these.

        They are cross_entropy and, where the batch carries logits of the LLM, the divergence from them.
        """
        inputs = {name: value for name, value in batch.items() if name not in COLUMNS.values()}
        logits, targets = target_logits(self._built, inputs, self._built_codec.pad_id)
        entropy = self._cross_entropy(logits, targets, label_smoothing)
        terms = {"cross_entropy": entropy}
        if len(inputs) < len(batch):
            terms["divergence"] = self.distillation.divergence(logits, **{n: batch[n] for n in COLUMNS.values()})
        return terms, batch["sizes"].target if "sizes" in batch else targets.numel()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute and log train/loss, with label smoothing where the recipe has it (val/loss is without)."""
        if self._graphed is not None and not set(COLUMNS.values()) & set(batch):
            tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
            terms, tokens = {"cross_entropy": self._graphed(tensors)}, batch["sizes"].target
        else:
            terms, tokens = self.loss_terms(batch, self.label_smoothing)
        loss = self.distillation.mix(**terms)
        bar = self.trainer.progress_bar_callback
        drawn_each_step = bar is not None and not isinstance(bar, TrainingProgress)
        self.log("train/loss", loss.detach(), prog_bar=drawn_each_step, batch_size=tokens)
        if "divergence" in terms:
            self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, batch_size=tokens)
        return loss * token_share(tokens, loss.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add to val/loss and val/perplexity."""
        loss, tokens = self.loss(batch)
        self.val_loss.update(loss.detach(), tokens)

    test_step = validation_step

    def on_validation_start(self) -> None:
        """Run uncompiled: shapes vary, and each would be compiled until torch gives up, on training too."""
        torch.compiler.set_stance("force_eager" if self.compile_blocks else "default")

    def on_validation_end(self) -> None:
        """Go back to what was compiled."""
        torch.compiler.set_stance("default")

    def on_validation_epoch_start(self) -> None:
        """Start the monitors anew."""
        self.val_loss.reset()
        self.val_bleu.reset()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log val/loss (nats a token), val/perplexity and val/bleu."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log test/loss, test/perplexity and test/bleu."""
        self._log_scores("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        """Generate a prediction for each example: id, prompt, target (as reference) and prediction."""
        predictions = self.predict(batch["examples"])
        return [
            {"id": e["id"], "prompt": e["prompt"], "reference": e["target"], "prediction": p}
            for e, p in zip(batch["examples"], predictions, strict=True)
        ]

    def predict(self, examples: list[dict[str, str]]) -> list[str]:
        """Generate for a list of examples as the evaluation does, through `System`."""
        model = self._built
        was_training = model.training
        system = System(self.system, model, self._built_codec, card={}, decoder="generate")
        limit = self._built_codec.text_format.max_target_tokens
        if self.trainer.sanity_checking:  # an untrained model does not end before its limit
            limit = min(limit, SANITY_TOKENS)
        with gathered(model):
            generations = system.generate([example["prompt"] for example in examples], max_new_tokens=limit)
        model.train(was_training)
        return [generation.text for generation in generations]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimise what requires a gradient; warm up linearly, then follow the schedule to the last step."""
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        total = self.trainer.estimated_stepping_batches
        if self.schedule != "constant" and not math.isfinite(total):
            raise UserError(f"model.schedule {self.schedule} needs an end: set trainer.max_steps or max_epochs")
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        steps = int(total) if math.isfinite(total) else None
        scheduler = get_scheduler(name, optimizer, self.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, fused optimizers too: its mixed precision refuses them even without a scaler."""
        plugin = self.trainer.precision_plugin
        if gradient_clip_val and isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen encoder out and note what the rest belongs to."""
        state = checkpoint["state_dict"]
        frozen = self._frozen(state)
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k not in frozen}
        checkpoint["composition"] = self.composition()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another composition; lend it what strict loading asks for.

        That is the frozen encoder's weights, and those names of tied weights that a sharded checkpoint leaves out.
        """
        theirs, ours = checkpoint.get("composition"), self.composition()
        if theirs != ours:
            theirs = theirs or {}
            key = next(k for k in ours | theirs if theirs.get(k) != ours.get(k))
            raise UserError(
                f"the checkpoint is of another composition: its {key} is {theirs.get(key)!r}, "
                f"the recipe's is {ours.get(key)!r}; "
                "give the recipe that it was trained with (--ckpt_path)"
            )
        state = self.state_dict()
        checkpoint["state_dict"] |= {k: state[k] for k in self._frozen(state)}
        checkpoint["state_dict"] = with_tied(checkpoint["state_dict"], self)

    def composition(self) -> dict[str, Any]:
        """Name what the trained weights fit: system, architectures and parts, in plain types."""
        model = self._built
        if isinstance(model, LlmToSlm):
            config = model.config
            parts = {name: dict(getattr(config, name)) for name in ("projector", "alignment", "fusion")}
            return {"system": self.system, "encoder_hash": config.encoder_hash} | parts | shape_of(model.slm)
        return {"system": self.system} | shape_of(model)

    def _frozen(self, names: Iterable[str]) -> set[str]:
        """Return the names of what is not trained and not saved: the frozen encoder, and the base of adapters."""
        base = {f"model.{name}" for name in base_names(self._built)}
        composed = isinstance(self._built, LlmToSlm)  # a T5 has an encoder too, which is trained
        return {name for name in names if (composed and name.startswith(ENCODER_KEY)) or name in base}

    # --- small helpers ------------------------------------------------------------------------------------------------

    @property
    def _built(self) -> PreTrainedModel:
        if self.model is None:
            raise RuntimeError("the system is not built yet: configure_model or make_codec comes first")
        return self.model

    @property
    def _built_codec(self) -> Codec:
        if self.codec is None:
            raise RuntimeError("the system is not built yet: configure_model or make_codec comes first")
        return self.codec

    def _log_scores(self, stage: str) -> None:
        loss = self.val_loss.compute()
        self.log(f"{stage}/loss", loss, prog_bar=True)
        self.log(f"{stage}/perplexity", loss.exp())
        if self.bleu_examples > 0:
            self._predict_sample("validation" if stage == "val" else "test")
            self.log(f"{stage}/bleu", 100 * self.val_bleu.compute(), prog_bar=True)
        if stage == "val" and isinstance(self.model, LlmToSlm):
            self.log_dict(self.model.metrics())

    def _predict_sample(self, split: Split) -> None:
        """Add predictions of a part of a split to the BLEU monitor, the same ones on any number of ranks.

        Ranks that share an encoder read prompts together, so one that has no batch left predicts for nothing.
        """
        batches = self.trainer.datamodule.sample(split, self.bleu_examples)  # type: ignore[attr-defined]
        if self.trainer.sanity_checking:
            batches = batches[:1]
        for first in range(0, len(batches), self.trainer.world_size):
            mine = first + self.trainer.global_rank
            examples = batches[min(mine, len(batches) - 1)]
            predictions = self.predict(examples)
            counted = len(examples) if mine < len(batches) else 0
            self.val_bleu.update(predictions[:counted], [[example["target"]] for example in examples[:counted]])


def shape_of(model: PreTrainedModel) -> dict[str, Any]:
    """Name a model's architecture: its type and the shape of each weight's name, hashed by transformers' config."""
    config = model.config
    shape = {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
    }
    base = frozen_base(config)
    return shape if base is None else shape | {"frozen_base": base["hash"], "train": base["lora"]}
