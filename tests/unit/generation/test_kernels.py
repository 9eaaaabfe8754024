"""The Triton kernels against plain torch: compiled where there is a CUDA device, else by Triton's interpreter.

The interpreter (tests/conftest.py) runs them on CPU tensors; `pip install triton` (286 MB) is all it takes:

    pip install triton
    pytest tests/unit/generation/test_kernels.py
"""

# ruff: noqa: E402

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

COMPILED = torch.cuda.is_available()
pytest.importorskip("triton", reason="needs Triton (pip install triton)")

from llmslm.generation import fused, fused_rows, self_check
from llmslm.generation.engine import DecodeEngine
from llmslm.generation.families import read
from llmslm.generation.fused import FusedStep, Tile
from llmslm.generation.loop import GraphLoop
from llmslm.generation.plan import CrossAttention, Decoder, Linear, Norm, SelfAttention
from llmslm.generation.sampling import TokenRules
from llmslm.generation.state import CacheShape, DecodeState
from llmslm.generation.step import TorchStep
from tests.unit.generation.families import BUILD, by_generate, prompts, tiny

DEVICE = torch.device("cuda" if COMPILED else "cpu")
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
HALF = torch.bfloat16 if COMPILED else torch.float16  # the interpreter takes bfloat16 for integers in tl.dot


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted programs take milliseconds each: a few of them with blocks of 16, so that each takes several."""
    if not COMPILED:
        monkeypatch.setattr(fused, "tile_for", few_programs)
        monkeypatch.setattr(fused, "_attention_tile", lambda programs, head_dim: {"BLOCK_L": 16, "num_warps": 1})


def few_programs(rows: int, columns: int, batch: int, gated: bool) -> Tile:
    wide = 1 << (columns - 1).bit_length()
    return Tile(16, 16 if wide > fused._WIDEST else wide, 1, -(-rows // 16) if wide > fused._WIDEST else 2)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def made_state(
    batch: int, capacity: int, mode: str = "plain", dtype: torch.dtype = torch.float32, **sizes: Any
) -> DecodeState:
    shape = CacheShape(**{"layers": 1, "kv_heads": 1, "head_dim": 4, "vocabulary": 5, **sizes})
    encoder_capacity = capacity if shape.cross_heads else 0
    state = DecodeState(
        shape,
        batch=batch,
        capacity=capacity,
        encoder_capacity=encoder_capacity,
        mode=mode,
        penalise=False,
        device=DEVICE,
        dtype=dtype,
    )
    state.valid.fill_(True)
    return state


def steps(decoder: Decoder, state: DecodeState) -> tuple[FusedStep, TorchStep]:
    """The step by kernels, which start early where they are compiled, and that in plain torch."""
    return FusedStep(decoder, state, early=COMPILED), TorchStep(decoder, state)


def made_decoder(**fields: Any) -> Decoder:
    head = Linear(drawn(5, 4))
    return Decoder(
        **{"embedding": drawn(5, 4), "head": head, "sublayers": [], "shape": CacheShape(1, 1, 4, 5), **fields}
    )


def linear_of(*fields: Any) -> Linear:
    """A linear whose weights are there: kernels that start early read them before their predecessor has ended."""
    linear = Linear(*fields)
    if COMPILED:
        torch.cuda.synchronize()
    return linear


def close(ours: torch.Tensor, plain: torch.Tensor) -> None:
    tolerance = TOLERANCE[plain.dtype]
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * float(plain.abs().max()))


def exact(x: torch.Tensor, linear: Linear, norm: Norm | None = None, residual: torch.Tensor | None = None) -> Any:
    """A product in float64, rounded: cuBLAS's own in 16 bits may be further off than the kernels'."""
    plain = TorchStep(made_decoder(), made_state(x.shape[0], 4))
    return plain.linear(*map(doubled, (x, linear, norm, residual))).to(x.dtype)


def doubled(given: Any) -> Any:
    """A tensor, or one of the plan's parts, in float64."""
    if given is None or isinstance(given, torch.Tensor):
        return None if given is None else given.double()
    values = {field.name: getattr(given, field.name) for field in fields(given)}
    return replace(given, **{name: doubled(value) for name, value in values.items() if isinstance(value, torch.Tensor)})


