"""The clock: what is counted, what is not, and that systems take turns."""

from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from test_systems import composed, system

from evaluation.largest_batch import largest_batch
from evaluation.memory import peak_memory, weight_bytes
from evaluation.peers import GenerateSystem, assisted, verified
from evaluation.speed import measure_speed, percentiles, time_generate
from evaluation.systems import decoder_of
from llmslm.generation import memory


class Sleeper:
    """Takes 20 ms of its clock to the first token and 5 ms for each further one; stops after three if it may."""

    now = 0.0

    def __init__(self, name, log, produced):
        self.name, self.log, self.produced = name, log, produced

    def generate(self, prompts, *, max_new_tokens, min_new_tokens=0, on_first_token=None):
        tokens = max(3, min_new_tokens)
        self.log.append((self.name, tokens, tuple(prompts)))
        Sleeper.now += 0.02
        on_first_token()
        Sleeper.now += 0.005 * (tokens - 1)
        return [self.produced("x", tokens - row) for row in range(len(prompts))]


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr("evaluation.speed.time", SimpleNamespace(perf_counter=lambda: Sleeper.now))


def test_first_token_and_time_per_further_token(dummy, clock):
    produced = type(dummy().generate(["a"], max_new_tokens=1)[0])
    timing = time_generate(Sleeper("llm", [], produced), ["a", "b"], 9, "fixed")
    assert timing.ttft_s == pytest.approx(0.02)
    assert (timing.total_s - timing.ttft_s) / (timing.steps - 1) == pytest.approx(0.005)
    assert (timing.steps, timing.tokens) == (9, 17)


def test_systems_take_turns_on_the_same_prompts_in_both_modes(dummy, clock):
    produced = type(dummy().generate(["a"], max_new_tokens=1)[0])
    log = []
    systems = {name: Sleeper(name, log, produced) for name in ("llm", "slm")}
    entries = measure_speed(systems, ["p", "q", "r"], max_new_tokens=5, batch_sizes=(2,), warmups=1, runs=2)
    assert [name for name, _, _ in log] == ["llm", "slm"] * 6
    assert [tokens for tokens, _ in groupby(log, key=lambda call: call[1])] == [3, 5]
    assert all(first[2] == second[2] for first, second in zip(log[::2], log[1::2], strict=True))
    assert [prompts for _, _, prompts in log[:6:2]] == [("r", "p"), ("p", "q"), ("r", "p")]  # warmed up with its own
    natural, fixed = entries["slm"]
    assert (fixed["mode"], fixed["tokens"], fixed["runs"]) == ("fixed", 18, 2)
    assert (natural["mode"], natural["tokens"]) == ("natural", 10)
    assert fixed["tokens_per_s"] == pytest.approx(fixed["tokens"] / (2 * fixed["total_s"]["mean"]))


def test_what_transformers_decodes_is_warm_after_two_rounds(dummy, clock):
    produced, log = type(dummy().generate(["a"], max_new_tokens=1)[0]), []
    systems = {name: Sleeper(name, log, produced) for name in ("llm", "llm_generate", "llm_static_cache")}
    systems["llm_generate"].decoder = systems["llm_static_cache"].decoder = "generate"
    systems["llm_static_cache"].generation_settings = {"cache_implementation": "static"}  # it compiles
    entries = measure_speed(systems, ["p", "q", "r"], max_new_tokens=5, warmups=4, runs=1)
    assert [[entry["warmups"] for entry in rows] for rows in entries.values()] == [[4, 4], [2, 2], [4, 4]]
    assert [tokens for name, tokens, _ in log if name == "llm_generate"] == [3] * 3 + [5] * 3
    assert [name for name, tokens, _ in log if tokens == 5][-9:] == [*systems] * 3


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


def test_weights_of_a_draft_and_copies_of_an_engine_count():
    llm, slm = system("llm", "llama"), system("slm", "llama", seed=1)
    one = sum(p.nbytes for p in llm.model.parameters()) + sum(b.nbytes for b in llm.model.buffers())
    assert weight_bytes(assisted(llm, slm)) == 2 * one
    assert weight_bytes(llm) == one
    llm.generate(["a"], max_new_tokens=2)
    copies = weight_bytes(llm) - one
    assert copies == memory.weight_bytes(llm.model, llm.engine.decoder) - one > 0
    ours = composed(system("llm", "llama"))
    pair = verified(system("llm", "llama"), ours)
    assert weight_bytes(pair) > one + weight_bytes(ours) - sum(p.nbytes for p in ours.model.encoder.parameters())


