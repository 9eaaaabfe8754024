"""The speed command's table, record, ratios and plot on tiny shapes; its floor; what it says it cannot time."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from evaluation.decoding import command, peer, shapes
from evaluation.decoding.ratios import ratios
from evaluation.floor import floor_s
from llmslm.errors import UserError
from llmslm.generation.engine import DecodeEngine

CONFIG = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=1001, n_positions=64, eos_token_id=0, bos_token_id=0)
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 1001}
FAST = ["--device", "cpu", "--dtype", "float32", "--prompt", "5", "--warmups", "0", "--runs", "2"]


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    t5 = T5Config(**T5, decoder_start_token_id=0)
    monkeypatch.setitem(shapes.SHAPES, "gpt2", lambda: GPT2LMHeadModel(CONFIG))
    monkeypatch.setitem(shapes.SHAPES, "t5-small", lambda: T5ForConditionalGeneration(t5))


@pytest.mark.parametrize(("llm", "slm"), [("t5-small", "t5-small"), ("t5-small", "gpt2"), ("gpt2", "gpt2")])
def test_all_systems_are_printed_recorded_and_plotted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], llm: str, slm: str
) -> None:
    out, plot = tmp_path / "records" / "tiny.json", tmp_path / "plots" / "curve.svg"
    arguments = ["--llm", llm, "--slm", slm, "--arms", "engine", "generate", "--new", "2", "4", "--out", str(out)]
    command.main([*arguments, *FAST, "--plot", str(plot)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads(out.read_text())
    assert [(row["new"], row["system"], row["arm"]) for row in record["rows"]] == [
        (new, system, arm) for new in (2, 4) for system in shapes.SYSTEMS for arm in ("engine", "generate")
    ]
    assert all(row["total_s"]["p50"] > 0 and row["floor_s"] > 0 for row in record["rows"])
    found = {(ratio["new"], ratio["ratio"]) for ratio in record["ratios"]}
    assert {(4, "llm_to_slm_over_llm_engine"), (2, "llm_to_slm_over_llm_generate")} <= found
    peaks = [row["memory"]["added_ratio"] for row in record["rows"] if row["arm"] == "engine"]
    assert peaks[:2] + peaks[3:5] == pytest.approx([1] * 4, abs=0.15)
    assert peaks[2::3] == pytest.approx([1] * 2, abs=0.25)  # llm_to_slm, five tokens: test_memory.py has longer prompts
    assert "new tokens" in plot.read_text()
    assert str(tmp_path) not in record["command"]


def test_what_is_not_timed_has_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["assisted", "prompt_lookup", "verified", "ctranslate2"]
    command.main(["--systems", "slm", "llm_to_slm", "--slm", "gpt2", "--arms", "engine", *arms, "--new", "2", *FAST])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert all((row["total_s"] is None) == (row["arm"] in arms) == bool(row["not_timed"]) for row in rows)


def test_drafts_of_others_are_timed_for_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--systems", "llm", "--llm", "t5-small", "--slm", "t5-small", "--arms", "assisted", "prompt_lookup"]
    command.main([*shape, "--batch", "1", "2", "--new", "3", *FAST])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["total_s"] is None for row in rows] == [False, False, True, True]


def test_drafts_in_another_vocabulary_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = T5Config(**T5 | {"vocab_size": 500}, decoder_start_token_id=0)
    monkeypatch.setitem(shapes.SHAPES, "t5-small", lambda: T5ForConditionalGeneration(other))
    arms = ["--systems", "llm", "--llm", "gpt2", "--slm", "t5-small", "--arms", "assisted", "prompt_lookup"]
    command.main([*arms, "--new", "2", *FAST])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["total_s"] is None for row in rows] == [True, False]
    assert "vocabularies" in rows[0]["not_timed"]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("shape", ["gpt2", "t5-small"])
def test_ctranslate2_produces_as_many_tokens(dtype: str, shape: str) -> None:
    pytest.importorskip("ctranslate2")
    model = shapes.build(shapes.SHAPES[shape], torch.device("cpu"), torch.float32)
    result = peer.run_of(model, torch.full((2, 4), 7), dtype)(5)
    rows = [row.hypotheses[0] if shape == "t5-small" else row.sequences[0] for row in result]
    assert [len(row) for row in rows] == [5, 5]


def test_weights_of_8_bits_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--llm", "t5-small", "--slm", "gpt2", "--arms", "engine", "generate", "static", "--new", "3"]
    command.main([*shape, *FAST, "--dtype", "int8"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["arm"] for row in rows if row["total_s"] is None} == {"static"}
    assert {row.get("fallback") for row in rows} == {None}


def test_ratios_compare_within_one_setting() -> None:
    def row(system: str, arm: str, new: int, seconds: float) -> dict[str, object]:
        times = {"ttft_s": {"p50": seconds / 2}, "total_s": {"p50": seconds}}
        return {"system": system, "arm": arm, "batch": 1, "prompt": 8, "new": new, **times}

    rows = [row("llm", "engine", 4, 6.0), row("llm_to_slm", "engine", 4, 2.0), row("llm_to_slm", "engine", 8, 3.0)]
    assert [(found["ratio"], found["total"]) for found in ratios(rows)] == [("llm_to_slm_over_llm_engine", 3.0)]


@pytest.mark.parametrize(
    ("arguments", "text"), [(["--new", "1"], "at least 2"), (["--dtype", "int8", "--device", "cuda"], "for the CPU")]
)
def test_arguments_that_do_not_go_together_are_named(arguments: list[str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        command.main(arguments)


def test_the_floor_counts_weights_and_filled_cache() -> None:
    engine = DecodeEngine(GPT2LMHeadModel(CONFIG).eval())
    weights = 2 * (3 * 32 + 32 + 4 * 32 + 4 * 32) * 32 + 1001 * 32
    cache = 2 * 2 * 3 * (5 + 4 // 2) * 32
    assert floor_s(engine, batch=3, prompt=5, new=4, bandwidth=1.0) == 4 * (weights + cache)


def test_models_are_built_with_the_dtype_asked_for() -> None:
    model = shapes.build(lambda: GPT2LMHeadModel(CONFIG), torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here_is_named():
    with pytest.raises(UserError, match="device cuda was asked for, but PyTorch sees no GPUs here"):
        command.main(["--llm", "llama-4x512", "--slm", "llama-4x256", "--device", "cuda"])