NORMS = {
    "none": lambda width, dtype: None,
    "rms": lambda width, dtype: Norm(drawn(width, dtype=dtype), None, 1e-6, False, 0.5),
    "layer": lambda width, dtype: Norm(drawn(width, dtype=dtype), drawn(width, dtype=dtype), 1e-5, True),
    "unbiased layer": lambda width, dtype: Norm(drawn(width, dtype=dtype), None, 1e-5, True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 61, 48), (3, 33, 31), (8, 7, 100)])
def test_products(
    dtype: torch.dtype,
    norm: str,
    activation: str | None,
    batch: int,
    rows: int,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not COMPILED:  # the interpreter cannot do what `test_products_by_the_matrix_units` is about in bfloat16
        monkeypatch.setattr(fused_rows, "_trusted", False)
    ours = steps(made_decoder(), made_state(batch, 4))[0]
    x, before = drawn(batch, columns, dtype=dtype), NORMS[norm](columns, dtype)
    for gated, biased, residual in (
        (False, False, None),
        (True, True, None),
        (False, True, drawn(batch, rows).to(dtype)),
    ):
        height = rows * (2 if gated else 1)
        bias = drawn(height, dtype=dtype) if biased else None
        linear = linear_of(drawn(height, columns, dtype=dtype) / columns**0.5, bias, activation, gated)
        close(ours.linear(x, linear, before, residual), exact(x, linear, before, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "columns"), [(1, 40), (3, 33), (8, 17)])
def test_products_whose_input_takes_several_passes(
    dtype: torch.dtype, batch: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns += 8192 if COMPILED else 0
    if not COMPILED:
        monkeypatch.setattr(fused, "_WIDEST", 16)
        monkeypatch.setattr(fused_rows, "_trusted", False)
    ours = steps(made_decoder(), made_state(batch, 4))[0]
    x, residual = drawn(batch, columns, dtype=dtype), drawn(batch, 21, dtype=dtype)
    for bias, added in ((None, None), (drawn(21, dtype=dtype), residual)):
        linear = linear_of(drawn(21, columns, dtype=dtype) / columns**0.5, bias)
        close(ours.linear(x, linear, None, added), exact(x, linear, None, added))
    gated = linear_of(drawn(42, columns, dtype=dtype) / columns**0.5, None, "silu", True)
    close(ours.linear(x, gated), exact(x, gated))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("activation", "batch", "rows", "columns"),
    [
        (None, 1, 33, 100),
        ("silu", 2, 61, 48),
        ("gelu_tanh", 3, 61, 48),
        ("silu", 8, 33, 31),
        ("relu", 16, 7, 300),
        ("silu", 5, 20, 1040),
        (None, 13, 70, 100),
        ("silu", 45, 33, 100),
    ],
)
def test_products_by_the_matrix_units(
    norm: str, activation: str | None, batch: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The units take weights that are rounded once the norm's gain is in them."""
    monkeypatch.setattr(fused_rows, "_MANY_OUTPUTS", 64)
    x, before = drawn(batch, columns, dtype=HALF), NORMS[norm](columns, HALF)
    for gated, biased, residual in (
        (False, False, None),
        (True, True, None),
        (False, True, drawn(batch, rows, dtype=HALF)),
    ):
        height = rows * (2 if gated else 1)
        bias = drawn(height, dtype=HALF) if biased else None
        linear = linear_of(drawn(height, columns, dtype=HALF) / columns**0.5, bias, activation, gated)
        suits = fused_rows.suits(x, linear, before, fused_rows.PROMPT_ROWS)
        assert suits == (batch > 1 or before is None or not before.centred)
        options = steps(made_decoder(), made_state(batch, 4))[0].options
        close(fused_rows.rows_product(x, linear, before, residual, options), exact(x, linear, before, residual))


@pytest.mark.parametrize(
    ("outputs", "inputs", "batch", "gated", "tile"),
    [
        (1728, 576, 8, False, (2, 9, 2)),
        (1536, 576, 13, True, (2, 9, 2)),
        (16384, 576, 13, False, (2, 9, 4)),
        (576, 1536, 13, False, (4, 12, 2)),
        (50257, 768, 8, False, (2, 12, 2)),
        (5632, 2048, 8, True, (8, 8, 2)),
        (32000, 2048, 13, False, (8, 8, 4)),
    ],
)
def test_tiles_have_more_warps_where_a_thread_has_too_few_registers(
    outputs: int, inputs: int, batch: int, gated: bool, tile: tuple[int, int, int]
) -> None:
    """The first four are those that were measured."""
    assert fused_rows.row_tile(outputs, inputs, batch, gated=gated) == fused_rows.RowTile(*tile)


@pytest.mark.parametrize(("batch", "columns"), [(3, 40), (5, 33), (9, 17)])
def test_products_by_the_matrix_units_in_several_passes(
    batch: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if COMPILED:
        columns += 2048
    else:
        monkeypatch.setattr(fused_rows, "_WIDEST", 16)
        monkeypatch.setattr(fused_rows, "_LONG", (1, 16))
    x, residual = drawn(batch, columns, dtype=HALF), drawn(batch, 21, dtype=HALF)
    ours = steps(made_decoder(), made_state(batch, 4))[0]
    for bias, added in ((None, None), (drawn(21, dtype=HALF), residual)):
        linear = linear_of(drawn(21, columns, dtype=HALF) / columns**0.5, bias)
        assert fused_rows.suits(x, linear, None)
        close(ours.linear(x, linear, None, added), exact(x, linear, None, added))
    assert not fused_rows.suits(x, linear, NORMS["rms"](columns, HALF))


@pytest.mark.parametrize(
    ("rows", "inputs", "suits"),
    [(1, 1536, True), (2, 1536, True), (1, 1544, False), (2, 3072, False), (3, 3072, True), (17, 64, False)],
)
def test_few_rows_of_wide_inputs_are_left_to_the_kernels_of_single_ones(rows: int, inputs: int, suits: bool) -> None:
    x, linear = torch.zeros(rows, inputs, dtype=HALF), Linear(torch.zeros(16, inputs, dtype=HALF))
    assert fused_rows.suits(x, linear, None) == suits
    with fused_rows.left_out():
        assert not fused_rows.suits(x, linear, None)
    assert fused_rows.suits(x, linear, None) == suits


@pytest.mark.parametrize(("norm", "rows", "suits"), [("layer", 1, False), ("layer", 2, True), ("rms", 1, True)])
def test_single_rows_with_a_centred_norm_are_left_to_the_kernels_of_single_ones(norm, rows, suits) -> None:
    x, linear = torch.zeros(rows, 64, dtype=HALF), Linear(torch.zeros(16, 64, dtype=HALF))
    assert fused_rows.suits(x, linear, NORMS[norm](64, HALF)) == suits


def _raises() -> float:
    raise RuntimeError("no such instruction\nfurther lines")


@pytest.mark.parametrize(("measure", "reason"), [(lambda: 0.5, "logits are off by 0.5"), (_raises, "no such instruc")])
def test_products_by_the_matrix_units_that_fail_are_done_without(measure, reason, monkeypatch) -> None:
    monkeypatch.setattr(fused_rows, "_trusted", True)
    x, linear = torch.zeros(4, 64, dtype=HALF), linear_of(torch.zeros(16, 64, dtype=HALF))
    fused_rows.try_out(lambda: 0.01, 0.05)
    assert fused_rows.suits(x, linear, None)
    with pytest.warns(UserWarning, match=f"computed the slower way: {reason}"):
        fused_rows.try_out(measure, 0.05)
    assert not fused_rows.suits(x, linear, None)


ATTENTIONS = {
    "plain": SelfAttention(0, 4, 4, 8, 0.3),
    "grouped, rotated": SelfAttention(0, 6, 2, 12, 0.3, rotary=True),
    "normed, rotated": SelfAttention(0, 4, 1, 16, 0.3, rotary=True),
    "biased": SelfAttention(0, 4, 4, 8, 1.0, biased=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize(("batch", "filled"), [(1, 0), (3, 1), (8, 15), (3, 16), (1, 17), (2, 45), (3, 46)])
def test_attention_over_the_tokens_so_far(kind: str, dtype: torch.dtype, batch: int, filled: int) -> None:
    inner, capacity = ATTENTIONS[kind], 47
    if kind.startswith("normed"):
        norm = Norm(drawn(inner.head_dim, dtype=dtype), None, 1e-6, False)
        inner = replace(inner, q_norm=norm, k_norm=norm)
    angles = drawn(capacity, inner.head_dim // 2).repeat(1, 2)
    decoder = made_decoder(cos=angles.cos(), sin=angles.sin(), distance_bias=drawn(inner.heads, 9))
    state = made_state(batch, capacity, dtype=dtype, kv_heads=inner.kv_heads, head_dim=inner.head_dim)
    state.cache.copy_(torch.randn_like(state.cache))
    missing = torch.arange(batch, device=DEVICE).clamp(max=filled)  # rows with ever more padding on the left
    state.valid.copy_(torch.arange(capacity, device=DEVICE) >= missing[:, None])
    state.slot.fill_(filled)
    state.position.copy_(filled - missing)
    qkv = drawn(batch, (inner.heads + 2 * inner.kv_heads) * inner.head_dim, dtype=dtype)
    before = state.cache.clone()
    ours, plain = steps(decoder, state)
    expected = plain.attended(qkv, inner, filled)
    stored = state.cache[..., filled, :].clone()
    state.cache.copy_(before)
    close(ours.attended(qkv, inner, filled), expected)
    close(state.cache[..., filled, :], stored)
    state.cache[..., filled, :] = before[..., filled, :]
    assert torch.equal(state.cache, before), "no other place of the cache is written"


@pytest.mark.parametrize("kind", ["grouped, rotated", "biased"])
def test_rows_may_stand_at_different_places(kind: str) -> None:
    """As those of a draft do, once different numbers of tokens have been kept."""
    inner, capacity, places = ATTENTIONS[kind], 40, [0, 33, 16, 7]
    angles = drawn(capacity, inner.head_dim // 2).repeat(1, 2)
    decoder = made_decoder(cos=angles.cos(), sin=angles.sin(), distance_bias=drawn(inner.heads, 9))
    sizes = {"kv_heads": inner.kv_heads, "head_dim": inner.head_dim}
    state, alone = made_state(4, capacity, **sizes), made_state(1, capacity, **sizes)
    state.cache.copy_(torch.randn_like(state.cache))
    for place in (state.slot, state.position):
        place.copy_(torch.tensor(places))
    qkv = drawn(4, (inner.heads + 2 * inner.kv_heads) * inner.head_dim)
    before = state.cache.clone()
    ours, plain = steps(decoder, state)[0].attended(qkv, inner, 0), steps(decoder, alone)[1]
    for row, place in enumerate(places):
        alone.cache.copy_(before[:, :, row : row + 1])
        alone.position.fill_(place)
        close(ours[row : row + 1], plain.attended(qkv[row : row + 1], inner, place))
        close(state.cache[:, :, row : row + 1, :, place], alone.cache[..., place, :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 16), (8, 17), (2, 47)])
def test_attention_over_the_encoders_states(dtype: torch.dtype, batch: int, length: int) -> None:
    inner = CrossAttention(0, 3, 12, 0.3, linear_of(drawn(1, 1)))
    state = made_state(batch, length, dtype=dtype, kv_heads=3, head_dim=12, cross_heads=3)
    state.cross.copy_(torch.randn_like(state.cross))
    kept = length - torch.arange(batch, device=DEVICE).clamp(max=length - 1)
    state.encoder_valid.copy_(torch.arange(length, device=DEVICE) < kept[:, None])
    state.encoder_valid[0, : length // 2 + length % 2 - 1] = False  # a row whose first blocks are padding
    ours, plain = steps(made_decoder(), state)
    q = drawn(batch, 36, dtype=dtype)
    close(ours.cross_attended(q, inner), plain.cross_attended(q, inner))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("width", [7, 1030])
def test_embeddings(dtype: torch.dtype, learned: bool, width: int) -> None:
    positions = drawn(9, width, dtype=dtype) if learned else None
    embedding = drawn(5, width, dtype=dtype)
    decoder = made_decoder(embedding=embedding, positions=positions, position_offset=2, embedding_scale=3.0)
    state = made_state(3, 4)
    state.token.copy_(torch.tensor([0, 4, 2]))
    state.position.copy_(torch.tensor([6, 0, 1]))
    ours, plain = steps(decoder, state)
    close(ours.embedded(), plain.embedded())


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of numpy, which the interpreter is made of
@pytest.mark.parametrize("vocabulary", [5, 1024, 2500])
@pytest.mark.parametrize("eos", [[], [1], [1, 3]])
def test_the_largest_logit(vocabulary: int, eos: list[int]) -> None:
    """Ties, minus infinity, ends that do not count yet, rows that have ended; and the state after it."""
    logits = drawn(8, vocabulary)
    logits[0, [2, vocabulary - 1]] = 9.0
    logits[1, 1] = 9.0
    logits[2, 3] = logits[4, 3] = 9.0
    logits[5] = float("-inf")
    logits[6] = float("nan")
    state = made_state(8, 6, vocabulary=vocabulary)
    config = GenerationConfig(eos_token_id=eos or None, pad_token_id=0)
    rules = TokenRules(config, vocabulary=vocabulary, encoder_decoder=False, device=DEVICE)
    results = []
    for take in (step.take_largest for step in steps(made_decoder(), state)):
        state.forget()
        state.ask(min_new=2, max_new=5, sampling=None, penalty=1.0)
        state.step.copy_(torch.tensor([0, 1, 2, 3, 1, 2, 3, 4]))
        state.finished[3] = True
        state.out.zero_()
        take(logits.clone(), rules)
        results.append([state.token, state.finished, state.out, state.step, state.slot, state.position])
        results[-1] = [tensor.clone() for tensor in results[-1]]
    for ours, plain in zip(*results, strict=True):
        rows = [0, 1, 2, 3, 4, 5, 7]
        assert torch.equal(ours[rows], plain[rows])
    assert 0 <= results[0][0][6] < vocabulary, "NaN gives some token, but one that there is"


@pytest.mark.parametrize("eos", [[], [1, 3]])
@pytest.mark.parametrize("mode", ["plain", "greedy", "sampled"])
def test_the_host_is_told_of_each_token(mode: str, eos: list[int]) -> None:
    """At its row's step, whether the row had ended before, ends with it or goes on; other words stay as they are."""
    state = made_state(4, 6, mode)
    config = GenerationConfig(eos_token_id=eos or None, pad_token_id=0)
    rules = TokenRules(config, vocabulary=5, encoder_decoder=False, device=DEVICE)
    step, words = steps(made_decoder(), state)[0], state.words
    for _ in range(3):
        words.begin()
    state.step.copy_(torch.tensor([0, 5, 2, 3]))
    state.finished[1] = True
    words.buffer.fill_(-1)
    logits = torch.full((4, 5), float("-inf"), device=DEVICE)
    logits[torch.arange(4), [4, 2, 3, 2]] = 0.0
    if mode == "plain":
        step.take_largest(logits, rules)
    else:
        rules.choose(logits, state)
        state.move_on()
        step.tell()
    if COMPILED:
        torch.cuda.synchronize()
    expected = torch.full((6, 4), -1)
    for row, at, ended, token in ((0, 0, False, 4), (1, 5, True, 0), (2, 2, bool(eos), 3), (3, 3, False, 2)):
        expected[at, row] = (3 << 33) | (ended << 32) | token
    assert torch.equal(words.buffer, expected)
    assert state.token.tolist() == [4, 0, 3, 2]


@pytest.mark.parametrize("family", BUILD)
def test_a_whole_step_is_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "step_for", lambda decoder, state: steps(decoder, state)[0])
    model = tiny(family).to(DEVICE)
    with torch.no_grad():
        assert self_check.relative_difference(model, read(model, 128), 2) < 1e-5


@pytest.fixture
def graph_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of CUDA devices on the CPU: graphs are their functions, words are there at once."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(GraphLoop, "prepare", lambda self, prompt, mask: None)
    monkeypatch.setattr("llmslm.generation.loop.step_for", lambda decoder, state: steps(decoder, state)[0])
    monkeypatch.setattr("llmslm.generation.engine.HostLoop", GraphLoop)


@pytest.mark.skipif(COMPILED, reason="test_cuda.py has the loop with its graphs")
@pytest.mark.parametrize(("family", "batch", "length"), [("llama", 3, 9), ("gpt2", 8, 5), ("t5", 3, 7), ("bart", 1, 4)])
def test_the_loop_of_cuda_devices_gives_the_tokens_of_generate(
    family: str, batch: int, length: int, graph_loop: None
) -> None:
    model = tiny(family)
    inputs = prompts(model, batch, length)
    common = by_generate(model, inputs, max_new_tokens=12).flatten().mode().values.item()
    model.generation_config.eos_token_id = [1, common]
    engine = DecodeEngine(model)
    for limits in ({"max_new_tokens": 1}, {"max_new_tokens": 17, "min_new_tokens": 6}):
        parts: list[torch.Tensor] = []
        tokens = engine.generate(**inputs, **limits, on_tokens=parts.append)
        assert torch.equal(tokens, by_generate(model, inputs, **limits))
        assert torch.equal(torch.cat(parts, dim=1), tokens)


@pytest.mark.skipif(COMPILED, reason="test_cuda.py has the loop with its graphs")
def test_the_loop_of_cuda_devices_honours_a_generation_config(graph_loop: None) -> None:
    """By rules in plain torch, behind which a kernel of its own tells of the tokens."""
    model = tiny("llama")
    inputs = prompts(model, 3, 9)
    config = model.generation_config
    config.suppress_tokens, config.repetition_penalty, config.forced_eos_token_id = [7, 9], 1.7, 1
    parts: list[torch.Tensor] = []
    tokens = DecodeEngine(model).generate(**inputs, max_new_tokens=8, on_tokens=parts.append)
    assert torch.equal(tokens, by_generate(model, inputs, max_new_tokens=8))
    assert torch.equal(torch.cat(parts, dim=1), tokens)


@pytest.mark.skipif(COMPILED, reason="test_cuda.py has the loop with its graphs")
def test_little_is_launched_behind_an_end_of_sequence(graph_loop: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, ahead, step = [], set(), GraphLoop._next_token
    monkeypatch.setattr(GraphLoop, "_next_token", lambda loop: launched.append(ahead.add(loop._ahead) or step(loop)))
    model = tiny("llama")
    inputs = prompts(model, 1, 5)
    model.generation_config.eos_token_id = None
    unended = by_generate(model, inputs, max_new_tokens=60)[0].tolist()
    end = next(token for token in unended[20:] if token not in unended[:20])
    model.generation_config.eos_token_id = end
    tokens = DecodeEngine(model, verify=False).generate(**inputs, max_new_tokens=60)
    assert tokens.shape[1] == unended.index(end) + 1
    assert 1 + len(launched) < tokens.shape[1] + max(ahead)