class Lazy(Hungry):
    """Is on a GPU, and copies 100 bytes of weights at its first call; each call needs 10 more."""

    device, copies, peak = torch.device("cuda"), 0, 0

    def generate(self, prompts, *, max_new_tokens, min_new_tokens=0, on_first_token=None):
        self.copies = 100
        self.peak = self.copies + 10
        return []


def test_copies_that_a_first_call_makes_count_once(monkeypatch):
    lazy = Lazy()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: lazy.copies)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: lazy.peak)
    monkeypatch.setattr("evaluation.memory.weight_bytes", lambda _: lazy.copies)
    assert peak_memory(lazy, ["a"], max_new_tokens=8)["bytes"] == 110


@pytest.mark.parametrize("name", ["llm", "verified"])
def test_caches_that_an_engine_keeps_are_no_free_memory(name):
    llm = system("llm", "llama")
    measured = llm if name == "llm" else verified(llm, composed(llm))
    measured.generate(["a"], max_new_tokens=8)
    forgotten = []
    for engine in [llm.engine] if name == "llm" else measured.verified_engine.engines:
        engine.forget = lambda engine=engine: forgotten.append(engine)
    peak_memory(measured, ["a"], max_new_tokens=8)
    assert len(forgotten) == (1 if name == "llm" else 2)


def test_graphs_that_a_prompts_pass_keeps_are_no_free_memory():
    ours = composed(system("llm", "llama"))
    ours.generate(["a"], max_new_tokens=8)
    kept = ours._prompt_pass._graphs
    peak_memory(ours, ["a"], max_new_tokens=8)
    assert ours._prompt_pass._graphs is not kept


def test_the_largest_batch_is_what_the_engine_foretells(monkeypatch):
    llm, prompts = system("llm", "llama"), ["some prompt"] * 40
    assert largest_batch(llm, prompts, 8) == 32  # no more than there are prompts
    decoder, call = llm.engine.decoder, llm.engine.call_sizes(8, 11, 8)
    needs = memory.predict(llm.model, decoder, call).added
    monkeypatch.setattr(memory, "available_bytes", lambda device: needs * 1.3)
    assert largest_batch(llm, prompts, 8) == 8
    monkeypatch.setattr(memory, "available_bytes", lambda device: 0)
    assert largest_batch(llm, prompts, 8) == 1
    composition = composed(llm)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needs * 1.3)
    assert largest_batch(composition, prompts, 8) <= 8
    at_most = composition.predicted_memory(prompts[:4], 8).added
    monkeypatch.setattr(memory, "available_bytes", lambda device: at_most)
    assert largest_batch(composition, prompts, 8) == 2  # some of what is free is left to libraries
    llm.decoder = "generate"
    assert largest_batch(llm, prompts, 8) is None


def test_each_system_is_measured_at_its_own_largest_batch(dummy, monkeypatch):
    monkeypatch.setattr("evaluation.speed.largest_batch", lambda system, *rest: {"llm": 2, "slm": 4}.get(system.name))
    systems = {name: dummy(name) for name in ("llm", "slm", "assisted")}
    sweep = {"max_new_tokens": 3, "batch_sizes": (1, "largest"), "warmups": 0, "runs": 1}
    entries = measure_speed(systems, ["a b c"] * 8, **sweep)
    sizes = {name: [entry["batch_size"] for entry in rows] for name, rows in entries.items()}
    assert sizes == {"llm": [1, 1, 2, 2], "slm": [1, 1, 4, 4], "assisted": [1, 1]}
    assert [entry["tokens"] for entry in entries["slm"]] == [3, 3, 12, 12]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_the_engine_leaves_to_generate_has_its_first_token_too(family):
    """Reported at the end, it would make all of the time that to the first token, and further ones free."""
    llm, forwards, first = system("llm", family), [], []
    assert decoder_of(llm) == "engine"
    llm.model.generation_config.no_repeat_ngram_size = 2
    llm.model.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.warns(UserWarning, match=r"decoding with generate\(\)"):
        llm.generate(["a"], max_new_tokens=6, min_new_tokens=6, on_first_token=lambda: first.append(len(forwards)))
    assert first == [1] < [len(forwards)]
    assert decoder_of(llm) == "generate"
    assert largest_batch(llm, ["a"] * 4, 2) is None
    assert decoder_of(GenerateSystem("llm_generate", llm)) == "generate"
