"""Peers and systems of one's own: they predict what they must, and mistakes are named."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

from evaluation.arms import PEERS, load_arms, load_system
from evaluation.compare import Settings, compare
from evaluation.peers import GenerateSystem, PretrainedSystem, assisted, prompt_lookup
from evaluation.record import read_record
from llmslm.checkpoint import codec_for, save_system
from llmslm.data.codec import Codec, TextFormat
from llmslm.errors import UserError
from llmslm.models.alignment import SameTokenizer
from llmslm.models.encoder import Encoder
from llmslm.models.fusion import Add
from llmslm.models.modeling import LlmToSlm
from llmslm.models.projector import MlpProjector
from llmslm.system import System
from tests import tiny
from tests.unit.data.test_codec import byte_tokenizer

PROMPTS = ["def f(x):", "a", "some longer prompt than that, that"]
FORMAT = TextFormat(max_prompt_tokens=48, max_target_tokens=12)
needs_ctranslate2 = pytest.mark.skipif(
    importlib.util.find_spec("ctranslate2") is None, reason="needs the package ctranslate2"
)


def model(family, seed=0):
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return tiny.build(family, **ids), tokenizer


def bare(folder, family, start=None):
    """A folder as the hub has them; `start` is what texts and the decoder's output begin with."""
    network, tokenizer = model(family)
    if start is not None:
        network.generation_config.decoder_start_token_id = network.config.decoder_start_token_id = start[1]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    network.save_pretrained(folder)
    tokenizer.unk_token = "<pad>"  # CTranslate2 cannot do without
    tokenizer.save_pretrained(folder)
    return str(folder)


def system(name, family, seed=0):
    network, tokenizer = model(family, seed)
    return System(name, network, codec_for(network, tokenizer, None, FORMAT), {"system": name})


def saved(folder, name, family, seed=0):
    made = system(name, family, seed)
    save_system(folder / name, made.model, made.codec, made.card)
    return str(folder / name)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_peers_predict_what_the_llm_does(family):
    llm = system("llm", family)
    peers = [
        GenerateSystem("llm_generate", llm),
        GenerateSystem("llm_static_cache", llm, cache_implementation="static", disable_compile=True),
        assisted(llm, system("slm", family, seed=1)),
        prompt_lookup(llm),
    ]
    for limits in ({"max_new_tokens": 10}, {"max_new_tokens": 5, "min_new_tokens": 5}):
        expected = llm.generate(PROMPTS, **limits)
        for peer in peers:
            calls = []
            assert peer.generate(PROMPTS, **limits, on_first_token=lambda: calls.append(1)) == expected, peer.name  # noqa: B023
            assert calls == [1], peer.name
    assert peers[2].log_likelihood(PROMPTS, PROMPTS) == llm.log_likelihood(PROMPTS, PROMPTS)


def test_arms_of_a_comparison(tmp_path, examples):
    folders = {"llm": saved(tmp_path, "llm", "llama"), "slm": saved(tmp_path, "slm", "llama", seed=1)}
    own = bare(tmp_path / "tiny-llama", "llama")
    arms = load_arms(folders, "cpu", "float32", peers=["assisted", "generate"], specs=[own])
    assert [arm.system.name for arm in arms] == ["llm", "slm", "assisted", "llm_generate", "tiny-llama"]
    assert len({arm.checkpoint for arm in arms}) == 5
    assert arms[4].system.codec.text_format == FORMAT  # of the llm: all read the same prompts
    records = [read_record(path) for path in compare(arms, examples, Settings(out=tmp_path / "out", runs=0))]
    texts = [record["hashes"]["predictions"] for record in records]
    assert texts[0] == texts[2] == texts[3] == texts[4] != texts[1]
    assert records[0]["folder"] == folders["llm"]


def composed(llm):
    """A llm_to_slm system on the llm's first layers."""
    slm, tokenizer = model("llama", seed=2)
    parts = {"projector": MlpProjector(32, 32), "alignment": SameTokenizer(32, 32), "fusion": Add(32, 32)}
    together = LlmToSlm.compose(Encoder(copy.deepcopy(llm.model.model), layer=2), slm, **parts)
    codec = Codec(tokenizer, text_format=FORMAT, is_encoder_decoder=False, has_encoder=True)
    return System("llm_to_slm", together, codec, {})


def test_verified_leaves_the_draft_alone():
    llm = system("llm", "llama")
    ours = composed(llm)
    before, encoder = ours.generate(PROMPTS, max_new_tokens=6), ours.model.encoder
    pair = PEERS["verified"].make(llm, ours)
    assert pair.generate(PROMPTS, max_new_tokens=10) == llm.generate(PROMPTS, max_new_tokens=10)
    assert ours.model.encoder is encoder
    assert ours.generate(PROMPTS, max_new_tokens=6) == before


MINE = """
class Echo:
    def __init__(self, times: int = 1, device="cpu"):
        self.name, self.times, self.place = "echo", times, device

    def generate(self, prompts, *, max_new_tokens, min_new_tokens=0, on_first_token=None):
        return []

    def log_likelihood(self, prompts, targets):
        return []

    def parameters(self):
        return {}

class Half:
    name = "half"
"""


