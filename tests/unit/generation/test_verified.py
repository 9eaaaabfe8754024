"""Verified decoding: the output is the LLM's, whatever the draft; the prompt is read once."""

import copy
import gc
import weakref

import pytest
import torch

from llmslm.errors import UserError
from llmslm.generation.acceptance import LONGEST, SHORTEST, BlockLength, Verdict
from llmslm.generation.choice import Choice
from llmslm.generation.prompt_pass import HostReads
from llmslm.generation.sampling import Sampling
from llmslm.generation.verified import VerifiedEngine
from llmslm.generation.verified_prompt import PromptReader
from llmslm.models.alignment import SameTokenizer
from llmslm.models.encoder import Encoder
from llmslm.models.fusion import Add, Prefix, ReplaceEncoder
from llmslm.models.modeling import LlmToSlm
from llmslm.models.projector import MlpProjector
from llmslm.models.shared_encoder import SharedEncoder
from tests.unit.generation.families import EOS, VOCABULARY, by_generate, prompts, tiny

PAIRS = [
    ("t5-gated", "t5"),
    ("bart", "llama"),
    ("llama", "llama"),
    ("gpt2", "bart"),
    ("qwen2", "gpt2"),
    ("t5", "gpt2"),
]
pairs = pytest.mark.parametrize(("family", "slm_family"), PAIRS)


def engine(family, slm_family, *, perfect=False, layer="last", device="cpu", fusion=Add, projector=MlpProjector):
    """An LLM of one family and a random draft of another; or, perfect, the LLM itself, its states unused."""
    llm = tiny(family)
    if family == "bart":  # its tokens would all be the same
        llm.model.decoder.embed_positions.weight.data *= 8
    slm = copy.deepcopy(llm) if perfect else tiny(slm_family)
    projector = projector(32, 32)
    if not perfect:
        torch.manual_seed(1)
        for parameter in slm.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    parts = {"projector": projector, "alignment": SameTokenizer(32, 32), "fusion": fusion(32, 32)}
    draft = LlmToSlm.compose(SharedEncoder(llm, layer), slm, **parts).eval()
    if perfect:
        for parameter in projector.parameters():
            parameter.data.zero_()
    return VerifiedEngine(llm.to(device), draft.to(device))


def batch(llm, rows, length=9, seed=0):
    """The LLM's own inputs, and the same prompts as a composition takes them."""
    inputs = prompts(llm, rows, length, seed)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return inputs, {"prompt_ids": ids, "prompt_attention_mask": mask, "input_ids": ids, "attention_mask": mask}


@pairs
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("perfect", [False, True])
def test_greedy_tokens_are_the_llms(family, slm_family, rows, perfect):
    verified = engine(family, slm_family, perfect=perfect)
    inputs, sides = batch(verified.llm, rows)
    expected = by_generate(verified.llm, inputs, max_new_tokens=40)
    result = verified.generate(**sides, max_new_tokens=40)
    assert torch.equal(result.tokens, expected)
    assert rows < 8 or expected.unique().numel() > 4, "the case is void if all tokens are the same"
    if perfect:
        assert result.acceptance.passes <= 8, "blocks of 4 tokens or more, and the LLM's own after each"
    else:
        assert result.acceptance.per_block < 3


@pairs
def test_shapes_that_are_fixed_for_graphs_change_nothing(family, slm_family):
    verified = engine(family, slm_family)
    verified.fixed = True
    for rows, length in ((1, 30), (4, 30), (4, 25)):
        inputs, sides = batch(verified.llm, rows, length)
        expected = by_generate(verified.llm, inputs, max_new_tokens=30)
        assert torch.equal(verified.generate(**sides, max_new_tokens=30).tokens, expected)
    assert len(verified._loops) == 2, "the caches of a call are used again by the next of its size"
    assert len(verified._lengths) == 2, "prompts come in a few lengths"


@pytest.mark.parametrize(("family", "slm_family"), [("llama", "gpt2"), ("t5", "llama"), ("gpt2", "t5")])
def test_attention_may_be_eager(family, slm_family):
    """Which adds its masks to its scores, whatever their type is."""
    verified, eager = engine(family, slm_family), engine(family, slm_family)
    for model in (eager.llm, eager.draft.slm):
        model.set_attn_implementation("eager")
    inputs, sides = batch(verified.llm, 4)
    expected, result = (system.generate(**sides, max_new_tokens=12) for system in (verified, eager))
    assert torch.equal(result.tokens, by_generate(verified.llm, inputs, max_new_tokens=12))
    assert result.acceptance == expected.acceptance


