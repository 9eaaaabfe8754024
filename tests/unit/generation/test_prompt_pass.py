"""The pass before an slm decodes, as a graph runs it: padded, never waiting for a value, and still the model's own."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch

from llmslm.generation.graphs import MOST_TOKENS
from llmslm.generation.prompt_pass import PromptPass, _sizes
from llmslm.generation.state import padded_batch
from llmslm.models.alignment import HIDES_PROMPT, EncoderTokenizer
from llmslm.models.fusion import Add, Prefix, PrefixOnly, ReplaceEncoder
from llmslm.models.projector import Resampler
from tests import tiny
from tests.unit.models.compositions import compose, left
from tests.unit.test_system import PROMPTS, make

ON_CUDA = [False, pytest.param(True, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.fixture(autouse=True)
def graphs_pay(monkeypatch):
    """Without CUDA what a graph would run is called."""
    monkeypatch.setattr(PromptPass, "_pays", lambda *_: True)


def batch_of(model, rows=3, device="cpu"):
    ids, mask = tiny.prompts(rows)
    own = (ids, mask) if model.config.is_encoder_decoder else (left(ids, mask), left(mask, mask))
    if model.prompt_layout in HIDES_PROMPT:
        own = (torch.ones(rows, 1, dtype=torch.long),) * 2
    batch = {"input_ids": own[0], "attention_mask": own[1], "prompt_ids": ids, "prompt_attention_mask": mask}
    return {name: value.to(device) for name, value in batch.items()}


def padded_for(run, batch):
    """A batch that was made without the pass's lengths, padded to them."""
    if not run._pays(*_sizes(batch)):
        return batch
    return padded_batch(batch, run._length, left=not run.model.config.is_encoder_decoder)


def attended(result):
    states = result["inputs_embeds"] if "inputs_embeds" in result else result["encoder_outputs"][0]
    return states[result["attention_mask"].bool()]


