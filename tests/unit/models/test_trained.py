"""What is trained of a language model: adapters and frozen bases, in memory, on disk and in the engine."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmslm.checkpoint import codec_for, load_parts, save_system
from llmslm.data.codec import Codec, TextFormat
from llmslm.data.tokenizer import load_tokenizer
from llmslm.errors import UserError
from llmslm.export import export
from llmslm.models.alignment import Offsets
from llmslm.models.encoder import Encoder
from llmslm.models.fusion import Add, CrossAttend
from llmslm.models.language_model import ModelSource, load_language_model
from llmslm.models.modeling import LlmToSlm
from llmslm.models.trained import Lora, count_parameters, make_whole, restrict
from llmslm.pipeline import LlmToSlmPipeline
from llmslm.system import System
from tests import tiny
from tests.unit.data.test_codec import byte_tokenizer
from tests.unit.data.tokenizers import bytes_of, words
from tests.unit.models.compositions import parts_for

FORMAT = TextFormat(max_prompt_tokens=40, max_target_tokens=12)
NOTHING = dict.fromkeys(("system", "encoder", "base"))
PROMPTS = ["def f(x):", "a", "some longer prompt than that"]
LORA = Lora(rank=4)
DORA = Lora(rank=4, dora=True)


def source(family, tmp_path):
    ids = {"vocab_size": len(byte_tokenizer()), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tiny.build(family, **ids).save_pretrained(tmp_path / family)
    return str(tmp_path / family)


def language_model(family, trained, tmp_path):
    folder = source(family, tmp_path)
    model = load_language_model(ModelSource(folder), None, "model.slm")
    restrict(model, trained, folder, None, "model.slm")
    return model.eval()


def composition(family, trained, tmp_path, fusion=Add):
    encoder = source("t5", tmp_path)
    parts = parts_for(32, 32) | {"fusion": fusion(32, 32)}
    slm = language_model(family, trained, tmp_path)
    return LlmToSlm.compose(Encoder.from_source(encoder), slm, **parts, encoder_source=encoder).eval()


def disturb(model):
    """As training would, but far: change all that has a gradient."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)


