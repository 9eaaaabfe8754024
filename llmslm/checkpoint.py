"""Systems on disk: one folder with config, trained weights, tokenizers and a card; written whole or not at all."""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from llmslm.data.codec import Codec, TextFormat
from llmslm.data.tokenizer import load_tokenizer, same_tokenizer, tokenizer_hash
from llmslm.errors import UserError
from llmslm.models.configuration import LlmToSlmConfig
from llmslm.models.language_model import ModelSource, load_language_model
from llmslm.models.modeling import LlmToSlm
from llmslm.models.source import SYSTEM_FOLDER, seen_from
from llmslm.models.trained import (
    FrozenBase,
    check_base,
    frozen_base,
    load_adapters,
    make_whole,
    moved,
    save_adapters,
)
from llmslm.writing import make_readable, raise_if_full

CARD = "system.json"
CARD_VERSION = 1
ENCODER_TOKENIZER = "encoder_tokenizer"


def save_system(
    folder: Path, model: PreTrainedModel, codec: Codec, card: dict[str, Any], *, weights: bool = True
) -> None:
    """Write a loadable folder: weights (what was trained, never the frozen encoder's), config, tokenizers, card.

    The folder appears under its name only when it is complete; one that was there before is replaced.

    Args:
        folder: where to write.
        model: a language model or a composition.
        codec: its codec.
        card: plain JSON values; `system` is one of llm, slm, llm_to_slm.
        weights: False leaves them out.

    Raises:
        UserError: if the disk is full.
    """
    with written_aside(folder) as aside:
        base = frozen_base(model.config)
        if base is not None:  # of a composition its config says it
            card = card | {"frozen_base": base | {"source": seen_from(base["source"], aside)}}
        if weights:
            model.save_pretrained(aside) if base is None else save_adapters(model, aside)
        else:
            _save_configs(model, aside)
        card = card | {"named_tokenizers": _save_tokenizers(aside, model, codec)}
        text = json.dumps(card | {"version": CARD_VERSION, "text_format": asdict(codec.text_format)}, indent=2)
        (aside / CARD).write_text(text + "\n", encoding="utf-8")


def load_parts(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    encoder_source: str | None = None,
    load_encoder: bool = True,
) -> tuple[PreTrainedModel, Codec, dict[str, Any]]:
    """Load model, codec and card of a run folder or of the system folder in it; arguments as for `LlmToSlm`.

    Adapters are folded into the weights beside which they were trained.

    Raises:
        UserError: if there is no system, its card is of a newer version, or its encoder is not the right one.
    """
    folder = find_system(folder)
    card = load_card(folder)
    if base := card.get("frozen_base"):
        model = _load_adapted(folder, base, dtype)
    else:
        model = _load_model(folder, dtype, encoder_source=encoder_source, load_encoder=load_encoder)
    codec = load_codec(folder, model, card)
    model.make_whole() if isinstance(model, LlmToSlm) else make_whole(model)
    return model, codec, card


def load_card(folder: Path) -> dict[str, Any]:
    """Read the card of a system folder.

    Raises:
        UserError: if it is of a newer version.
    """
    card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
    if card["version"] > CARD_VERSION:
        raise UserError(f"{folder / CARD} has version {card['version']}; this llmslm reads up to {CARD_VERSION}")
    return card


def load_codec(folder: Path, model: PreTrainedModel, card: dict[str, Any]) -> Codec:
    """Load the tokenizers of a system folder, and make the codec that its model needs.

    Raises:
        UserError: if a tokenizer that comes with a frozen model from its source is not what it was.
    """
    named, sources = card.get("named_tokenizers") or {}, _sources(model)
    slm_tokenizer = _named(sources["slm"], named["slm"]) if "slm" in named else load_tokenizer(str(folder))
    encoder_tokenizer = None
    if "encoder" in named:
        encoder_tokenizer = _named(sources["encoder"], named["encoder"])
    elif (folder / ENCODER_TOKENIZER).is_dir():
        encoder_tokenizer = load_tokenizer(str(folder / ENCODER_TOKENIZER))
    return codec_for(model, slm_tokenizer, encoder_tokenizer, TextFormat(**card["text_format"]))