@pytest.mark.parametrize("on_cuda", ON_CUDA)
@pytest.mark.parametrize("slm", ["llama", "t5", "bart"])
@pytest.mark.parametrize("encoder", ["t5", "bart", "llama", "gpt2", "qwen2", "bert", "opt"])
def test_it_gives_what_the_model_does(encoder, slm, on_cuda, tmp_path):
    device = "cuda" if on_cuda else "cpu"
    model = compose(encoder, slm, tmp_path).to(device)
    run = PromptPass(model)
    for rows in (3, 1, 3):
        batch = batch_of(model, rows, device)
        padded = padded_for(run, batch)
        assert run.agrees(padded)
        torch.testing.assert_close(attended(run(padded)), attended(model.slm_inputs(**batch)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("slm", "parts"),
    [
        ("llama", {"fusion": Prefix}),
        ("llama", {"fusion": PrefixOnly, "projector": Resampler}),
        ("t5", {"fusion": ReplaceEncoder}),
        ("t5", {"fusion": Prefix}),
        ("bart", {"fusion": Add, "alignment": EncoderTokenizer}),
        ("llama", {"fusion": Add, "alignment": EncoderTokenizer}),
    ],
)
def test_all_that_ends_with_the_prompt_can(slm, parts, tmp_path):
    model = compose("llama", slm, tmp_path, **parts)
    run = PromptPass(model)
    batch = batch_of(model)
    torch.testing.assert_close(
        attended(run(padded_for(run, batch))), attended(model.slm_inputs(**batch)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("slm", ["llama", "t5"])
def test_a_batch_is_made_as_long_as_it_would_be_padded(slm, monkeypatch):
    system = make(slm, encoder_family="llama")
    rows, run = system.codec.encode(PROMPTS), system._prompt_pass
    expected = padded_for(run, system.codec.collate_prompts(rows))
    found = system.codec.collate_prompts(rows, run.lengths)
    assert {name: value.tolist() for name, value in found.items()} == {n: v.tolist() for n, v in expected.items()}
    assert found["prompt_ids"].shape[1] % 32 == 0
    monkeypatch.setattr(PromptPass, "_pays", lambda *_: False)
    assert run.lengths(2, {"input_ids": 5, "prompt_ids": 6}) == {"input_ids": 5, "prompt_ids": 6}


@pytest.mark.parametrize(
    ("slm", "parts"), [("llama", {}), ("llama", {"alignment": EncoderTokenizer, "fusion": Add}), ("t5", {})]
)
def test_what_is_left_out_beside_fused_passes_is_not_missed(slm, parts, tmp_path):
    """An encoder and a projector that need no documents are given none, if nothing else reads them."""
    model = compose("llama", slm, tmp_path, **parts)
    run, batch = PromptPass(model), batch_of(model)
    states = model.encoder(batch["prompt_ids"], batch["prompt_attention_mask"])[0]
    run._fused = {"encoder": lambda *_: states, "projector": lambda states, *_: model.projector(states)}
    found = run._of_padded(*(batch[name] for name in sorted(batch)))
    torch.testing.assert_close(attended(found), attended(model.slm_inputs(**batch)), atol=1e-4, rtol=1e-4)


def test_a_graph_pays_for_small_batches_on_cuda(monkeypatch):
    monkeypatch.undo()
    run = make("llama", encoder_family="llama")._prompt_pass
    small, large = {"input_ids": 32, "prompt_ids": 32}, {"input_ids": 32, "prompt_ids": MOST_TOKENS}
    assert not run._pays(1, small)
    run._weight = Mock(device=torch.device("cuda"))
    assert run._pays(1, small)
    assert not run._pays(1, large)
    assert not run._pays(MOST_TOKENS // 64 + 1, small)


@pytest.mark.parametrize("encoder", ["gemma2", "modernbert", "roberta"])
def test_an_encoder_that_one_mask_for_all_layers_does_not_suit_runs_as_it_is(encoder, tmp_path):
    model = compose(encoder, "llama", tmp_path)
    run, batch = PromptPass(model), batch_of(model)
    padded = padded_for(run, batch)
    # Gemma 2's attention is one that the mask suits in transformers 5.17, the eager one in 5.23.
    assert encoder == "gemma2" or not run.agrees(padded)
    torch.testing.assert_close(attended(run(padded)), attended(model.slm_inputs(**batch)), atol=1e-4, rtol=1e-4)


def test_what_waits_for_a_value_is_not_captured(tmp_path):
    model = compose("llama", "llama", tmp_path)
    run, batch = PromptPass(model), batch_of(model)
    assert run.agrees(batch)
    model.projector.register_forward_pre_hook(lambda _module, inputs: inputs if inputs[0].sum() else None)
    assert not run.agrees(batch)


@pytest.mark.parametrize("slm", ["llama", "t5"])
def test_a_system_predicts_the_same(slm, monkeypatch):
    system = make(slm, encoder_family="llama")
    found = [g.text for g in system.generate(PROMPTS, max_new_tokens=8)]
    monkeypatch.setattr(PromptPass, "_pays", lambda *_: False)
    assert [g.text for g in system.generate(PROMPTS, max_new_tokens=8)] == found


@pytest.mark.parametrize("control", [None, "zero"])
def test_what_a_graph_gave_is_decoded_before_another_thread_overwrites_it(control, monkeypatch):
    system = make("llama", encoder_family="llama")
    calls = [(system, "abc"), (system if control is None else system.with_features(control), "xyz")]

    def answer(call):
        return call[0].generate([call[1]], max_new_tokens=8)

    expected = [answer(call) for call in calls]
    run, place, both = PromptPass.__call__, [], threading.Barrier(2)

    def replayed(self, batch):
        result = run(self, batch)
        place[:] = place or [result["inputs_embeds"].clone()]
        place[0].copy_(result["inputs_embeds"])
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)
        return result | {"inputs_embeds": place[0]}

    monkeypatch.setattr(PromptPass, "__call__", replayed)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(answer, calls))
    assert found == expected
    assert expected[0] != expected[1], "the case is void otherwise"


def test_controls_share_the_copies_of_weights(monkeypatch):
    made = []

    def encoder_pass(encoder, positions):
        made.append(Mock(side_effect=lambda ids, mask: encoder(ids, mask, mask - 1)[0], decoder=None))
        return made[-1]

    monkeypatch.setattr("llmslm.generation.prompt_pass.encoder_pass_for", encoder_pass)
    system, plain = make("llama", encoder_family="llama"), make("llama", "generate", encoder_family="llama")
    found = system.generate(PROMPTS, max_new_tokens=8)
    for control in ("zero", "shuffled"):
        other = system.with_features(control)
        texts = other.generate(PROMPTS, max_new_tokens=8)
        assert texts == plain.with_features(control).generate(PROMPTS, max_new_tokens=8) != found
        assert other.engine is system.engine
    assert system.generate(PROMPTS, max_new_tokens=8) == found
    assert len(made) == 1
