"""What times passes over prompts runs those that it says; its clock needs a CUDA device."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

pytest.importorskip("triton", reason="needs Triton (pip install triton)")

from evaluation.benchmarks import prompt_passes
from evaluation.decoding.shapes import SHAPES
from llmslm.generation import fused_prefill
from tests.unit.generation.families import tiny

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs there")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_kinds_of_kernels_read_prompts_of_all_lengths(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=256)
    monkeypatch.setitem(SHAPES, "tiny", lambda: tiny("llama") if family == "llama" else GPT2LMHeadModel(config).eval())
    seen = []
    short = fused_prefill.FusedStack._through_short
    monkeypatch.setattr(
        fused_prefill.FusedStack, "_through_short", lambda self, *rest: seen.append(1) or short(self, *rest)
    )
    found = prompt_passes.measure("tiny", [32], torch.device("cpu"), lambda work: float(work() is None) + 1)
    assert [row["kernels"] for row in found] == [prompt_passes.SHORT, prompt_passes.LONG]
    assert all(row["off"] < 0.05 and row["us"] > 0 for row in found)
    assert len(seen) == 2, "the short ones twice, for the clock and for what they are off"


def test_it_says_that_it_needs_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prompt_passes.main([])
    assert "needs a CUDA device" in capsys.readouterr().err
