"""Language models as transformers builds them."""

import pytest
import torch
from transformers import T5ForConditionalGeneration

from llmslm.errors import UserError
from llmslm.models.language_model import ModelSource, load_config, load_language_model
from tests.unit.data.test_codec import byte_tokenizer

T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}


def t5(encoder, decoder, tokenizer):
    torch.manual_seed(encoder)
    layers = {"num_layers": encoder, "num_decoder_layers": decoder}
    return load_language_model(ModelSource(config=T5 | layers), tokenizer, "model.llm").eval()


@pytest.mark.parametrize(("encoder", "decoder"), [(1, 3), (3, 1), (2, 2)])
def test_generate_works_with_more_or_fewer_layers_in_the_decoder(tmp_path, encoder, decoder):
    tokenizer = byte_tokenizer()
    model, assistant = t5(encoder, decoder, tokenizer), t5(4, 2, tokenizer)
    ids, limits = torch.tensor([[50, 60, 70]]), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **limits, use_cache=False)
    for more in ({}, {"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        assert model.generate(ids, **limits, **more).equal(expected)
    model.save_pretrained(tmp_path / "ours")
    del model.config.decoder_layers  # as others write it
    model.save_pretrained(tmp_path / "others")
    again = load_language_model(ModelSource(str(tmp_path / "others")), None, "model.llm").eval()
    for each in (again, T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()):
        assert each.generate(ids, **limits).equal(expected)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (T5 | {"dmodel": 32}, "model.slm.config has dmodel, which T5Config does not know; did you mean d_model?"),
        ({"model_type": "llama", "hidden_size": 16}, "not a valid 'llama' config.*not a multiple of the number of att"),
    ],
)
def test_a_config_that_would_be_another_model(config, text):
    with pytest.raises(UserError, match=text):
        load_config(ModelSource(config=config), None, "model.slm")


def test_a_key_that_has_no_effect_is_named():
    with pytest.warns(
        UserWarning, match="model.slm.config has d_model, which GPT2Config does not know: it has no effect"
    ):
        load_config(ModelSource(config={"model_type": "gpt2", "d_model": 16}), None, "model.slm")


def test_a_start_token_of_the_config_is_taken():
    config = load_config(ModelSource(config=T5 | {"decoder_start_token_id": 7}), None, "model.slm")
    assert config.decoder_start_token_id == 7


def test_a_config_in_older_names():
    config = {"model_type": "llama", "rope_theta": 500.0, "attn_implementation": "eager"}
    assert load_config(ModelSource(config=config), None, "model.slm").rope_parameters["rope_theta"] == 500
