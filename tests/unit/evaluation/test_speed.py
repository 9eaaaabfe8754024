"""The clock: what is counted, what is not, and that systems take turns."""

import time
from itertools import groupby

import pytest
import torch

from evaluation.memory import peak_memory, weight_bytes
from evaluation.speed import measure_speed, percentiles, time_generate


class Sleeper:
    """Takes 20 ms to the first token and 5 ms for each further one; stops after three if it may."""

    def __init__(self, name, log, produced):
        self.name, self.log, self.produced = name, log, produced

    def generate(self, prompts, *, max_new_tokens, min_new_tokens=0, on_first_token=None):
        tokens = max(3, min_new_tokens)
        self.log.append((self.name, tokens, tuple(prompts)))
        time.sleep(0.02)
        on_first_token()
        time.sleep(0.005 * (tokens - 1))
        return [self.produced("x", tokens - row) for row in range(len(prompts))]


def test_first_token_and_time_per_further_token(dummy):
    produced = type(dummy().generate(["a"], max_new_tokens=1)[0])
    timing = time_generate(Sleeper("llm", [], produced), ["a", "b"], 9, "fixed")
    assert timing.ttft_s == pytest.approx(0.02, rel=0.3)
    assert (timing.total_s - timing.ttft_s) / (timing.steps - 1) == pytest.approx(0.005, rel=0.3)
    assert (timing.steps, timing.tokens) == (9, 17)


def test_systems_take_turns_on_the_same_prompts_in_both_modes(dummy):
    produced = type(dummy().generate(["a"], max_new_tokens=1)[0])
    log = []
    systems = {name: Sleeper(name, log, produced) for name in ("llm", "slm")}
    entries = measure_speed(systems, ["p", "q", "r"], max_new_tokens=5, batch_sizes=(2,), warmups=1, runs=2)
    assert [name for name, _, _ in log] == ["llm", "slm"] * 6
    assert [tokens for tokens, _ in groupby(log, key=lambda call: call[1])] == [5, 3]
    assert all(first[2] == second[2] for first, second in zip(log[::2], log[1::2], strict=True))
    assert log[0][2] == ("p", "q")
    assert log[2][2] == ("r", "p")
    fixed, natural = entries["slm"]
    assert (fixed["mode"], fixed["tokens"], fixed["runs"]) == ("fixed", 18, 2)
    assert (natural["mode"], natural["tokens"]) == ("natural", 10)
    assert fixed["tokens_per_s"] == pytest.approx(fixed["tokens"] / (2 * fixed["total_s"]["mean"]))


def test_a_single_token_says_nothing_of_further_ones(dummy):
    entries = measure_speed({"llm": dummy()}, ["one"], max_new_tokens=1, warmups=0, runs=3)
    assert entries["llm"][0]["tpot_s"] == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_percentiles():
    assert percentiles(range(101)) == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0}


class Hungry:
    """Holds 4 MB of weights and touches 64 MB more while it generates."""

    name = "llm"

    def __init__(self):
        self.model = torch.nn.Linear(1000, 1000, bias=False)
        self.tied = self.model.weight

    def generate(self, prompts, *, max_new_tokens, min_new_tokens=0, on_first_token=None):
        torch.ones(16 * 2**20 if max_new_tokens > 1 else 1).sum()
        return []


def test_peak_memory_is_weights_and_what_generation_adds():
    found = peak_memory(Hungry(), ["a"], max_new_tokens=8)
    assert found["weight_bytes"] == weight_bytes(Hungry()) == 4_000_000
    assert found["bytes"] == pytest.approx(4_000_000 + 64 * 2**20, rel=0.1)
    assert found["method"] == "weights + peak growth of the resident set, batch 1"
