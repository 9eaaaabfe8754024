"""The decode benchmark's table, record and floor, on a tiny shape."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from evaluation import decode_speed
from llmslm.generation.engine import DecodeEngine

CONFIG = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=1001, n_positions=64, eos_token_id=0, bos_token_id=0)


def test_rows_are_printed_and_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(decode_speed.SHAPES, "gpt2", lambda: GPT2LMHeadModel(CONFIG))
    arguments = ["--shapes", "gpt2", "--arms", "engine", "generate", "--batch", "1", "2", "--prompt", "5", "--new", "4"]
    out = tmp_path / "records" / "tiny.json"
    decode_speed.main([*arguments, "--device", "cpu", "--warmups", "1", "--runs", "2", "--out", str(out)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads(out.read_text())
    assert [(row["batch"], row["arm"]) for row in record["rows"]] == [
        (batch, arm) for batch in (1, 2) for arm in ("engine", "generate")
    ]
    assert all(row["total_s"] > 0 and row["ttft_s"] > 0 for row in record["rows"])
    assert str(out) not in record["command"]


def test_the_floor_counts_weights_and_filled_cache() -> None:
    engine = DecodeEngine(GPT2LMHeadModel(CONFIG).eval())
    weights = 2 * (3 * 32 + 32 + 4 * 32 + 4 * 32) * 32 + 1001 * 32
    cache = 2 * 2 * 3 * (5 + 4 // 2) * 32
    assert decode_speed.floor_s(engine, batch=3, prompt=5, new=4, bandwidth=1.0) == 4 * (weights + cache)


def test_models_are_built_with_the_dtype_asked_for() -> None:
    model = decode_speed.build(lambda: GPT2LMHeadModel(CONFIG), torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