def described(folder, **values):
    (folder / "my_systems.py").write_text(MINE)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_a_class_beside_its_description(tmp_path):
    path = described(tmp_path, class_path="my_systems.Echo", init_args={"times": 3})
    (arm,) = load_arms({}, "meta", "float32", specs=[path])
    assert (arm.system.times, arm.system.place, arm.checkpoint) == (3, "meta", None)


def test_a_model_with_settings(tmp_path):
    arguments = {
        "source": bare(tmp_path / "m", "gpt2"),
        "name": "mine",
        "text_format": {"prompt_template": "Q {prompt}"},
    }
    path = described(tmp_path, class_path="evaluation.peers.PretrainedSystem", init_args=arguments)
    (arm,) = load_arms({}, "cpu", "bfloat16", specs=[path])
    assert isinstance(arm.system, PretrainedSystem)
    assert arm.system.codec.text_format.prompt_template == "Q {prompt}"
    assert (arm.system.name, arm.system.model.dtype, len(arm.checkpoint)) == ("mine", torch.bfloat16, 64)
    path = described(tmp_path, class_path="evaluation.peers.PretrainedSystem", init_args=arguments | {"name": "other"})
    assert load_arms({}, "cpu", "bfloat16", specs=[path])[0].checkpoint != arm.checkpoint  # weights alone do not decide


def test_mistakes_are_named(tmp_path):
    for values, text in (
        ({"class_path": "my_systems.Missing"}, r"there is no class my_systems\.Missing"),
        ({"class_path": "nowhere.Echo"}, r"there is no class nowhere\.Echo"),
        ({"class_path": "my_systems.Echo", "init_args": {"spice": 1}}, "spice"),
        ({"class_path": "my_systems.Half"}, r"my_systems\.Half has no generate; expected a class as"),
        ({"init_args": {}}, "describes no system; expected YAML with class_path"),
    ):
        with pytest.raises(UserError, match=text):
            load_system(described(tmp_path, **values), {})
    for peers, text in (
        (["magic"], "unknown peer 'magic'; expected one of generate, static_cache, assisted"),
        (["assisted"], "peer assisted is made of llm and slm; give --slm DIR"),
    ):
        with pytest.raises(UserError, match=text):
            load_arms({"llm": "nowhere"}, "cpu", "float32", peers=peers)
    with pytest.raises(UserError, match=r"model.source '.*none' cannot be|model.source '.*none'"):
        load_arms({}, "cpu", "float32", specs=[str(tmp_path / "none")])
    twice = bare(tmp_path / "twice", "gpt2")
    with pytest.raises(UserError, match="two systems are named 'twice'"):
        load_arms({}, "cpu", "float32", specs=[twice, twice])
    (tmp_path / "my_slashed.py").write_text(MINE.replace('"echo"', '"my/echo"'))
    slashed = described(tmp_path, class_path="my_slashed.Echo")
    with pytest.raises(UserError, match="a system is named 'my/echo'; a slash stands before what a control lacks"):
        load_arms({}, "cpu", "float32", specs=[slashed])


@needs_ctranslate2
@pytest.mark.parametrize(("family", "start"), [("t5", None), ("t5", ("<s>", 1)), ("gpt2", None)])
def test_ctranslate2_is_the_model_that_was_converted(family, start, tmp_path):
    from ctranslate2.converters import TransformersConverter

    from evaluation.ctranslate2_system import CTranslate2System

    source = bare(tmp_path / "model", family, start)
    TransformersConverter(source).convert(str(tmp_path / "converted"))
    converted = CTranslate2System(str(tmp_path / "converted"), source, text_format=FORMAT, threads=1)
    assert converted.dtype == "float32"
    original = PretrainedSystem(source, text_format=FORMAT)
    calls = []
    for limits in ({"max_new_tokens": 8}, {"max_new_tokens": 5, "min_new_tokens": 5}):
        made = converted.generate(PROMPTS, **limits, on_first_token=lambda: calls.append(1))
        assert made == original.generate(PROMPTS, **limits)
    assert calls == [1, 1]
    scores = converted.log_likelihood(PROMPTS, PROMPTS)
    for mine, theirs in zip(scores, original.log_likelihood(PROMPTS, PROMPTS), strict=True):
        assert mine.nats == pytest.approx(theirs.nats, rel=1e-5)
        assert mine.tokens == theirs.tokens


def test_ctranslate2_mistakes(tmp_path, monkeypatch):
    from evaluation.ctranslate2_system import CTranslate2System

    if importlib.util.find_spec("ctranslate2") is not None:
        with pytest.raises(UserError, match="holds no CTranslate2 model; expected a folder of ct2-transformers"):
            CTranslate2System(str(tmp_path), "x")
    monkeypatch.setitem(__import__("sys").modules, "ctranslate2", None)
    with pytest.raises(UserError, match=r"CTranslate2 is not installed: pip install 'llmslm\[ctranslate2\]'"):
        CTranslate2System(str(Path("x")), "x")
