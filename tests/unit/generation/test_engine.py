"""The engine's tokens are `generate()`'s, for every family, batch, padding and end; and what it refuses."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llmslm.errors import UserError
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.sampling import Sampling
from tests.unit.generation.families import BUILD, EOS, PAD, VOCABULARY, by_generate, prompts, tiny

families = pytest.mark.parametrize("family", BUILD)


@families
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (5, 9), (64, 12)])
def test_greedy_tokens_are_those_of_generate(family: str, batch: int, length: int) -> None:
    model = tiny(family)
    inputs = prompts(model, batch, length)
    expected = by_generate(model, inputs, max_new_tokens=24)
    engine = DecodeEngine(model)
    assert engine.reason is None
    assert torch.equal(engine.generate(**inputs, max_new_tokens=24), expected)
    assert batch < 64 or expected.unique().numel() > 4, "the case is void if all tokens are the same"


@families
def test_ends_and_minimum_lengths_are_those_of_generate(family: str) -> None:
    model = tiny(family)
    inputs = prompts(model, 16, 6)
    common = by_generate(model, inputs, max_new_tokens=12).flatten().mode().values.item()
    model.generation_config.eos_token_id = [EOS, common]
    engine = DecodeEngine(model)
    free = by_generate(model, inputs, max_new_tokens=12)
    assert (free == PAD).any(), "some rows must end early"
    assert torch.equal(engine.generate(**inputs, max_new_tokens=12), free)
    late = by_generate(model, inputs, max_new_tokens=12, min_new_tokens=5)
    assert torch.equal(engine.generate(**inputs, max_new_tokens=12, min_new_tokens=5), late)


@families
def test_embeddings_and_encoder_states_serve_as_well_as_ids(family: str) -> None:
    model = tiny(family)
    inputs = prompts(model, 5, 8)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            other = {"encoder_outputs": model.get_encoder()(**inputs)}
        else:
            other = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    engine = DecodeEngine(model)
    expected = engine.generate(**inputs, max_new_tokens=10)
    assert torch.equal(engine.generate(**other, attention_mask=mask, max_new_tokens=10), expected)


@pytest.mark.parametrize("family", ["gpt2", "bart", "t5"])
def test_settings_of_the_generation_config_are_honoured(family: str) -> None:
    model = tiny(family)
    config = model.generation_config
    config.suppress_tokens = [7, 9]
    config.begin_suppress_tokens = [11, 12]
    config.forced_eos_token_id = EOS
    config.repetition_penalty = 1.7
    config.min_length = 9
    if model.config.is_encoder_decoder:
        config.forced_bos_token_id = 5
    # Whole prompts: whether padding counts as seen changed between releases of transformers.
    ids = prompts(model, 8, 5)["input_ids"].clamp(min=3)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = by_generate(model, inputs, max_new_tokens=10)
    assert torch.equal(DecodeEngine(model).generate(**inputs, max_new_tokens=10), expected)


@families
def test_ids_beyond_the_vocabulary_are_those_of_no_token(family: str) -> None:
    """Configs name -1 for "none", or the ids of a larger vocabulary; nothing may be read or written at such places."""
    model = tiny(family)
    inputs = prompts(model, 4, 6)
    config = model.generation_config
    config.eos_token_id = [EOS, -1, 10**6]
    engine = DecodeEngine(model)
    limits = {"max_new_tokens": 9, "min_new_tokens": 4}
    assert torch.equal(engine.generate(**inputs, **limits), by_generate(model, inputs, **limits))
    config.suppress_tokens, config.begin_suppress_tokens = [7, 10**6], [-1, 9]
    assert torch.equal(engine.generate(**inputs, **limits), by_generate(model, inputs, **limits))
    config.pad_token_id = -1  # generate() reads it as a token of rows that have ended, and fails
    config.eos_token_id = [EOS, int(by_generate(model, prompts(model, 1, 6), max_new_tokens=1))]
    assert engine.generate(**inputs, max_new_tokens=9).min() >= 0


@pytest.mark.parametrize(("minimum", "given"), [(None, 0), (None, 2), (3, 0), (0, 0), (3, 2)])
def test_which_of_several_minimum_lengths_holds(minimum: int | None, given: int) -> None:
    for family in ("gpt2", "t5"):
        model = tiny(family)
        inputs = prompts(model, 8, 3)
        config = model.generation_config
        config.eos_token_id = by_generate(model, inputs, max_new_tokens=6).unique().tolist()
        config.min_length, config.min_new_tokens = 9, minimum
        limits = {"max_new_tokens": 12, **({"min_new_tokens": given} if given else {})}
        tokens = DecodeEngine(model).generate(**inputs, **limits)
        assert torch.equal(tokens, by_generate(model, inputs, **limits))


def test_grouped_biased_and_scaled_variants_are_exact() -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        attention_bias=True,
        vocab_size=VOCABULARY,
        eos_token_id=EOS,
        pad_token_id=PAD,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).eval()
    inputs = prompts(model, 4, 6)
    engine = DecodeEngine(model)
    assert engine.reason is None
    assert torch.equal(engine.generate(**inputs, max_new_tokens=8), by_generate(model, inputs, max_new_tokens=8))


def test_a_prompt_without_any_token_is_decoded_as_generate_does() -> None:
    model = tiny("t5")
    inputs = prompts(model, 3, 7)
    inputs["attention_mask"][1] = 0
    tokens = DecodeEngine(model).generate(**inputs, max_new_tokens=8, min_new_tokens=8)
    assert torch.equal(tokens, by_generate(model, inputs, max_new_tokens=8, min_new_tokens=8))


def test_a_state_is_used_again_without_traces_of_the_last_call() -> None:
    model = tiny("llama")
    engine = DecodeEngine(model)
    first, second = prompts(model, 3, 6, seed=1), prompts(model, 3, 6, seed=2)
    expected = engine.generate(**first, max_new_tokens=8)
    engine.generate(**second, max_new_tokens=8)
    assert torch.equal(engine.generate(**first, max_new_tokens=8), expected)
    for length in range(1, 9):
        engine.generate(**prompts(model, 3, length), max_new_tokens=8)
    assert len(engine._loops) == engine.keep


def test_a_state_made_in_inference_mode_serves_calls_outside_of_it() -> None:
    engine = DecodeEngine(tiny("llama"))
    ids = torch.randint(3, VOCABULARY - 1, (2, 9))
    with torch.inference_mode():
        within = engine.generate(input_ids=ids, max_new_tokens=6)
    assert torch.equal(engine.generate(input_ids=ids, max_new_tokens=6), within)


def test_calls_from_several_threads_wait_for_each_other() -> None:
    model = tiny("gpt2")
    engine = DecodeEngine(model)
    inputs = [prompts(model, 3, 5, seed=seed) for seed in range(4)]
    expected = [engine.generate(**one, max_new_tokens=12) for one in inputs]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda index: engine.generate(**inputs[index % 4], max_new_tokens=12), range(16)))
    assert all(torch.equal(tokens, expected[index % 4]) for index, tokens in enumerate(results))


def test_tokens_are_handed_out_as_they_come() -> None:
    model = tiny("gpt2")
    events: list[torch.Tensor | str] = []
    tokens = DecodeEngine(model).generate(
        **prompts(model, 2, 4),
        max_new_tokens=6,
        on_first_token=lambda: events.append("first"),
        on_tokens=events.append,
    )
    assert events[0] == "first"
    assert torch.equal(torch.cat(events[1:], dim=1), tokens)


@pytest.mark.parametrize("setting", [{"num_beams": 2, "num_return_sequences": 2}, {"no_repeat_ngram_size": 2}])
def test_what_only_generate_can_do_is_left_to_it_with_the_reason(setting: dict[str, int]) -> None:
    model = tiny("bart")
    inputs = prompts(model, 2, 5)
    engine = DecodeEngine(model)
    for key, value in setting.items():
        setattr(model.generation_config, key, value)
    expected = by_generate(model, inputs, max_new_tokens=6, num_return_sequences=1)
    model.generation_config.return_dict_in_generate = True
    with pytest.warns(UserWarning, match=next(iter(setting))):
        tokens = engine.generate(**inputs, max_new_tokens=6)
    assert torch.equal(tokens, expected)


def test_a_step_that_differs_from_the_model_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    original = type(model.model.norm).forward
    monkeypatch.setattr(type(model.model.norm), "forward", lambda self, x: original(self, x) * 1.1)
    engine = DecodeEngine(model)
    assert engine.reason is not None
    with pytest.warns(UserWarning, match="differ from the model's own"):
        engine.generate(**prompts(model, 2, 5), max_new_tokens=4)


def test_positions_beyond_the_model_are_left_to_generate() -> None:
    model = tiny("llama")
    with pytest.warns(UserWarning, match="exceed the 128 positions"):
        DecodeEngine(model).generate(**prompts(model, 1, 120), max_new_tokens=10)


def test_sliding_windows_are_served_as_long_as_they_hold_the_whole_text() -> None:
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "pad_token_id": PAD}
    torch.manual_seed(1)
    model = MistralForCausalLM(MistralConfig(**settings, **ids, num_key_value_heads=2, sliding_window=16)).eval()
    engine = DecodeEngine(model)
    inputs = prompts(model, 3, 6)
    assert torch.equal(engine.generate(**inputs, max_new_tokens=10), by_generate(model, inputs, max_new_tokens=10))
    with pytest.warns(UserWarning, match="17 tokens exceed the sliding window of 16"):
        longer = engine.generate(**inputs, max_new_tokens=11)
    assert torch.equal(longer, by_generate(model, inputs, max_new_tokens=11))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"attention_mask": torch.ones(2, 3)}, "mask must be"),
        ({"inputs_embeds": torch.ones(2, 4, 32)}, "one of them"),
        ({"input_ids": None}, "no input given"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, "at least one of each"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, "at least one of each"),
        ({"input_ids": torch.ones(1, 129, dtype=torch.long), "attention_mask": None}, "has 128 positions; cut"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], text: str) -> None:
    model = tiny("gpt2")
    arguments = {**prompts(model, 2, 4), "max_new_tokens": 3, **change}
    with pytest.raises(UserError, match=text):
        DecodeEngine(model).generate(**arguments)


def test_a_model_in_training_mode_is_refused() -> None:
    model = tiny("gpt2")
    engine = DecodeEngine(model)
    model.train()
    with pytest.raises(UserError, match=r"model\.eval"):
        engine.generate(**prompts(model, 2, 4), max_new_tokens=3)


def test_sampling_repeats_with_its_seed_and_stays_inside_its_cuts() -> None:
    model = tiny("gpt2")
    inputs = prompts(model, 64, 4)
    engine = DecodeEngine(model)

    def drawn(**kwargs: float) -> torch.Tensor:
        return engine.generate(**inputs, max_new_tokens=6, min_new_tokens=6, sampling=Sampling(**kwargs))

    assert torch.equal(drawn(seed=3), drawn(seed=3))
    assert not torch.equal(drawn(seed=3), drawn(seed=4))
    greedy = engine.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
    for alone in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 0.0}, {"temperature": 1e-40}):
        assert torch.equal(drawn(**alone), greedy)


def test_sampling_follows_the_distribution() -> None:
    model = tiny("gpt2")
    ids = torch.full((4000, 1), 5)
    with torch.no_grad():
        logits = model(ids[:1]).logits[0, -1] / 2.0
    logits[EOS] = float("-inf")
    kept = logits.topk(5)
    expected = torch.zeros(VOCABULARY).index_copy(0, kept.indices, kept.values.softmax(dim=0))
    settings = Sampling(temperature=2.0, top_k=5)
    tokens = DecodeEngine(model).generate(input_ids=ids, max_new_tokens=1, min_new_tokens=1, sampling=settings)
    seen = tokens.flatten().bincount(minlength=VOCABULARY) / 4000
    assert (seen - expected).abs().max() < 0.03


@pytest.mark.parametrize("key", ["temperature", "top_k", "top_p", "repetition_penalty"])
def test_settings_of_sampling_out_of_range_are_named(key: str) -> None:
    with pytest.raises(UserError, match=f"change {key}"):
        Sampling(**{key: -1})
