"""The kernels of blocks against plain torch, and verified decoding by them; see test_kernels.py for how they run."""

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

pytest.importorskip("triton", reason="needs Triton (pip install triton)")

from llmslm.generation import verified_loop
from llmslm.generation.block import BlockStep
from llmslm.generation.choice import Choice
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.families import read
from llmslm.generation.fused_block import FusedBlockStep, FusedReports, FusedVerifiedBlock
from llmslm.generation.fused_prefill import FusedReader
from llmslm.generation.plan import CrossAttention, Linear, Norm
from llmslm.generation.side import Side
from llmslm.generation.state import DecodeState
from llmslm.generation.verified_block import VerifiedBlock, places
from tests.unit.generation.families import by_generate, tiny
from tests.unit.generation.test_kernels import (  # noqa: F401
    ATTENTIONS,
    COMPILED,
    DEVICE,
    DTYPES,
    HALF,
    _few_programs,
    close,
    drawn,
    made_decoder,
    made_state,
)
from tests.unit.generation.test_verified import batch, engine


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize(("starts", "new"), [([0], 1), ([16, 0, 33], 3), ([17], 8)])
def test_attention_of_blocks(kind: str, dtype: torch.dtype, starts: list[int], new: int) -> None:
    inner, capacity, rows = ATTENTIONS[kind], 47, len(starts)
    if kind.startswith("normed"):
        inner = replace(
            inner,
            q_norm=Norm(drawn(inner.head_dim, dtype=dtype), None, 1e-6, False),
            k_norm=Norm(drawn(inner.head_dim, dtype=dtype), None, 1e-6, False),
        )
    angles = drawn(40, inner.head_dim // 2).repeat(1, 2)  # fewer than positions: the last serves those behind it
    decoder = made_decoder(
        embedding=drawn(5, 4, dtype=dtype), cos=angles.cos(), sin=angles.sin(), distance_bias=drawn(inner.heads, 9)
    )
    state = made_state(rows, capacity, dtype=dtype, kv_heads=inner.kv_heads, head_dim=inner.head_dim)
    state.cache.copy_(torch.randn_like(state.cache))
    before = state.cache.clone()
    tokens = torch.zeros(rows, new, dtype=torch.long, device=DEVICE)
    positions = torch.tensor(starts, device=DEVICE)[:, None] + torch.arange(new, device=DEVICE)
    ours, plain = FusedBlockStep(decoder, state, early=COMPILED), BlockStep(decoder, state)
    qkv = drawn(rows * new, (inner.heads + 2 * inner.kv_heads) * inner.head_dim, dtype=dtype)
    results = []
    for step in (ours, plain):
        state.cache.copy_(before)
        step.logits = lambda length: torch.zeros(rows * new, device=DEVICE)  # type: ignore[method-assign]
        step.read(tokens, positions, capacity)  # sets the mask alone
        results.append((step.attended(qkv, inner, capacity), state.cache.clone()))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_blocks_over_the_encoders_states(dtype: torch.dtype) -> None:
    inner, rows, new, length = CrossAttention(0, 3, 12, 0.3, Linear(drawn(1, 1))), 3, 4, 17
    state = made_state(rows, length, dtype=dtype, kv_heads=3, head_dim=12, cross_heads=3)
    state.cross.copy_(torch.randn_like(state.cross))
    state.encoder_valid.copy_(torch.arange(length, device=DEVICE) < torch.tensor([[17], [1], [16]], device=DEVICE))
    ours, plain = FusedBlockStep(made_decoder(), state, early=COMPILED), BlockStep(made_decoder(), state)
    ours.tokens = plain.tokens = torch.zeros(rows, new, dtype=torch.long, device=DEVICE)
    q = drawn(rows * new, 36, dtype=dtype)
    close(ours.cross_attended(q, inner), plain.cross_attended(q, inner))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt-post-norm", "t5-gated", "bart"])
def test_a_whole_block_is_that_of_plain_torch(family: str) -> None:
    """Rows at different places, one with positions that the model has no embeddings for."""
    with torch.no_grad():
        decoder = read(tiny(family).to(DEVICE), 40)
        if decoder.positions is not None:
            decoder = replace(decoder, positions=decoder.positions[:40])
        logits = []
        for kind in (FusedBlockStep, BlockStep):
            torch.manual_seed(1)
            side = Side(decoder, 2, 48, 5 if decoder.crosses else 0)
            side.state.cache.copy_(torch.randn_like(side.state.cache))
            side.state.cross.copy_(torch.randn_like(side.state.cross))
            tokens = torch.tensor([[7, 8, 60], [9, 10, 11]], device=DEVICE)
            positions = torch.tensor([[3, 4, 5], [38, 39, 40]], device=DEVICE)
            step = BlockStep(decoder, side.state)
            if kind is FusedBlockStep:
                step = FusedBlockStep(decoder, side.state, early=COMPILED)
            logits.append(step.read(tokens, positions, 48))
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4 * float(logits[1].abs().max()))