@pairs
@pytest.mark.parametrize("sampling", [None, Sampling(top_k=9, top_p=0.9)])
def test_nothing_that_a_graph_holds_asks_for_a_value(family, slm_family, sampling):
    """A prompt's pass, a block, and what the draft reads behind it."""
    verified = engine(family, slm_family)
    verified.fixed = True
    config = verified.llm.generation_config
    config.suppress_tokens, config.repetition_penalty, config.eos_token_id = [7], 1.3, [EOS, 5]
    sides = batch(verified.llm, 3)[1]
    verified.generate(**sides, max_new_tokens=4, sampling=sampling)
    loop = next(iter(verified._loops.values()))
    with torch.no_grad(), HostReads() as reads:
        verified._reader.begin(verified._reader.read(**verified._padded(sides)), loop.llm, loop.draft)
        loop.block.take_first()
        loop.block.read_on()
        loop.block.run(3)
    assert not reads.found


@pytest.mark.parametrize(("family", "slm_family"), [("llama", "gpt2"), ("t5", "llama")])
@pytest.mark.parametrize("sampling", [None, Sampling(top_k=9, repetition_penalty=1.3)])
def test_a_state_made_in_inference_mode_serves_calls_outside_of_it(family, slm_family, sampling):
    verified = engine(family, slm_family)
    verified.fixed = True
    sides = batch(verified.llm, 3)[1]
    with torch.inference_mode():
        within = verified.generate(**sides, max_new_tokens=8, sampling=sampling)
    assert torch.equal(verified.generate(**sides, max_new_tokens=8, sampling=sampling).tokens, within.tokens)


def test_prompts_that_no_graph_can_read_are_read_without(monkeypatch):
    verified = engine("llama", "t5")
    verified.fixed = True
    inputs, sides = batch(verified.llm, 3)
    read, calls = PromptReader.read, []

    def asks_the_host(self, **prompt):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return read(self, **prompt)

    monkeypatch.setattr(PromptReader, "read", asks_the_host)
    expected = by_generate(verified.llm, inputs, max_new_tokens=8)
    assert torch.equal(verified.generate(**sides, max_new_tokens=8).tokens, expected)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert torch.equal(verified.generate(**sides, max_new_tokens=8).tokens, expected)
    assert torch.equal(verified.generate(**sides, max_new_tokens=8).tokens, expected)


@pytest.mark.parametrize(
    ("family", "slm_family", "fusion", "layer"),
    [
        ("bart", "llama", Add, "last"),
        ("llama", "t5", Add, [1, "last"]),
        ("t5", "gpt2", Prefix, "last"),
        ("gpt2", "llama", Prefix, 1),
        ("qwen2", "bart", ReplaceEncoder, "last"),
    ],
)
def test_the_draft_is_what_the_composition_writes(family, slm_family, fusion, layer, monkeypatch):
    verified = engine(family, slm_family, fusion=fusion, layer=layer)
    sides, drafts = batch(verified.llm, 4)[1], []
    if verified.draft.config.is_encoder_decoder != verified.llm.config.is_encoder_decoder:  # padded as the slm wants it
        sides["input_ids"], sides["attention_mask"] = sides["input_ids"].flip(1), sides["attention_mask"].flip(1)
    ready = verified.draft.slm_inputs(**sides)
    written = verified._slm.generate(**ready, max_new_tokens=24, min_new_tokens=24)
    judge = Choice.judge

    def noted(self, logits, step, drafted, odds):
        """The first token behind a decoder-only LLM's prompt, which it gives alone, is the draft's own here."""
        drafts.append(drafted)
        return judge(self, logits, step, drafted, odds) if drafted.shape[1] else Verdict(step[:, 0] * 0, written[:, 0])

    monkeypatch.setattr(Choice, "judge", noted)
    verified.generate(**sides, max_new_tokens=24, min_new_tokens=24)
    first = 0 if verified.llm.config.is_encoder_decoder else 1
    assert torch.equal(drafts[first], written[:, first : first + drafts[first].shape[1]])
    assert drafts[first].unique().numel() > 1


@pairs
def test_rows_end_where_the_llms_do(family, slm_family):
    for perfect in (False, True):
        verified = engine(family, slm_family, perfect=perfect)
        inputs, sides = batch(verified.llm, 8)
        tokens = by_generate(verified.llm, inputs, max_new_tokens=20)
        verified.llm.generation_config.eos_token_id = [EOS, tokens.flatten().mode().values.item(), tokens[0, 6].item()]
        for limits in ({"max_new_tokens": 20}, {"max_new_tokens": 20, "min_new_tokens": 7}, {"max_new_tokens": 1}):
            expected = by_generate(verified.llm, inputs, **limits)
            assert torch.equal(verified.generate(**sides, **limits).tokens, expected)


