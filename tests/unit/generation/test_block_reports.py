"""Verified decoding over a device that is made up: it tells of its blocks at once, or late, tokens last, or never."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmslm.generation import verified_loop
from llmslm.generation import words as words_module
from llmslm.generation.block_reports import ToldReports
from llmslm.generation.verified import VerifiedEngine
from llmslm.generation.verified_block import VerifiedBlock
from llmslm.generation.words import BlockWords
from tests.unit.generation.families import EOS, by_generate
from tests.unit.generation.test_loop import Stream
from tests.unit.generation.test_verified import batch, engine


class Device:
    """Writes the words of a block one by one, those of its tokens last.

    Args:
        late: whether it writes one each time that the host lets others go on, not all at once.
    """

    def __init__(self, late: bool) -> None:
        self.late = late
        self.queue: list[Callable[[], Any]] = []

    def tell(self, reports: ToldReports) -> None:
        block, words = reports.block, reports.words
        number, put = int(words.number) << 33, words.buffer.__setitem__
        tokens = []
        for row, (produced, is_open, accepted, taken) in enumerate(block.report.T.tolist()):
            report = produced << 15 | is_open << 14 | accepted << 7 | taken
            at = words.max_new + min(int(block.told[row]), words.blocks - 1)
            self.queue.append(functools.partial(put, (at, row), number | report))
            for index in range(produced - taken, produced):
                word = number | int(block.tokens[row, index + 1])
                tokens.append(functools.partial(put, (index, row), word))
        block.told += 1
        self.queue += tokens
        while self.queue and not self.late:
            self.run()

    def run(self, _seconds: float = 0) -> None:
        if self.queue:
            self.queue.pop(0)()


@pytest.fixture(params=[True, False], ids=["late", "at once"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device(request.param)

    class Reports(ToldReports):
        def tell(self) -> None:
            made.tell(self)

    monkeypatch.setattr(verified_loop, "reports_for", Reports)
    monkeypatch.setattr(words_module, "_SPIN", 0)
    monkeypatch.setattr(words_module.time, "sleep", made.run)
    return made


def told(verified: VerifiedEngine) -> VerifiedEngine:
    verified.fixed = True
    return verified


@pytest.mark.parametrize(("family", "slm_family"), [("llama", "gpt2"), ("t5", "llama"), ("t5", "t5"), ("gpt2", "t5")])
@pytest.mark.parametrize("perfect", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_told_is_what_is_seen(
    family: str, slm_family: str, perfect: bool, rows: int, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In calls one after another by the same buffers: ends, limits, all tokens drafted, streams, counts."""
    ours = told(engine(family, slm_family, perfect=perfect))
    inputs, _ = batch(ours.llm, rows)
    end = by_generate(ours.llm, inputs, max_new_tokens=12)[-1, 6].item()
    ours.llm.generation_config.eos_token_id = [EOS, end]
    results = []
    for limits in ({"max_new_tokens": 12}, {"max_new_tokens": 12, "min_new_tokens": 9}, {"max_new_tokens": 1}):
        for seed in range(3):
            inputs, sides = batch(ours.llm, rows, 9, seed)
            parts: list[torch.Tensor] = []
            first: list[int] = []
            hand_out = {"on_first_token": functools.partial(first.append, 1), "on_tokens": parts.append}
            result = ours.generate(**sides, **limits, **hand_out)
            assert torch.equal(result.tokens, by_generate(ours.llm, inputs, **limits))
            assert torch.equal(torch.cat(parts, dim=1), result.tokens)
            assert first == [1]
            assert torch.equal(ours.generate(**sides, **limits).tokens, result.tokens), "asked for at the end alone"
            results.append((sides, limits, result.acceptance))
    monkeypatch.setattr(verified_loop, "reports_for", verified_loop.SeenReports)
    ours.forget()
    for sides, limits, acceptance in results:
        assert ours.generate(**sides, **limits).acceptance == acceptance


def test_tokens_are_handed_out_while_the_next_block_runs(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    verified = told(engine("llama", "gpt2"))
    sides, blocks, launched = batch(verified.llm, 1)[1], [], []
    run = VerifiedBlock.run
    monkeypatch.setattr(VerifiedBlock, "run", lambda self, size: blocks.append(size) or run(self, size))
    result = verified.generate(**sides, max_new_tokens=9, on_tokens=lambda tokens: launched.append(len(blocks)))
    assert launched[:3] == [1, 2, 3]
    assert len(blocks) == result.acceptance.passes, "none is launched behind the end"


def test_a_call_after_one_that_broke_off_is_not_disturbed(device: Device) -> None:
    def fails(_tokens: torch.Tensor) -> None:
        raise ValueError("nobody listens any more")

    verified = told(engine("llama", "gpt2"))
    with pytest.raises(ValueError, match="nobody listens"):
        verified.generate(**batch(verified.llm, 3)[1], max_new_tokens=12, on_tokens=fails)
    inputs, sides = batch(verified.llm, 3, seed=1)
    expected = by_generate(verified.llm, inputs, max_new_tokens=12)
    assert torch.equal(verified.generate(**sides, max_new_tokens=12).tokens, expected)


def test_runs_outside_of_a_call_count_for_nothing(device: Device) -> None:
    """More of them than there are words for."""
    verified = told(engine("llama", "gpt2", perfect=True))
    inputs, sides = batch(verified.llm, 3)
    expected = by_generate(verified.llm, inputs, max_new_tokens=8)
    for _ in range(2):
        assert torch.equal(verified.generate(**sides, max_new_tokens=8).tokens, expected)
        for _ in range(12):
            verified.loops[0].advance(2)


def test_words_that_never_come_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    words = BlockWords(2, 5, torch.device("cpu"))
    words.begin()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream(None))
    with pytest.raises(RuntimeError, match="the device is idle, but word 6 of call 1 has not come"):
        words.reports(1)
    words.buffer[1:3] = 1 << 33 | 7
    assert words.tokens(1, 4, [3, 0]).tolist()[0][:2] == [7, 7], "row 1 has none, whose words are not waited for"
    with pytest.raises(RuntimeError, match="word 1 of call 1 has not come"):
        words.tokens(1, 4, [3, 4])