def block_logits(family: str, new: int, dtype: torch.dtype, *, fused: bool) -> torch.Tensor:
    """Logits of a block of random tokens over random caches; weights and caches are rounded to 16 bits in any dtype."""
    decoder = read(tiny(family).to(DEVICE, HALF).to(dtype), 64)
    state = DecodeState(
        decoder.shape,
        batch=2,
        capacity=48,
        encoder_capacity=5 if decoder.crosses else 0,
        mode="plain",
        penalise=False,
        device=DEVICE,
        dtype=dtype,
    )
    torch.manual_seed(1)
    for mask, cache in ((state.valid, state.cache), (state.encoder_valid, state.cross)):
        mask.fill_(True)
        cache.copy_(drawn(*cache.shape, dtype=HALF))
    tokens = torch.randint(3, 60, (2, new), device=DEVICE)
    positions = torch.tensor([[3], [11]], device=DEVICE) + torch.arange(new, device=DEVICE)
    step = FusedBlockStep(decoder, state, early=COMPILED) if fused else BlockStep(decoder, state)
    return step.read(tokens, positions, 48).double()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "t5-gated", "bart"])
@pytest.mark.parametrize("new", [4, 8, 16])
def test_a_whole_block_in_16_bits_is_as_exact_as_that_of_plain_torch(family: str, new: int) -> None:
    """Its products are those of the matrix units, or for the widest cuBLAS's. Both are held against float64."""
    with torch.no_grad():
        exact = block_logits(family, new, torch.float64, fused=False)
        ours, plain = ((block_logits(family, new, HALF, fused=fused) - exact).norm() for fused in (True, False))
    assert ours < 2 * plain < 0.1 * exact.norm()


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA devices do, on the CPU: graphs are their functions."""

    def fused_blocks(llm: Side, draft: Side, choice: Choice) -> VerifiedBlock:
        return FusedVerifiedBlock(llm, draft, choice) if choice.mode == "plain" else VerifiedBlock(llm, draft, choice)

    monkeypatch.setattr(
        "llmslm.generation.side.block_step_for",
        lambda decoder, state: FusedBlockStep(decoder, state, early=COMPILED),
    )
    monkeypatch.setattr(verified_loop, "block_for", fused_blocks)
    monkeypatch.setattr(verified_loop, "reports_for", FusedReports)
    monkeypatch.setattr(
        "llmslm.generation.verified_prompt.reader_for",
        lambda decoder, depth: None if decoder is None or decoder.crosses else FusedReader(decoder, depth),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in the interpreter; infinity is right
@pytest.mark.skipif(COMPILED, reason="test_verified_cuda.py has it with its graphs")
@pytest.mark.parametrize(
    ("family", "slm_family"), [("llama", "gpt2"), ("qwen2", "llama"), ("t5", "llama"), ("gpt2", "t5")]
)
def test_verified_tokens_by_kernels_are_the_llms(family: str, slm_family: str, by_kernels: None) -> None:
    verified = engine(family, slm_family, perfect=family == "gpt2")
    verified.fixed = True
    inputs, sides = batch(verified.llm, 2)
    common = by_generate(verified.llm, inputs, max_new_tokens=8)[1, 4].item()
    verified.llm.generation_config.eos_token_id = [1, common]
    for limits in ({"max_new_tokens": 8}, {"max_new_tokens": 5, "min_new_tokens": 4}):
        parts: list[torch.Tensor] = []
        result = verified.generate(**sides, **limits, on_tokens=parts.append)
        assert torch.equal(result.tokens, by_generate(verified.llm, inputs, **limits))
        assert torch.equal(torch.cat(parts, dim=1), result.tokens)
        assert family != "gpt2" or result.acceptance.accepted > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.skipif(COMPILED, reason="test_verified_cuda.py has it with its graphs")
def test_tokens_of_blocks_in_plain_torch_are_told_of_by_a_kernel(by_kernels: None) -> None:
    """Where the choice has rules that the fused block knows nothing of."""
    verified = engine("llama", "gpt2", perfect=True)
    verified.fixed = True
    config = verified.llm.generation_config
    config.suppress_tokens, config.repetition_penalty, config.forced_eos_token_id = [7, 9], 1.7, 1
    inputs, sides = batch(verified.llm, 2)
    parts: list[torch.Tensor] = []
    result = verified.generate(**sides, max_new_tokens=6, on_tokens=parts.append)
    assert torch.equal(result.tokens, by_generate(verified.llm, inputs, max_new_tokens=6))
    assert torch.equal(torch.cat(parts, dim=1), result.tokens)


@pytest.mark.parametrize("size", [0, 4, 7])
def test_what_is_kept_is_what_plain_torch_keeps(size: int) -> None:
    """Random drafts against random logits: ends, rows that have ended, rows near their last token."""
    llm, rows = tiny("gpt2").to(DEVICE), 8
    llm.generation_config = GenerationConfig(eos_token_id=[1, 4], pad_token_id=0)
    choice = Choice(llm, rows, min_new=2, max_new=9, sampling=None)
    decoder = DecodeEngine(llm).decoder
    assert decoder is not None
    state = []
    for kind in (FusedVerifiedBlock, VerifiedBlock):
        torch.manual_seed(size)
        sides = [Side(decoder, rows, places(9) + 4, 0) for _ in range(2)]
        for side in sides:
            side.block_step = FusedBlockStep(decoder, side.state, early=COMPILED)
        block = kind(*sides, choice)
        truth = torch.randint(0, 6, (rows, size + 1), device=DEVICE)
        logits = torch.nn.functional.one_hot(truth, 61).float()
        drafted = torch.where(torch.rand(rows, size, device=DEVICE) < 0.7, truth[:, :-1], 9)
        block.produced.copy_(torch.tensor([0, 1, 2, 3, 5, 6, 8, 9]))
        block.ended[[2, 7]] = 1
        index = block.produced[:, None] + torch.arange(size + 1, device=DEVICE)
        block.tokens.scatter_(1, block.produced[:, None] + 1 + torch.arange(size, device=DEVICE), drafted)
        if kind is FusedVerifiedBlock:
            block._keep_largest(logits.flatten(0, 1), index.flatten(), size)
        else:
            block._keep(choice.judge(logits, index, drafted, None), index + 1)
        state.append((block.report, block.produced, block.ended, block.tokens))
    (report, produced, ended, tokens), plain = state
    assert torch.equal(report, plain[0])
    assert torch.equal(produced, plain[1])
    assert torch.equal(ended, plain[2])
    kept = torch.arange(tokens.shape[1], device=DEVICE) <= produced[:, None]
    assert torch.equal(tokens[kept], plain[3][kept])
    assert size == 0 or report[2].unique().numel() > 2, "the case is void if all is refused or accepted"


def test_the_host_is_told_of_a_block() -> None:
    """At its number, and of each token at its own; other words stay. Runs that are too many end at the last word."""
    llm, max_new = tiny("gpt2").to(DEVICE), 20
    decoder = DecodeEngine(llm).decoder
    assert decoder is not None
    choice = Choice(llm, 4, min_new=0, max_new=max_new, sampling=None)
    sides = [Side(decoder, 4, places(max_new) + 4, 0) for _ in range(2)]
    sides[0].block_step = FusedBlockStep(decoder, sides[0].state, early=COMPILED)
    block = VerifiedBlock(sides[0], sides[1], choice)
    reports, width = FusedReports(block), block.tokens.shape[1]
    words = reports.words
    for _ in range(3):
        reports.begin()
    block.tokens.copy_(torch.arange(4 * width).view(4, width) % 50)
    block.tokens[0, 4] = 2**32 - 1
    block.told.copy_(torch.tensor([1, 1, 3, 10**6]))
    rows = [(4, 1, 7, 2), (9, 0, 3, 0), (20, 0, 16, 17), (1, 1, 0, 1)]  # the second had ended before
    block.report.copy_(torch.tensor(rows).T)
    words.buffer.fill_(-1)
    reports.tell()
    if COMPILED:
        torch.cuda.synchronize()
    expected = torch.full((2 * max_new + 1, 4), -1)
    for row, (number, (produced, is_open, accepted, taken)) in enumerate(zip([1, 1, 3, 20], rows, strict=True)):
        report = produced << 15 | is_open << 14 | accepted << 7 | taken
        expected[max_new + number, row] = 3 << 33 | report
        expected[produced - taken : produced, row] = (
            3 << 33 | block.tokens[row, produced - taken + 1 : produced + 1].cpu()
        )
    assert torch.equal(words.buffer, expected)
    assert block.told.tolist() == [2, 2, 4, 10**6 + 1]
    words.buffer[max_new + 1, 2:] = expected[max_new + 3, 2]  # as if all were at this block
    assert words.reports(1) == [*rows[:3], rows[2]]
    assert reports.tokens(2, 4, [4, 0, 0, 0]).tolist() == [[3, 2**32 - 1]] + 3 * [[choice.rules.pad] * 2]