def codec_for(model: PreTrainedModel, slm_tokenizer: Any, encoder_tokenizer: Any, text_format: TextFormat) -> Codec:
    """Make the codec that a model needs; its architecture decides about sides and layout."""
    composed = isinstance(model, LlmToSlm)
    return Codec(
        slm_tokenizer,
        encoder_tokenizer,
        text_format=text_format,
        is_encoder_decoder=bool(model.config.is_encoder_decoder),
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        has_encoder=composed,
        prompt_layout=model.prompt_layout if composed else "tokens",
        can_pack=model.can_pack if composed else True,
    )


def find_system(folder: str | Path) -> Path:
    """Return the folder that holds a system card: the given one or its `system` sub-folder."""
    for candidate in (Path(folder), Path(folder) / SYSTEM_FOLDER):
        if (candidate / CARD).is_file():
            return candidate
    raise UserError(
        f"{folder} holds no system ({CARD} is missing there and in {SYSTEM_FOLDER}/); "
        "expected a folder that `llmslm fit` wrote, for example runs/quickstart/llm_to_slm"
    )


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its name when the block ends well, and is removed otherwise."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        for weights in aside.rglob("*.safetensors"):
            make_readable(weights)
        old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise_if_full(error, f"{folder} was not written; free some space and run again")
        raise


@contextmanager
def cast_to(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it, what is trained of a model in float32 is of another dtype."""
    before = {p: p.data for p in model.parameters() if p.requires_grad and p.dtype == torch.float32}
    for parameter, values in before.items():
        parameter.data = values.to(dtype)
    try:
        yield
    finally:
        for parameter, values in before.items():
            parameter.data = values


def _sources(model: PreTrainedModel) -> dict[str, tuple[str | None, str | None]]:
    """Return source and revision of the frozen encoder and of the frozen base, None where there is none."""
    config = model.config
    composed = isinstance(config, LlmToSlmConfig)
    base = frozen_base(config.slm_config if composed else config)
    return {
        "slm": (None, None) if base is None else (base["source"], base["revision"]),
        "encoder": (config.encoder_source, config.encoder_revision) if composed else (None, None),
    }


def _save_tokenizers(folder: Path, model: PreTrainedModel, codec: Codec) -> dict[str, str]:
    """Write the tokenizers; of those that come with a frozen model from its source, return the hashes instead."""
    named = {}
    for role, tokenizer in (("slm", codec.slm_tokenizer), ("encoder", codec.encoder_tokenizer)):
        if tokenizer is None:
            continue
        if _comes_with(tokenizer, *_sources(model)[role]):
            named[role] = tokenizer_hash(tokenizer)
        else:
            tokenizer.save_pretrained(folder / ENCODER_TOKENIZER if role == "encoder" else folder)
    return named


def _comes_with(tokenizer: Any, source: str | None, revision: str | None) -> bool:
    if source is None:
        return False
    try:
        return same_tokenizer(load_tokenizer(source, revision), tokenizer)
    except UserError:
        return False


def _named(source: tuple[str | None, str | None], content: str) -> Any:
    tokenizer = load_tokenizer(str(source[0]), source[1])
    if tokenizer_hash(tokenizer) != content:
        raise UserError(
            f"the tokenizer at {source[0]!r} is not the one that this system was trained with; give the right source "
            "(encoder_source or frozen_base.source)"
        )
    return tokenizer


def _save_configs(model: PreTrainedModel, folder: Path) -> None:
    config = model.config
    if isinstance(config, LlmToSlmConfig):
        config = config.seen_from(folder)
    if frozen_base(config) is None:  # else it is the base's own
        config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def _load_adapted(folder: Path, base: FrozenBase, dtype: torch.dtype | None) -> PreTrainedModel:
    base = moved(base, folder)
    source = ModelSource(base["source"], base["revision"])
    model = load_language_model(source, None, f"{folder / CARD}: frozen_base", dtype or torch.float32)
    check_base(model, base)
    load_adapters(model, folder)
    return model


def _load_model(folder: Path, dtype: torch.dtype | None, **encoder: Any) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    kwargs: dict[str, Any] = {"dtype": dtype or torch.float32}
    try:
        if isinstance(config, LlmToSlmConfig):
            return LlmToSlm.from_pretrained(folder, **encoder, **kwargs)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto.from_pretrained(folder, use_safetensors=True, **kwargs)
    except OSError as error:
        raise UserError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
