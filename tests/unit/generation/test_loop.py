"""The loop of CUDA devices over a device that is made up: it writes its words at once, or late, or never."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from llmslm.generation import loop as loops
from llmslm.generation import words as words_module
from llmslm.generation.families import read
from llmslm.generation.loop import GraphLoop
from llmslm.generation.sampling import TokenRules
from llmslm.generation.state import DecodeState
from llmslm.generation.step import TorchStep
from tests.unit.generation.families import tiny

END, PAD, ROWS, CAPACITY = 9, 0, 3, 40
PROMPT = torch.ones(ROWS, 4, dtype=torch.long)


class Device:
    """Runs what is launched in turn, with the number of the call that was set by then.

    Args:
        loop: whose graphs are replaced.
        late: whether a step runs when the host lets others go on, not when it is launched.
    """

    def __init__(self, loop: GraphLoop, late: bool) -> None:
        self.loop, self.words, self.late = loop, loop.state.words, late
        self.answer = torch.zeros(ROWS, CAPACITY, dtype=torch.long)
        self.queue: list[tuple[int, int, torch.Tensor]] = []
        self.launched = 0
        loop._first, loop._next = self.first, self.next  # type: ignore[assignment]

    def first(self, *_prompt: torch.Tensor) -> None:
        self.launched = 0
        self.next()

    def next(self) -> None:
        self.queue.append((int(self.words.number), self.launched, self.answer))
        self.launched += 1
        if not self.late:
            self.run()

    def run(self, _seconds: float = 0) -> None:
        if self.queue:
            number, step, answer = self.queue.pop(0)
            self.loop.state.out[:, step] = answer[:, step]
            ended = (answer[:, : step + 1] == END).any(dim=1).long()
            self.words.buffer[step] = (number << 33) | (ended << 32) | answer[:, step]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> GraphLoop:
    """Of a model of 2 layers."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(loops, "step_for", TorchStep)
    model = tiny("llama")
    decoder = read(model, 64)
    sizes = {"batch": ROWS, "capacity": CAPACITY, "encoder_capacity": 0, "mode": "plain", "penalise": False}
    state = DecodeState(decoder.shape, **sizes, device=torch.device("cpu"), dtype=torch.float32)  # type: ignore[arg-type]
    config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    rules = TokenRules(config, vocabulary=decoder.shape.vocabulary, encoder_decoder=False, device=torch.device("cpu"))
    return GraphLoop(model, decoder, state, rules, None)


@pytest.fixture(params=[True, False], ids=["late", "at once"])
def device(request: pytest.FixtureRequest, loop: GraphLoop, monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device(loop, request.param)
    monkeypatch.setattr(words_module, "_SPIN", 0)
    monkeypatch.setattr(words_module.time, "sleep", made.run)
    return made


def answer(ends: list[int], seed: int = 0) -> torch.Tensor:
    """Rows of tokens that end at these steps, if at all."""
    tokens = torch.randint(10, 60, (ROWS, CAPACITY), generator=torch.Generator().manual_seed(seed))
    for row, end in enumerate(ends):
        tokens[row, end:] = torch.tensor([END] + [PAD] * CAPACITY)[: CAPACITY - end]
    return tokens


def run(loop: GraphLoop, max_new: int, **settings: Any) -> torch.Tensor:
    arguments = {"may_end": True, "on_first_token": None, "on_tokens": None} | settings
    return loop.run(PROMPT, PROMPT, max_new, **arguments)


@pytest.mark.parametrize(("ends", "length"), [([4, 17, 11], 18), ([0, 0, 0], 1), ([3, 99, 3], 30), ([29, 29, 2], 30)])
def test_what_is_handed_out_is_the_result_and_little_is_launched_behind_it(device, ends, length) -> None:
    device.answer = answer(ends)
    events: list[Any] = []
    tokens = run(device.loop, 30, on_first_token=lambda: events.append("first"), on_tokens=events.append)
    assert torch.equal(tokens, device.answer[:, :length])
    assert [event for event in events if isinstance(event, str)] == [events[0]] == ["first"]
    assert torch.equal(torch.cat(events[1:], dim=1), tokens)
    assert length <= device.launched <= min(length + device.loop._ahead - 1, 30)


def test_a_step_waits_behind_the_one_that_runs_and_more_where_they_are_short(device) -> None:
    assert device.loop._ahead == 2  # of 4 sublayers each
    ahead = []
    device.answer = answer([])
    run(device.loop, 20, on_tokens=lambda tokens: ahead.append((device.launched, len(device.queue))))
    if device.late:
        assert ahead[:3] == [(3, 2), (4, 2), (5, 2)], "the next one is launched before a token is handed out"


def test_the_first_token_is_told_as_soon_as_it_is_known(device) -> None:
    told = []
    device.answer = answer([])
    run(device.loop, 20, may_end=False, on_first_token=lambda: told.append((device.launched, len(device.queue))))
    assert told == [(2, 1 if device.late else 0)]


def test_a_step_has_come_when_all_its_rows_have() -> None:
    words = words_module.StepWords(3, 2, torch.device("cpu"))
    for _ in range(2):
        words.begin()
    for row, number in ((0, 2), (1, 1), (2, 2)):  # that of row 1 is left from the call before
        words.buffer[0, row] = (number << 33) | (1 << 32) | row
        assert not words._has_come(0)
    words.buffer[0, 1] = (2 << 33) | 7
    assert words.wait(0, 1) == (1, False)
    assert words.tokens(0, 1).tolist() == [[0], [7], [2]]


def test_words_of_earlier_calls_are_not_taken_for_this_ones(device) -> None:
    """Neither those of all its steps nor those that the last steps of the call before write while it runs."""
    words = device.words
    words._number = words_module._NUMBERS - 3  # so that they begin again
    for seed in range(5):
        device.answer = answer([2 + seed % 2, 5, 1], seed)
        parts: list[torch.Tensor] = []
        tokens = run(device.loop, 12, on_tokens=parts.append)
        assert torch.equal(tokens, device.answer[:, :6])
        assert torch.equal(torch.cat(parts, dim=1), tokens)
    assert words._number == 2


def test_a_call_after_one_that_broke_off_is_not_disturbed(device) -> None:
    def fails(_tokens: torch.Tensor) -> None:
        raise ValueError("nobody listens any more")

    device.answer = answer([8, 8, 8])
    with pytest.raises(ValueError, match="nobody listens"):
        run(device.loop, 12, on_tokens=fails)
    device.answer = answer([5, 5, 5], seed=1)
    assert torch.equal(run(device.loop, 12), device.answer[:, :6])


def test_all_is_launched_at_once_where_nobody_looks(loop) -> None:
    device = Device(loop, late=False)
    device.answer = answer([])
    assert torch.equal(run(loop, 12, may_end=False), device.answer[:, :12])
    assert device.launched == 12


class Stream:
    """Of a device that has nothing to do, or has failed."""

    def __init__(self, error: str | None) -> None:
        self.error = error

    def query(self) -> bool:
        if self.error is not None:
            raise RuntimeError(self.error)
        return True


@pytest.mark.parametrize(
    ("error", "message"),
    [(None, "the device is idle, but word 0 of call 1 has not come"), ("an illegal memory access", "illegal memory")],
)
def test_a_device_that_fails_is_not_waited_for(loop, monkeypatch, error, message) -> None:
    Device(loop, late=True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream(error))
    with pytest.raises(RuntimeError, match=message):
        run(loop, 12)
