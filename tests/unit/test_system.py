"""A system as it is used: engine and generate() agree, batches do not matter, controls destroy the message."""

import pytest
import torch

from llmslm.data.codec import Codec, TextFormat
from llmslm.errors import UserError
from llmslm.models.alignment import SameTokenizer
from llmslm.models.encoder import Encoder
from llmslm.models.fusion import Add
from llmslm.models.modeling import LlmToSlm
from llmslm.models.projector import MlpProjector
from llmslm.system import System, count_until
from tests import tiny
from tests.unit.data.test_codec import byte_tokenizer

PROMPTS = ["def f(x):", "a", "some longer prompt than that", "x y z"]


def make(family, decoder="engine", encoder_family="t5", tmp_path=None):
    """A random llm_to_slm system over a byte tokenizer."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    encoder = Encoder(_base(tiny.build(encoder_family, **vocabulary)))
    slm = tiny.build(family, **vocabulary)
    model = LlmToSlm.compose(
        encoder,
        slm,
        projector=MlpProjector(32, 32),
        alignment=SameTokenizer(32, 32),
        fusion=Add(32, 32),
    )
    codec = Codec(
        tokenizer,
        text_format=TextFormat(max_prompt_tokens=40, max_target_tokens=12),
        is_encoder_decoder=slm.config.is_encoder_decoder,
        decoder_start_token_id=getattr(slm.config, "decoder_start_token_id", None),
        has_encoder=True,
    )
    return System("llm_to_slm", model, codec, {}, decoder)


def _base(model):
    return model.get_encoder() if model.config.is_encoder_decoder else model.model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_engine_and_generate_agree(family):
    engine, generate = make(family), make(family, "generate")
    for limits in ({"max_new_tokens": 12}, {"max_new_tokens": 6, "min_new_tokens": 6}):
        assert engine.generate(PROMPTS, **limits) == generate.generate(PROMPTS, **limits)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_batch_predicts_what_single_prompts_do(family):
    system = make(family)
    batched = system.generate(PROMPTS, max_new_tokens=10)
    assert [system.generate([prompt], max_new_tokens=10)[0] for prompt in PROMPTS] == batched
    targets = ["one", "two words", "three", ""]
    scores = system.log_likelihood(PROMPTS, targets)
    for prompt, target, score in zip(PROMPTS, targets, scores, strict=True):
        alone = system.log_likelihood([prompt], [target])[0]
        assert alone.nats == pytest.approx(score.nats, rel=1e-4)
        assert alone.tokens == score.tokens


def test_fixed_length_is_fixed_and_the_callback_comes_once():
    calls = []
    generations = make("llama").generate(
        PROMPTS, max_new_tokens=9, min_new_tokens=9, on_first_token=lambda: calls.append(1)
    )
    assert [generation.tokens for generation in generations] == [9] * 4
    assert calls == [1]


def test_a_batch_that_cannot_fit_is_refused_before_the_encoder_runs(monkeypatch):
    system = make("t5")
    needed = system.predicted_memory(PROMPTS * 50, 9).added
    monkeypatch.setattr("llmslm.generation.memory.available_bytes", lambda device: needed // 2)
    monkeypatch.setattr("llmslm.system.fast_products", None)  # within it the encoder runs
    with pytest.raises(UserError, match=r"a batch of 200 with .* a batch of (99|100) would fit"):
        system.generate(PROMPTS * 50, max_new_tokens=9)


def test_a_device_is_asked_for_room_unless_a_graph_has_all_that_a_call_needs(monkeypatch):
    asked = []
    monkeypatch.setattr("llmslm.generation.memory.available_bytes", lambda device: asked.append(1) or 1 << 40)
    system = make("t5")
    numbers = []
    for captured in (False, False, True):
        monkeypatch.setattr(system._prompt_pass, "is_captured", lambda batch, captured=captured: captured)
        del asked[:]
        system.generate(PROMPTS[:1], max_new_tokens=9)
        numbers.append(len(asked))
    assert numbers == [2, 1, 0]  # in front of the slm, and once for its caches


def test_likelihood_is_that_of_the_model():
    system = make("llama")
    rows = system.codec.encode(["ab"], ["xyz"])
    batch = system.codec.collate(rows)
    logits = system.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0].double().log_softmax(-1)
    prompt = len(rows[0]["input_prompt_ids"])
    ids = batch["input_ids"][0]
    expected = -sum(logits[i - 1, ids[i]].item() for i in range(prompt, len(ids)))
    assert system.log_likelihood(["ab"], ["xyz"])[0].nats == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_controls_change_the_message_and_leave_the_system_alone(family):
    system = make(family)
    before = system.log_likelihood(PROMPTS, PROMPTS)
    for control in ("zero", "shuffled"):
        other = system.with_features(control)
        assert other.name == f"llm_to_slm/{control}_features"
        scores = other.log_likelihood(PROMPTS, PROMPTS)
        assert all(abs(a.nats - b.nats) > 1e-3 for a, b in zip(scores, before, strict=True))
    assert system.log_likelihood(PROMPTS, PROMPTS) == before


def test_shuffled_features_depend_on_the_batch_alone():
    shuffled = make("t5").with_features("shuffled")
    first = shuffled.log_likelihood(PROMPTS, PROMPTS)
    shuffled.log_likelihood(PROMPTS[::-1], PROMPTS)
    assert shuffled.log_likelihood(PROMPTS, PROMPTS) == first
    with pytest.raises(UserError, match="those of another prompt in the batch; give at least 2"):
        shuffled.generate(["first"], max_new_tokens=2)


def test_tokens_are_counted_to_the_end_of_sequence():
    assert count_until([[5, 2, 0, 0], [5, 6, 7, 8], [2, 0, 0, 0]], [2]) == [2, 4, 1]
    assert count_until([[5, 2, 3, 0], [5, 6, 3, 2], []], [2, 3]) == [2, 3, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_system_knows_where_its_model_was_moved():
    system = make("llama")
    for device in ("cuda", "cpu"):
        system.model.to(device)
        assert system.device.type == system._prompt_pass._weight.device.type == device


def test_parameters_that_decode_leave_the_encoders_out():
    parameters = make("t5").parameters()
    assert parameters["decoding"] < parameters["trained"] < parameters["total"]
