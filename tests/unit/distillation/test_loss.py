"""The divergence from stored logits is torch's own where the whole vocabulary is stored, elsewhere a bound of it."""

import pytest
import torch
from torch.nn.functional import kl_div

from llmslm.data.logits import likeliest
from llmslm.distillation.loss import Distillation
from llmslm.errors import UserError

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


def test_weights_mix_both_parts():
    entropy, divergence = torch.tensor(3.0), torch.tensor(1.0)
    assert Distillation(weight=0.25).mix(entropy, divergence) == 2.5
    assert Distillation(weight=0.25).mix(entropy) == 3.0


@pytest.mark.parametrize(("key", "value"), [("weight", 1.5), ("weight", -0.1), ("temperature", 0.0)])
def test_impossible_settings_are_refused(key, value):
    with pytest.raises(UserError, match=rf"model\.distillation\.{key} is {value}"):
        Distillation(**{key: value})
