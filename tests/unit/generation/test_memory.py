"""The peak of a call is predicted, refused where it cannot fit, and does not grow from prompt to prompt."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llmslm.errors import UserError
from llmslm.generation import memory
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.int8 import to_int8
from llmslm.generation.memory import Front, LiveBytes, front_bound, predict, predict_with, require, require_with
from llmslm.models.alignment import EncoderTokenizer
from llmslm.models.fusion import Prefix, Replace, ReplaceEncoder
from llmslm.models.projector import Resampler
from llmslm.models.sides import complete_sides
from tests import tiny as tiny_models
from tests.unit.generation.families import BUILD, prompts, tiny
from tests.unit.models.compositions import compose

SIDES = ("input_ids", "attention_mask", "prompt_ids", "prompt_attention_mask")


@pytest.mark.parametrize("family", BUILD)
@pytest.mark.parametrize(("batch", "length"), [(2, 8), (16, 60)])
def test_the_prediction_is_near_the_peak(family: str, batch: int, length: int) -> None:
    model = tiny(family)
    engine = DecodeEngine(model)
    assert engine.decoder is not None
    predicted = predict(model, engine.decoder, engine.call_sizes(batch, length, 20)).added
    with LiveBytes() as live:
        engine.generate(**prompts(model, batch, length), max_new_tokens=20, min_new_tokens=20)
    assert predicted == pytest.approx(live.peak, rel=0.15)


def test_weights_of_8_bits_are_predicted_too() -> None:
    model = tiny("gpt2")
    whole = memory.weight_bytes(model, DecodeEngine(model).decoder)
    to_int8(model)
    engine = DecodeEngine(model)
    predicted = predict(model, engine.decoder, engine.call_sizes(4, 30, 20))
    assert predicted.weights < whole / 2
    with LiveBytes() as live:
        engine.generate(**prompts(model, 4, 30), max_new_tokens=20, min_new_tokens=20)
    assert predicted.added == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_cannot_fit_is_refused_and_what_is_advised_fits(family: str) -> None:
    model = tiny(family)
    engine = DecodeEngine(model)
    call = engine.call_sizes(64, 40, 20)
    free = predict(model, engine.decoder, call).added // 3
    with pytest.raises(UserError, match=r"a batch of 64 with 40 prompt tokens .* a batch of \d+ would fit") as refusal:
        require(model, engine.decoder, call, free)
    fits = int(re.findall(r"a batch of (\d+) would", str(refusal.value))[0])
    assert 18 <= fits <= 22
    require(model, engine.decoder, engine.call_sizes(fits, 40, 20), free)
    with pytest.raises(UserError, match="not even one row would fit: shorten"):
        require(model, engine.decoder, call, 1000)


@pytest.mark.parametrize(
    ("encoder", "slm", "parts"),
    [
        ("t5", "llama", {}),
        ("llama", "t5", {"fusion": Prefix}),
        ("bert", "gpt2", {"fusion": Prefix}),
        ("gpt2", "bart", {"fusion": ReplaceEncoder}),
        ("opt", "llama", {"fusion": Replace, "alignment": EncoderTokenizer}),
        ("t5", "t5", {"fusion": Prefix, "projector": partial(Resampler, states=40)}),
    ],
)
@pytest.mark.parametrize("padded", [True, False])
def test_what_comes_before_the_slm_is_predicted_and_refused_first(
    encoder: str, slm: str, parts: dict[str, Any], padded: bool, tmp_path: Path
) -> None:
    model = compose(encoder, slm, tmp_path, **parts)
    engine, (ids, mask) = DecodeEngine(model.slm), repeated(tiny_models.prompts(), 8)
    mask = mask if padded else torch.ones_like(mask)
    mine = complete_sides(model.config, model.prompt_layout, None, None, ids, mask)
    front = Front(model, "slm_inputs", dict(zip(SIDES, mine, strict=True)))
    call_of = partial(engine.call_sizes, len(ids), max_new_tokens=20, embedded=True)
    predicted, call = predict_with(front, call_of, model.slm, engine.decoder)
    with torch.no_grad(), LiveBytes() as live:
        inputs = model.slm_inputs(**front.batch)
        before = live.peak
        engine.generate(**inputs, max_new_tokens=20, min_new_tokens=20)
    assert call.length == next(iter(inputs["attention_mask"].shape[1:]))
    assert predicted.added == pytest.approx(live.peak, rel=0.15)
    assert before < front_bound(front)
    known: dict[Any, Any] = {}
    with pytest.raises(UserError, match=r"a batch of 24 with .* a batch of \d+ would fit"):
        require_with(front, call_of, model.slm, engine.decoder, known, predicted.added // 2)
    require_with(front, call_of, model.slm, engine.decoder, known, predicted.added)
    assert len(known) == 2  # a bound and a prediction


def repeated(tensors: tuple[torch.Tensor, ...], times: int) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.repeat(times, 1) for tensor in tensors)


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    files = {"memory.max": "5000\n", "memory.current": "3000\n", "memory.stat": "anon 2000\ninactive_file 700\n"}
    assert memory._left_in_container(tmp_path) is None
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert memory._left_in_container(tmp_path) == 2700
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._left_in_container(tmp_path) is None


def test_kept_states_are_given_up_before_a_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    engine = DecodeEngine(model)
    engine.generate(**prompts(model, 2, 5), max_new_tokens=3)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**9 if not engine._loops else 10)
    engine.generate(**prompts(model, 3, 5), max_new_tokens=3)
    assert len(engine._loops) == 1
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10)
    with pytest.raises(UserError, match="are free on cpu"):
        engine.generate(**prompts(model, 4, 5), max_new_tokens=3)


def test_a_thousand_prompts_leave_nothing_behind() -> None:
    model = tiny("gpt2")
    engine = DecodeEngine(model)
    batches = [prompts(model, 2, 3 + seed % 5, seed) for seed in range(10)]
    with LiveBytes() as live:
        for inputs in batches:  # all sizes; the last ones stay
            engine.generate(**inputs, max_new_tokens=2)
        after_ten, peak = live.now, live.peak
    for turn in range(490):
        engine.generate(**batches[turn % 10], max_new_tokens=2)
    with LiveBytes() as live:
        for inputs in batches:
            engine.generate(**inputs, max_new_tokens=2)
    assert len(engine._loops) <= engine.keep
    assert live.now <= after_ten
    assert live.peak <= peak