@pytest.mark.parametrize(("family", "slm_family"), [("bart", "gpt2"), ("llama", "t5")])
@pytest.mark.parametrize("layer", ["last", 1, 0])
def test_the_prompt_is_read_once(family, slm_family, layer):
    """The projector gets what an `Encoder` of its own would give, from the pass that the LLM's decoding starts from."""
    verified = engine(family, slm_family, layer=layer)
    inputs, sides = batch(verified.llm, 3)
    whole = verified.llm.get_encoder() if verified.llm.config.is_encoder_decoder else verified.llm.base_model
    encoder = Encoder(copy.deepcopy(whole), layer)
    assert encoder.content_hash() == verified.draft.config.encoder_hash
    calls, states = [], []
    whole.register_forward_hook(lambda *_: calls.append(1))
    verified.draft.projector.register_forward_pre_hook(lambda _module, args: states.append(args[0]))
    tokens = verified.generate(**sides, max_new_tokens=12).tokens
    assert (len(calls), len(states)) == (1, 1)
    expected, mask = encoder(inputs["input_ids"], inputs["attention_mask"])
    torch.testing.assert_close(states[0][mask.bool()], expected[mask.bool()])
    assert torch.equal(tokens, by_generate(verified.llm, inputs, max_new_tokens=12))


def test_a_penalty_that_the_generation_config_gets_later_is_honoured():
    verified = engine("gpt2", "gpt2")
    verified.fixed = True  # its buffers are those of graphs, and kept
    inputs, sides = batch(verified.llm, 3)
    for penalty in (1.0, 1.3, 1.7):
        verified.llm.generation_config.repetition_penalty = penalty
        expected = by_generate(verified.llm, inputs, max_new_tokens=12)
        assert torch.equal(verified.generate(**sides, max_new_tokens=12).tokens, expected)


@pytest.mark.parametrize(("family", "slm_family"), [("bart", "llama"), ("gpt2", "gpt2")])
@pytest.mark.parametrize("perfect", [False, True])
def test_settings_of_the_llms_generation_config_are_honoured(family, slm_family, perfect):
    verified = engine(family, slm_family, perfect=perfect)
    config = verified.llm.generation_config
    config.suppress_tokens = [7, 9]
    config.begin_suppress_tokens = [11, 12]
    config.forced_eos_token_id = EOS
    config.repetition_penalty = 1.7
    config.min_length = 9
    if verified.llm.config.is_encoder_decoder:
        config.forced_bos_token_id = 5
    ids = prompts(verified.llm, 8, 5)["input_ids"].clamp(min=3)
    mask = torch.ones_like(ids)
    expected = by_generate(verified.llm, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=12)
    sides = {"prompt_ids": ids, "prompt_attention_mask": mask, "input_ids": ids, "attention_mask": mask}
    assert torch.equal(verified.generate(**sides, max_new_tokens=12).tokens, expected)


