"""Blocks of the verified mode are timed and recorded; from which acceptance on they pay."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.benchmarks import verified_block
from evaluation.decoding import shapes


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=1001, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def test_blocks_are_timed_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("llama-24x576", "llama-4x256"):
        monkeypatch.setitem(shapes.SHAPES, name, tiny)
    out = tmp_path / "block.json"
    arguments = ["--prompt", "5", "--new", "4", "--runs", "2", "--device", "cpu"]
    verified_block.main([*arguments, "--out", str(out)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads(out.read_text())
    assert record["block_s"]
    assert all(block > 0 for block in record["block_s"].values())
    assert len(record["times_faster"]) > 2


def test_the_best_size_depends_on_what_is_kept() -> None:
    blocks = {2: 1.4, 7: 2.4}
    assert verified_block.times_faster(1.0, blocks, 0.5) == (1.75 / 1.4, 2)
    ratio, size = verified_block.times_faster(1.0, blocks, 0.9)
    assert size == 7
    assert ratio == pytest.approx(5.695 / 2.4, rel=1e-3)
