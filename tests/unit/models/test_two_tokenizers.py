"""Whole systems of two tokenizers: saved and loaded, trained on what they are scored on, decoded alike."""

import warnings

import pytest
import torch

from llmslm.checkpoint import codec_for, save_system
from llmslm.data.codec import TextFormat
from llmslm.data.datamodule import collate_training
from llmslm.models.alignment import EncoderTokenizer, Offsets
from llmslm.models.fusion import CrossAttend, Prefix, PrefixOnly, ReplaceEncoder
from llmslm.models.language_model import ModelSource
from llmslm.module import SystemModule
from llmslm.system import System
from tests import tiny
from tests.unit.data.tokenizers import bytes_of, words
from tests.unit.models.compositions import compose, open_gates

PROMPTS = ["the quick brown fox", "naïve 東京   🙂", "x", "def add(a, b):\n    return a + b"]
TARGETS = ["a fox", "京", "", "adds"]
CASES = [
    ({"alignment": EncoderTokenizer}, "gpt2"),
    ({"alignment": Offsets}, "llama"),
    ({"alignment": Offsets}, "t5"),
    ({"fusion": Prefix}, "gpt2"),
    ({"fusion": Prefix}, "bart"),
    ({"fusion": PrefixOnly}, "llama"),
    ({"fusion": CrossAttend}, "qwen2"),
    ({"fusion": ReplaceEncoder}, "bart"),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([*(p.__name__ for p in case[0].values()), case[1]]))
def system(request, tmp_path, monkeypatch):
    parts, slm = request.param
    own = bytes_of(template="<s> $A")
    for family in {"modernbert", slm}:
        table = tiny.CONFIGS if family in tiny.CONFIGS else tiny.ENCODERS
        config = table[family]
        ids = {"vocab_size": len(own), "max_position_embeddings": 256}
        monkeypatch.setitem(table, family, type(config).from_dict(config.to_dict() | ids))
    model = open_gates(compose("modernbert", slm, tmp_path, **parts))
    codec = codec_for(model, own, words(), TextFormat(max_target_tokens=12))
    save_system(tmp_path / "system", model, codec, {"system": "llm_to_slm"})
    return System.load(tmp_path / "system")


def test_batches_and_decoders_agree(system):
    slow = System(system.name, system.model, system.codec, {}, decoder="generate")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "decoding with generate")
        together = system.generate(PROMPTS, max_new_tokens=8)
        assert slow.generate(PROMPTS, max_new_tokens=8) == together
        assert [system.generate([prompt], max_new_tokens=8)[0] for prompt in PROMPTS] == together
        assert system.with_features("zero").generate(PROMPTS, max_new_tokens=8) != together


def test_training_minimises_what_is_scored(system):
    scores = system.log_likelihood(PROMPTS, TARGETS)
    alone = [system.log_likelihood([p], [t])[0].nats for p, t in zip(PROMPTS, TARGETS, strict=True)]
    assert [score.nats for score in scores] == pytest.approx(alone, rel=1e-4)
    module = SystemModule(llm=ModelSource(config={}), slm=ModelSource(config={}))
    module.model, module.codec = system.model, system.codec
    with torch.no_grad():
        loss, tokens = module.loss(collate_training(system.codec.encode(PROMPTS, TARGETS), system.codec))
    assert tokens == sum(score.tokens for score in scores)
    assert float(loss) == pytest.approx(sum(alone) / tokens, rel=1e-4)


def test_states_that_were_encoded_before_serve_as_well(system):
    model, batch = system.model, system.codec.collate_prompts(system.codec.encode(PROMPTS))
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False)
    if not model.alignment.needs_token_embeds:
        states, mask = model.encode(batch.pop("prompt_ids"), batch["prompt_attention_mask"])
        batch |= {"hidden_states": states, "prompt_attention_mask": mask}
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), expected)