def codec_of(model, composed):
    config = model.config
    return Codec(
        byte_tokenizer(),
        text_format=FORMAT,
        is_encoder_decoder=config.is_encoder_decoder,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
        has_encoder=composed,
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
def test_a_saved_llm_is_its_adapters_and_decodes_merged(family, lora, tmp_path):
    model = language_model(family, lora, tmp_path)
    disturb(model)
    trained = count_parameters(model)["trained"]
    save_system(tmp_path / "system", model, codec_of(model, False), {"system": "llm", "trained_parameters": trained})
    assert size(tmp_path / "system") <= 4 * trained + 2**20
    assert sum(w.numel() for w in load_file(tmp_path / "system" / "adapter_model.safetensors").values()) == trained
    unmerged = System("llm", model, codec_of(model, False), {}, decoder="generate")
    system = System.load(tmp_path / "system")
    assert system.generate(PROMPTS, max_new_tokens=8) == unmerged.generate(PROMPTS, max_new_tokens=8)
    system.decoder = "generate"
    assert system.generate(PROMPTS, max_new_tokens=8) == unmerged.generate(PROMPTS, max_new_tokens=8)
    assert system.parameters()["trained"] == trained
    assert not any("lora" in name for name in system.model.state_dict())


@pytest.mark.parametrize("trained", [LORA, DORA, "nothing", "full"], ids=str)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_saved_composition_is_what_was_trained(family, trained, tmp_path, caplog):
    model = composition(family, trained, tmp_path)
    disturb(model)
    count = count_parameters(model)["trained"]
    save_system(tmp_path / "system", model, codec_of(model, True), {"system": "llm_to_slm"})
    assert size(tmp_path / "system") <= 4 * count + 2**20
    assert sum(w.numel() for w in load_file(tmp_path / "system" / "model.safetensors").values()) == count
    unmerged = System("llm_to_slm", model, codec_of(model, True), {}, decoder="generate")
    expected = unmerged.generate(PROMPTS, max_new_tokens=8)
    assert System.load(tmp_path / "system").generate(PROMPTS, max_new_tokens=8) == expected
    again = LlmToSlm.from_pretrained(tmp_path / "system")
    assert count_parameters(again)["trained"] == count
    again.save_pretrained(tmp_path / "again" / "deeper")
    for name, weight in load_file(tmp_path / "again" / "deeper" / "model.safetensors").items():
        assert torch.equal(weight, model.state_dict()[name]), name
    LlmToSlm.from_pretrained(tmp_path / "again" / "deeper")
    assert "corrupted" not in caplog.text  # what transformers says where tied weights are left out


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_fusions_with_layers_of_their_own_stand_on_the_loaded_base(tmp_path):
    model = composition("llama", LORA, tmp_path, CrossAttend)
    disturb(model)
    model.save_pretrained(tmp_path / "system")
    again = LlmToSlm.from_pretrained(tmp_path / "system").eval()
    ids, mask = tiny.prompts()
    batch = {"prompt_ids": ids, "prompt_attention_mask": mask, "input_ids": ids, "attention_mask": mask}
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_gradients_reach_adapters_and_projector_alone(tmp_path):
    model = composition("gpt2", LORA, tmp_path).train()
    ids, mask = tiny.prompts()
    sides = {"prompt_ids": ids, "prompt_attention_mask": mask}
    model(**sides, input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    with_gradient = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert with_gradient == {n for n, _ in model.named_parameters() if ".lora_" in n or n.startswith("projector.")}


def test_whole_again_it_is_saved_as_a_model_of_its_own(tmp_path):
    model = language_model("llama", LORA, tmp_path)
    disturb(model)
    ids, mask = tiny.prompts()
    logits = model(input_ids=ids, attention_mask=mask).logits
    make_whole(model)
    model.save_pretrained(tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(whole(input_ids=ids, attention_mask=mask).logits, logits, atol=1e-4, rtol=1e-4)
    assert "frozen_base" not in json.loads((tmp_path / "whole" / "config.json").read_text())


@pytest.mark.parametrize("composed", [False, True], ids=["llm", "llm_to_slm"])
def test_another_base_is_refused(composed, tmp_path):
    model = composition("llama", LORA, tmp_path) if composed else language_model("llama", LORA, tmp_path)
    save_system(tmp_path / "system", model, codec_of(model, composed), {"system": "llm_to_slm" if composed else "llm"})
    source("llama", tmp_path)  # other random weights
    with pytest.raises(UserError, match=r"not the one that this system was trained on.*frozen_base\.source"):
        load_parts(tmp_path / "system")


def test_adapters_alone_are_no_source(tmp_path):
    model = language_model("llama", LORA, tmp_path)
    save_system(tmp_path / "system", model, codec_of(model, False), {"system": "llm"})
    with pytest.raises(UserError, match=r"adapters without the model.*export --merge"):
        load_language_model(ModelSource(str(tmp_path / "system")), None, "model.llm")
    with pytest.raises(UserError, match=r"adapters without the model.*export --merge"):
        Encoder.from_source(str(tmp_path / "system"))


def test_tokenizers_of_frozen_models_are_named_not_copied(tmp_path):
    """A pretrained tokenizer takes megabytes: adapters of a small model take less."""
    encoder = tmp_path / "t5"
    model = composition("llama", LORA, tmp_path)
    words().save_pretrained(encoder)
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    model.alignment = Offsets(32, 32)
    model.config.alignment = model.alignment.spec()
    theirs = load_tokenizer(str(encoder))
    codec = codec_for(model, bytes_of(template="<s> $A"), theirs, FORMAT)
    save_system(tmp_path / "copied", model, codec, {"system": "llm_to_slm"})
    codec = codec_for(model, byte_tokenizer(), theirs, FORMAT)
    save_system(tmp_path / "system", model, codec, {"system": "llm_to_slm"})
    assert not list((tmp_path / "system").rglob("tokenizer.json"))
    assert [path.parent.name for path in (tmp_path / "copied").rglob("tokenizer.json")] == ["copied"]
    system = System.load(tmp_path / "system")
    assert system.generate(PROMPTS, max_new_tokens=5)
    assert LlmToSlmPipeline(LlmToSlm.from_pretrained(tmp_path / "system"))("a", max_new_tokens=2)
    export(tmp_path / "system", tmp_path / "hub", records=[], licenses=NOTHING, sources=NOTHING)
    assert len(list((tmp_path / "hub").rglob("tokenizer.json"))) == 2
    encoder.joinpath("tokenizer.json").unlink()
    assert System.load(tmp_path / "hub").generate(PROMPTS, max_new_tokens=5) == system.generate(
        PROMPTS, max_new_tokens=5
    )
    byte_tokenizer().save_pretrained(encoder)
    with pytest.raises(UserError, match=r"the tokenizer at '.*t5' is not the one that this system was trained with"):
        System.load(tmp_path / "system")


def test_weights_in_pickles_are_refused(tmp_path):
    model = composition("llama", "full", tmp_path)
    save_system(tmp_path / "system", model, codec_of(model, True), {"system": "llm_to_slm"})
    weights = tmp_path / "system" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "system" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match=r"cannot be loaded: .*safetensors"):
        load_parts(tmp_path / "system")


@pytest.mark.parametrize(
    ("trained", "found", "message"),
    [
        (LORA, None, r"model\.slm\.config makes random ones; give model\.slm\.source"),
        (Lora(rank=0), "x", r"model\.slm\.train: rank is 0 and alpha 32; expected 1 or more of both"),
        (Lora(dropout=1), "x", r"model\.slm\.train: dropout is 1; expected at least 0 and less than 1"),
        (Lora(target_modules=["nope"]), "x", r"model\.slm\.train: Target modules .*nope"),
    ],
)
def test_mistakes_are_named(trained, found, message):
    with pytest.raises(UserError, match=message):
        restrict(tiny.build("llama"), trained, found, None, "model.slm")
