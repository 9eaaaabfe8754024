"""The compiled step on the CPU gives the logits of plain torch, in each dtype; without a compiler torch serves."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmslm.generation import native
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.families import read
from llmslm.generation.native import NativeStep
from llmslm.generation.plan import Decoder
from llmslm.generation.state import DecodeState
from llmslm.generation.step import TorchStep
from tests.unit.generation.families import BUILD, by_generate, prompts, tiny

compiled = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def _after_tokens(kind: type[TorchStep], decoder: Decoder, batch: int) -> Tensor:
    """Logits of four steps over a cache of noise whose rows have some padding."""
    generator = torch.Generator().manual_seed(0)
    cross = 6 if decoder.crosses else 0
    sizes = {"batch": batch, "capacity": 12, "encoder_capacity": cross, "mode": "plain", "penalise": False}
    dtype = decoder.embedding.dtype
    state = DecodeState(decoder.shape, **sizes, device=torch.device("cpu"), dtype=dtype)
    state.cache.copy_(torch.randn(state.cache.shape, generator=generator))
    state.cross.copy_(torch.randn(state.cross.shape, generator=generator))
    state.valid.fill_(True)
    state.valid[0, :2] = False
    state.encoder_valid.fill_(True)
    state.encoder_valid[:1, -2:] = False
    step, logits = kind(decoder, state), []
    for filled in range(5, 9):
        state.token.copy_(torch.randint(0, 61, (batch,), generator=generator))
        state.position.fill_(filled)
        logits.append(step.logits(filled).float().clone())
    return torch.stack(logits)


def _difference(decoder: Decoder, batch: int) -> float:
    own, lean = _after_tokens(TorchStep, decoder, batch), _after_tokens(NativeStep, decoder, batch)
    return float((own - lean).norm() / own.norm())


@compiled
@pytest.mark.parametrize("family", BUILD)
def test_logits_are_those_of_plain_torch(family: str) -> None:
    decoder = read(tiny(family), 128)
    for batch in (1, 3, 6):
        assert _difference(decoder, batch) < 1e-5


@compiled
@pytest.mark.parametrize("family", ["qwen3", "t5"])
def test_the_number_of_threads_changes_nothing(family: str) -> None:
    """Also more threads than there are cores, or pieces of work: each piece is done once, after what it needs."""
    decoder, before = read(tiny(family), 128), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _after_tokens(NativeStep, decoder, 3)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for _ in range(10):
                assert torch.equal(_after_tokens(NativeStep, decoder, 3), alone)
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "t5", "bart"])
def test_in_bfloat16_they_differ_by_rounding(family: str) -> None:
    assert _difference(read(tiny(family).bfloat16(), 128), 2) < 0.03


def _exact_gelu(model: PreTrainedModel) -> Decoder:
    decoder = read(model, 128)
    sublayers = [replace(s, into=replace(s.into, activation=s.into.activation and "gelu")) for s in decoder.sublayers]
    return replace(decoder, sublayers=sublayers)


@compiled
def test_every_activation_is_known() -> None:
    assert _difference(_exact_gelu(tiny("gpt2")), 1) < 1e-5


@compiled
def test_the_cpu_is_served_by_it() -> None:
    model = tiny("gpt2")
    engine = DecodeEngine(model)
    engine.generate(**prompts(model, 2, 5), max_new_tokens=3)
    assert isinstance(next(iter(engine._loops.values())).step, NativeStep)


def test_without_a_compiler_plain_torch_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        model = tiny("llama")
        inputs = prompts(model, 2, 5)
        engine = DecodeEngine(model)
        assert torch.equal(engine.generate(**inputs, max_new_tokens=6), by_generate(model, inputs, max_new_tokens=6))
        assert type(next(iter(engine._loops.values())).step) is TorchStep
    finally:
        native.library.cache_clear()