@pytest.mark.parametrize("perfect", [False, True])
@pytest.mark.parametrize("settings", [{"temperature": 2.0}, {"temperature": 3.0, "top_k": 9, "top_p": 0.9}])
def test_samples_are_distributed_as_the_llms(perfect, settings):
    """Pairs of tokens of 6,000 draws against their exact probabilities: a chi-square test."""
    verified = engine("gpt2", "gpt2", perfect=perfect)
    rows, llm = 6000, verified.llm
    llm.generation_config.eos_token_id = None
    prompt = torch.tensor([[5, 17, 8]])
    first = _law(llm(prompt).logits[0, -1], **settings)
    after = torch.cat([prompt.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
    law = first[:, None] * _law(llm(after).logits[:, -1], **settings)
    ids = prompt.expand(rows, -1)
    sides = dict.fromkeys(("prompt_ids", "input_ids"), ids)
    sides |= dict.fromkeys(("prompt_attention_mask", "attention_mask"), torch.ones_like(ids))
    result = verified.generate(**sides, max_new_tokens=3, sampling=Sampling(**settings, seed=5))
    assert perfect or 0 < result.acceptance.per_block < 1.9, "the case is void if all is refused or accepted"
    seen = (result.tokens[:, 0] * VOCABULARY + result.tokens[:, 1]).bincount(minlength=VOCABULARY**2)
    expected = law.flatten().double() * rows
    common = expected >= 5
    seen, expected = (torch.cat([x[common], x[~common].sum()[None]]).double() for x in (seen, expected))
    chi = ((seen - expected).square() / expected.clamp(min=1e-9)).sum().item()
    freedom = int(common.sum())
    assert chi < freedom + 4 * (2 * freedom) ** 0.5, (chi, freedom)


def _law(logits, temperature, top_k=0, top_p=1.0):
    """Probabilities after both cuts, worked out token by token."""
    p = (logits / temperature).softmax(-1)
    if top_k:
        p = p.masked_fill(p < p.topk(top_k, dim=-1).values[..., -1:], 0)
        p = p / p.sum(-1, keepdim=True)
    above = torch.where(p[..., None, :] > p[..., None], p[..., None, :], 0).sum(-1)
    p = p.masked_fill(above >= top_p, 0)
    return p / p.sum(-1, keepdim=True)


def test_tokens_are_handed_out_as_they_come():
    verified = engine("llama", "gpt2")
    inputs, sides = batch(verified.llm, 3)
    common = by_generate(verified.llm, inputs, max_new_tokens=12)[1, 4].item()
    verified.llm.generation_config.eos_token_id = [EOS, common]
    events = []
    calls = {"on_first_token": lambda: events.append("first"), "on_tokens": events.append}
    tokens = verified.generate(**sides, max_new_tokens=20, **calls).tokens
    assert events[0] == "first"
    assert len(events) > 3
    assert torch.equal(torch.cat(events[1:], dim=1), tokens)


def test_the_two_vocabularies_may_be_padded_to_different_sizes():
    for wider, narrower in ((VOCABULARY + 3, VOCABULARY), (VOCABULARY, VOCABULARY + 3)):
        llm, slm = tiny("llama"), tiny("gpt2")
        llm.resize_token_embeddings(wider, mean_resizing=False)
        slm.resize_token_embeddings(narrower, mean_resizing=False)
        parts = {"projector": MlpProjector(32, 32), "alignment": SameTokenizer(32, 32), "fusion": Add(32, 32)}
        verified = VerifiedEngine(llm, LlmToSlm.compose(SharedEncoder(llm), slm, **parts).eval())
        inputs, sides = batch(llm, 4)
        assert torch.equal(
            verified.generate(**sides, max_new_tokens=12).tokens, by_generate(llm, inputs, max_new_tokens=12)
        )
        sampled = verified.generate(**sides, max_new_tokens=12, sampling=Sampling(temperature=5.0)).tokens
        assert sampled.max() < wider


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: setattr(v.llm.generation_config, "num_beams", 2), "num_beams=2"),
        (lambda v: setattr(v._slm, "decoder", None), "the slm cannot be read in blocks"),
    ],
)
def test_what_cannot_be_verified_is_left_to_the_llm(change, reason):
    verified = engine("gpt2", "gpt2")
    change(verified)
    inputs, sides = batch(verified.llm, 3)
    with pytest.warns(UserWarning, match=reason):
        result = verified.generate(**sides, max_new_tokens=6)
    assert result.acceptance.passes == 0
    assert torch.equal(result.tokens, by_generate(verified.llm, inputs, max_new_tokens=6))


def test_the_draft_of_another_llm_is_refused():
    draft = engine("gpt2", "gpt2").draft
    other = tiny("gpt2")
    other.transformer.h[0].ln_1.bias.data += 1
    with pytest.raises(UserError, match="the draft's encoder is not of this LLM"):
        VerifiedEngine(other, draft)
    verified = engine("gpt2", "gpt2")
    with pytest.raises(UserError, match="max_new_tokens=0"):
        verified.generate(**batch(verified.llm, 1)[1], max_new_tokens=0)


def test_what_cannot_fit_is_refused_after_giving_up_what_is_kept(monkeypatch):
    verified = engine("gpt2", "gpt2")
    verified.fixed = True
    sides = batch(verified.llm, 4)[1]
    verified.generate(**sides, max_new_tokens=2)
    monkeypatch.setattr("llmslm.generation.memory.available_bytes", lambda device: 1000)
    verified.generate(**sides, max_new_tokens=2)  # its buffers are there
    with pytest.raises(UserError, match="batch"):
        verified.generate(**sides, max_new_tokens=30)
    assert not verified._loops


def test_what_is_given_up_is_gone_at_once():
    """Its caches and graphs are given up to make room."""
    verified = engine("gpt2", "gpt2")
    verified.fixed = True
    sides = batch(verified.llm, 4)[1]
    for _ in range(2):
        verified.generate(**sides, max_new_tokens=2)
    held = [weakref.ref(loop) for loop in verified._loops.values()]
    assert [len(loop()._prompts) for loop in held] == [1]
    gc.disable()
    verified.forget()
    gone = held[0]() is None
    gc.enable()
    assert gone


def test_blocks_grow_with_what_is_kept():
    length = BlockLength({size: 1 + 0.05 * size for size in range(SHORTEST, LONGEST + 1)})
    start = length.current
    for _ in range(20):
        length.learn(kept=length.current, refused=0)
    assert SHORTEST < start < length.current == LONGEST
    for _ in range(20):
        length.learn(kept=0, refused=1)
    assert length.current == SHORTEST
    assert BlockLength({size: 1.0 + size for size in (2, 4)}).current == 2
    assert BlockLength({4: 1.0, 7: 1.1, 12: 3.0}).current == 7, "times that are measured may leap"
