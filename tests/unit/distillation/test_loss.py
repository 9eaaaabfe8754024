"""The divergence from stored logits is torch's own where the whole vocabulary is stored, elsewhere a bound of it."""

import pytest
import torch
from torch.nn.functional import kl_div

from llmslm.data.logits import likeliest
from llmslm.distillation import loss
from llmslm.distillation.loss import Distillation
from llmslm.errors import UserError
from llmslm.generation.memory import LiveBytes

N, VOCABULARY = 7, 50


@pytest.fixture
def logits():
    """Of the small model and of the LLM."""
    return 2 * torch.randn(N, VOCABULARY), 2 * torch.randn(N, VOCABULARY)


def stored(logits, top_k):
    found = likeliest(logits, top_k)
    return found["tokens"], found["log_probs"]


def full(slm, llm, temperature=1.0, direction="forward"):
    """torch's divergence over the whole vocabulary."""
    first, second = (slm / temperature).log_softmax(1), (llm / temperature).log_softmax(1)
    first, second = (first, second) if direction == "forward" else (second, first)
    return temperature**2 * kl_div(first, second, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_the_whole_vocabulary_it_is_torchs(logits, direction, temperature):
    slm, llm = logits
    tokens, log_probs = stored(llm, VOCABULARY)
    assert log_probs.shape == (N, VOCABULARY)
    found = Distillation(temperature=temperature, direction=direction).divergence(slm, tokens, log_probs)
    torch.testing.assert_close(found, full(slm, llm, temperature, direction), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_others_count_as_one_token(logits, direction):
    """So the divergence grows with k, up to that of the whole vocabulary, and no probability is lost."""
    slm, llm = logits
    distillation = Distillation(direction=direction)
    tokens, log_probs = stored(llm, 5)
    torch.testing.assert_close(log_probs.float().exp().sum(1), torch.ones(N), rtol=2e-3, atol=2e-3)
    by_hand = []
    for row in range(N):
        others = [token for token in range(VOCABULARY) if token not in tokens[row].tolist()]
        both = [x[row].softmax(0) for x in (slm, llm)]
        coarse = [torch.cat([p[tokens[row].long()], p[others].sum().view(1)]) for p in both]
        q, p = coarse if direction == "forward" else coarse[::-1]
        by_hand.append((p * (p / q).log()).sum())
    found = [distillation.divergence(slm, *stored(llm, k)) for k in (1, 5, 20, VOCABULARY)]
    torch.testing.assert_close(found[1], torch.stack(by_hand).mean(), rtol=2e-3, atol=2e-3)
    assert found == sorted(found)
    assert distillation.divergence(llm, tokens, log_probs) < 1e-4


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_certainty_on_either_side_gives_finite_gradients(direction):
    """All mass on one token leaves none for the others, on either side; suppressed tokens have logits of -inf."""
    certain = torch.full((2, VOCABULARY), -1e4)
    certain[:, 3] = 1e4
    certain[0, 7] = -torch.inf
    plain = torch.randn(2, VOCABULARY)
    for slm, llm in ((certain.nan_to_num(neginf=-1e4), plain), (plain, certain), (plain, torch.full_like(plain, 3.0))):
        slm = slm.clone().requires_grad_()
        loss = Distillation(direction=direction).divergence(slm, *stored(llm, 4))
        loss.backward()
        assert loss.isfinite()
        assert slm.grad.isfinite().all()


def test_gradients_reach_tokens_that_are_not_stored(logits):
    slm, llm = logits[0].requires_grad_(), logits[1]
    tokens, log_probs = stored(llm, 5)
    Distillation().divergence(slm, tokens, log_probs).backward()
    assert (slm.grad != 0).all()


def exact(slm, tokens, log_probs, temperature, direction):
    """Value and gradient in float64, of all log-probabilities."""
    slm = slm.detach().double().requires_grad_()
    ours = slm.log_softmax(1)
    others = ours.scatter(1, tokens.long(), -torch.inf).logsumexp(1, keepdim=True)
    chosen = torch.cat([ours.gather(1, tokens.long()), others], 1)
    value = full(chosen, log_probs.double(), temperature, direction)
    value.backward()
    return value.detach(), slm.grad


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("temperature", "top"), [(1.0, 0.0), (2.5, 0.0), (1.0, -300.0)])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-3)])
def test_value_and_gradient_are_those_in_float64(monkeypatch, direction, temperature, top, dtype, bar):
    monkeypatch.setattr(loss, "_PART", 3 * VOCABULARY)  # 7 rows: the last part is another size
    slm = (5 * torch.randn(N, VOCABULARY) + top).to(dtype).requires_grad_()
    tokens, log_probs = stored(5 * torch.randn(N, VOCABULARY), 4)
    value, gradient = exact(slm, tokens, log_probs, temperature, direction)
    found = Distillation(temperature=temperature, direction=direction).divergence(slm, tokens, log_probs)
    (2 * found).backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), value, rtol=2e-5, atol=0)
    assert (slm.grad.double() - 2 * gradient).norm() < bar * 2 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_the_logits_size_there_is_their_gradient_alone(monkeypatch, dtype):
    monkeypatch.setattr(loss, "_PART", 8 * 2048)
    slm = torch.randn(512, 2048).to(dtype).requires_grad_()
    tokens, log_probs = stored(torch.randn(512, 2048), 4)
    with LiveBytes() as live:
        Distillation().divergence(slm, tokens, log_probs).backward()
    assert slm.nbytes < live.peak < 1.2 * slm.nbytes


def test_the_host_asks_for_no_value():
    slm = torch.empty(N, VOCABULARY, device="meta", requires_grad=True)
    tokens = torch.empty(N, 4, dtype=torch.int32, device="meta")
    Distillation().divergence(slm, tokens, torch.empty(N, 5, device="meta")).backward()
    assert slm.grad.is_meta


def test_weights_mix_both_parts():
    entropy, divergence = torch.tensor(3.0), torch.tensor(1.0)
    assert Distillation(weight=0.25).mix(entropy, divergence) == 2.5
    assert Distillation(weight=0.25).mix(entropy) == 3.0


@pytest.mark.parametrize(("key", "value"), [("weight", 1.5), ("weight", -0.1), ("temperature", 0.0)])
def test_impossible_settings_are_refused(key, value):
    with pytest.raises(UserError, match=rf"model\.distillation\.{key} is {value}"):
        Distillation(**{key: value})
