"""`import llmslm` is enough for transformers to load a saved system, in either order, and costs nothing."""

import subprocess
import sys

import pytest
import torch
from transformers import pipeline

from llmslm.checkpoint import codec_for, save_system
from llmslm.data.codec import TextFormat
from llmslm.errors import UserError
from llmslm.models.alignment import Offsets
from llmslm.system import System
from tests import tiny
from tests.unit.data.tokenizers import bytes_of, words
from tests.unit.models.compositions import compose

LIBRARY = "from transformers import AutoConfig, AutoModelForCausalLM"
OURS = """
import llmslm
assert not {'torch', 'transformers'} & (set(sys.modules) - before)
"""
LOAD = """
assert type(AutoConfig.from_pretrained(sys.argv[1])).__name__ == "LlmToSlmConfig"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__ == "llmslm.models.modeling"
ids = torch.tensor([[5, 6, 7]])
assert model.generate(prompt_ids=ids, max_new_tokens=4, do_sample=False).tolist() == eval(sys.argv[2])
"""


@pytest.mark.parametrize("order", [(OURS, LIBRARY), (LIBRARY, OURS)], ids=["llmslm first", "transformers first"])
def test_import_llmslm_is_all_that_transformers_needs(order, tmp_path):
    model = compose("t5", "llama", tmp_path)
    model.save_pretrained(tmp_path / "system")
    expected = model.generate(prompt_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).tolist()
    code = "\n".join(["import sys", "before = set(sys.modules)", order[0], "before = set(sys.modules)", order[1]])
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        f"{code}\nimport torch\n{LOAD}",
        str(tmp_path / "system"),
        str(expected),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("slm", ["llama", "t5"])
def test_the_pipeline_carries_two_tokenizers(slm, tmp_path, monkeypatch):
    own = bytes_of(template="<s> $A")
    for family in {"t5", slm}:
        config = tiny.CONFIGS[family]
        monkeypatch.setitem(tiny.CONFIGS, family, type(config).from_dict(config.to_dict() | {"vocab_size": len(own)}))
    model = compose("t5", slm, tmp_path, alignment=Offsets)
    save_system(
        tmp_path / "system",
        model,
        codec_for(model, own, words(), TextFormat(prompt_template="{prompt}?", max_target_tokens=6)),
        {"system": "llm_to_slm"},
    )
    system = System.load(tmp_path / "system")
    answers = [system.generate([prompt], max_new_tokens=6)[0].text for prompt in ("the quick fox", "naïve 京")]
    answer = pipeline("llm-to-slm", model=str(tmp_path / "system"))
    assert answer("the quick fox") == [{"generated_text": answers[0]}]
    assert answer(["the quick fox", "naïve 京"]) == [[{"generated_text": text}] for text in answers]
    short = system.generate(["x"], max_new_tokens=2)[0].text
    assert answer("x", max_new_tokens=2) == [{"generated_text": short}]
    assert pipeline("llm-to-slm", model=str(tmp_path / "system"), max_new_tokens=2)("x") == answer(
        "x", max_new_tokens=2
    )
    with pytest.raises(UserError, match="has no temperature; expected max_new_tokens or min_new_tokens"):
        answer("x", temperature=2.0)


def test_text_generation_serves_two_sides_that_share_a_tokenizer(tmp_path, monkeypatch):
    own = bytes_of(template="<s> $A")
    for family in ("t5", "llama"):
        config = tiny.CONFIGS[family]
        monkeypatch.setitem(tiny.CONFIGS, family, type(config).from_dict(config.to_dict() | {"vocab_size": len(own)}))
    model = compose("t5", "llama", tmp_path)
    save_system(tmp_path / "system", model, codec_for(model, own, None, TextFormat()), {"system": "llm_to_slm"})
    expected = System.load(tmp_path / "system").generate(["the fox"], max_new_tokens=5)[0].text
    answer = pipeline("text-generation", model=str(tmp_path / "system"))
    settings = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    assert answer("the fox", **settings) == [{"generated_text": expected}]
