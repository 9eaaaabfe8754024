"""A projector's layers by fused kernels against its own forward; see test_kernels.py for how the kernels run."""

import warnings
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton (pip install triton)")

from llmslm.generation.fused_prefill import FusedStack
from llmslm.generation.fused_projector import FusedProjector
from llmslm.generation.memory import LiveBytes, _FusedAttention, twin
from llmslm.generation.prompt_pass import PromptPass
from llmslm.models.projector import TransformerProjector
from tests.unit.generation.families import VOCABULARY
from tests.unit.generation.test_fused_prefill import by_kernels  # noqa: F401
from tests.unit.generation.test_kernels import COMPILED, DEVICE, HALF
from tests.unit.generation.test_prompt_pass import attended, batch_of, padded_for
from tests.unit.generation.test_verified import engine as verified_engine
from tests.unit.models.compositions import compose

KIND = partial(TransformerProjector, layers=2)


def drawn(projector):
    """With weights that all count: new layers end at zero, and norms are ones."""
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.1)
    return projector.eval()


def ragged(*shape):
    mask = torch.ones(shape, dtype=torch.long, device=DEVICE)
    for row, kept in enumerate(mask[1:], start=1):
        kept[shape[1] // (2 * row) :] = 0
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("norms", [(True, True), (False, False)])
@pytest.mark.parametrize("widths", [(12, 8), (24, 160)])  # heads: one of 8; two of 80, no power of two
@torch.no_grad()
def test_states_are_its_own(widths, norms, dtype):
    projector = drawn(KIND(*widths, input_norm=norms[0], output_norm=norms[1])).to(DEVICE, dtype)
    mask = ragged(3, 19)
    hidden_states = torch.randn(3, 19, widths[0], device=DEVICE).to(dtype)
    states = FusedProjector(projector, 64)(hidden_states, mask)
    expected = projector(hidden_states, mask, mask - 1)
    assert (states - expected)[mask.bool()].norm() < (1e-5 if dtype == torch.float32 else 2e-2) * expected.norm()


@torch.no_grad()
def test_a_prompt_without_a_token_harms_no_other():
    projector = drawn(KIND(12, 8)).to(DEVICE)
    mask, hidden_states = ragged(2, 9), torch.randn(2, 9, 12, device=DEVICE)
    mask[1] = 0
    states = FusedProjector(projector, 64)(hidden_states, mask)
    assert states.isfinite().all()
    torch.testing.assert_close(states[:1], projector(hidden_states[:1], mask[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("encoder", "slm"), [("llama", "llama"), ("llama", "t5"), ("bert", "llama")])
@torch.no_grad()
def test_a_composition_reads_on_by_it(encoder, slm, by_kernels, monkeypatch, tmp_path):  # noqa: F811
    if encoder == "bert":
        monkeypatch.setattr("llmslm.generation.prompt_pass.encoder_pass_for", lambda *_: None)
    model = compose(encoder, slm, tmp_path, projector=KIND).to(DEVICE)
    drawn(model.projector)
    run, batch = PromptPass(model), batch_of(model, 2, DEVICE)
    result = attended(run(padded_for(run, batch)))
    assert run._trusted
    assert run._fused.keys() == ({"projector"} if encoder == "bert" else {"encoder", "projector"})
    torch.testing.assert_close(result, attended(model.slm_inputs(**batch)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_projector_whose_states_differ_runs_by_its_own_forward(by_kernels, monkeypatch, tmp_path):  # noqa: F811
    model = compose("llama", "llama", tmp_path, projector=KIND).to(DEVICE)
    drawn(model.projector)
    causal = FusedStack.__init__
    monkeypatch.setattr(FusedStack, "__init__", lambda self, stack, **_: causal(self, stack))
    run, batch = PromptPass(model), batch_of(model, 2, DEVICE)
    with pytest.warns(UserWarning, match="the projector runs by its own forward, .*: states are off by"):
        result = attended(run(padded_for(run, batch)))
    assert run._fused.keys() == {"encoder"}
    torch.testing.assert_close(result, attended(model.slm_inputs(**batch)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_verified_prompts_are_projected_by_kernels(monkeypatch):
    if not COMPILED:
        monkeypatch.setattr("llmslm.generation.verified_prompt.projector_pass_for", FusedProjector)
    kind = lambda *widths: drawn(KIND(*widths))  # noqa: E731
    reader = verified_engine("llama", "llama", projector=kind, device=DEVICE)._reader
    ids, mask = torch.randint(4, VOCABULARY, (2, 8), device=DEVICE), ragged(2, 8)
    sides = {"prompt_ids": ids, "prompt_attention_mask": mask, "input_ids": ids, "attention_mask": mask}
    found = attended(reader.read(**sides).slm_inputs)
    assert reader._fused_projector is not None
    reader._fused_projector = None
    torch.testing.assert_close(found, attended(reader.read(**sides).slm_inputs), rtol=1e-4, atol=1e-4)
    causal = FusedStack.__init__
    monkeypatch.setattr(FusedStack, "__init__", lambda self, stack, **_: causal(self, stack))
    with pytest.warns(UserWarning, match="the projector runs by its own forward, .*: states are off by"):
        reader = verified_engine("llama", "llama", projector=kind, device=DEVICE)._reader
    assert reader._fused_projector is None


@torch.no_grad()
def test_what_hooks_make_of_a_projectors_states_is_kept_by_a_twin(by_kernels, tmp_path):  # noqa: F811
    model = compose("llama", "llama", tmp_path, projector=KIND).to(DEVICE)
    run, batch = PromptPass(model), batch_of(model, 2, DEVICE)
    padded, control = padded_for(run, batch), run.twin()
    handle = model.projector.register_forward_hook(lambda _module, _inputs, states: torch.zeros_like(states))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = attended(control(padded)), attended(model.slm_inputs(**batch))
    handle.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert run._fused.keys() == {"encoder", "projector"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_needs_no_more_memory_than_the_own_forward_that_is_counted(dtype):
    projector = twin(KIND(576, 576).to(dtype).eval())
    for batch, length in ((1, 128), (8, 256), (4, 1024)):
        hidden_states = torch.empty(batch, length, 576, dtype=dtype, device="meta")
        mask = torch.ones(batch, length, dtype=torch.long, device="meta")
        peaks = []
        for run in (FusedProjector(projector, 1024), projector):
            with LiveBytes() as live, _FusedAttention():
                run(hidden_states, mask, mask - 1)
            peaks.append(live.peak)
        assert 0.25 < peaks[0] / peaks[1] < 1
