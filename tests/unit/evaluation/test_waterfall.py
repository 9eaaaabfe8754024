"""The steps of the waterfall decode the same tokens, and end in a record."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from evaluation.benchmarks import waterfall
from evaluation.decoding import shapes

CONFIG = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=1001, n_positions=64, eos_token_id=0, bos_token_id=0)


def tiny() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(CONFIG).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


def test_the_graphed_forward_gives_the_tokens_of_generate_each_time() -> None:
    model, ids = tiny(), torch.randint(3, 1000, (2, 5))
    decode = waterfall.GraphedForward(model, ids, 12, compiled=False)
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False)[:, 5:]
    assert expected.unique().numel() > 2, "the case is void if all tokens are the same"
    model.generation_config.eos_token_id = None
    for new in (12, 1, 12):
        assert torch.equal(decode(new), expected[:, :new])


def test_steps_are_timed_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "gpt2", tiny)
    out = tmp_path / "waterfall.json"
    arguments = ["--steps", "generate", "graph", "engine", "--prompt", "5", "--new", "4", "--runs", "2"]
    waterfall.main([*arguments, "--device", "cpu", "--out", str(out)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads(out.read_text())
    assert [row["step"] for row in record["rows"]] == ["generate", "graph", "engine"]
    assert all(row["ttft_s"]["p50"] > 0 and row["total_s"]["p50"] > 0 for row in record["rows"])
    assert record["floor_s"] > 0
