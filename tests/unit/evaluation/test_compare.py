"""The whole pipeline with a dummy system: records, resuming, controls."""

import errno
import json
from dataclasses import replace
from threading import Barrier, Thread
from unittest.mock import Mock, patch

import pytest
import torch

from evaluation import predictions
from evaluation.compare import Settings, compare
from evaluation.predictions import predict, read_partial, read_predictions
from evaluation.record import find_records, read_record
from evaluation.systems import Arm
from llmslm.errors import UserError

FAST = {"max_new_tokens": 16, "batch_size": 4, "warmups": 0, "runs": 1, "resamples": 50}


@pytest.fixture
def settings(tmp_path):
    return Settings(out=tmp_path / "out", **FAST)


def test_writes_a_record_for_each_system(dummy, examples, settings):
    arms = [Arm(dummy("llm", 0.95)), Arm(dummy("slm", 0.5)), Arm(dummy("llm_to_slm", 0.9))]
    paths = compare(arms, examples, replace(settings, controls=True))
    llm, slm, ours, zero, shuffled = map(read_record, paths)
    assert zero["system"] == "llm_to_slm/zero_features"
    assert shuffled["system"] == "llm_to_slm/shuffled_features"
    assert "versus_llm" not in llm["scores"]["bleu"]
    assert slm["scores"]["chrf"]["value"] < ours["scores"]["chrf"]["value"] < llm["scores"]["chrf"]["value"]
    assert slm["scores"]["chrf"]["versus_llm"]["p_value"] < 0.05
    assert "versus_slm" not in slm["scores"]["chrf"]
    versus = ours["scores"]["chrf"]["versus_slm"]
    assert versus["difference"] == pytest.approx(ours["scores"]["chrf"]["value"] - slm["scores"]["chrf"]["value"])
    assert versus["p_value"] < 0.05
    assert llm["hashes"]["references"] == slm["hashes"]["references"]
    assert llm["comparison"] == zero["comparison"]
    assert {entry["mode"] for entry in llm["speed"]} == {"fixed", "natural"}
    assert zero["speed"] == []
    assert llm["length"]["ratio"] == 1.0
    assert find_records([settings.out]) == sorted(paths)


def test_predictions_lie_beside_the_record(dummy, examples, settings):
    (path,) = compare([Arm(dummy())], examples, settings)
    rows = read_predictions(settings.out / read_record(path)["predictions"])
    assert sorted(row["id"] for row in rows) == sorted(examples.ids)
    assert set(rows[0]) == {"id", "prompt", "reference", "prediction", "tokens", "nats", "target_tokens"}


def test_a_killed_evaluation_goes_on_where_it_was(dummy, examples, tmp_path):
    path = tmp_path / "predictions.jsonl"
    budget = {"max_new_tokens": 16, "batch_size": 4}
    with pytest.raises(KeyboardInterrupt):
        predict(dummy(fails_after=3), examples, path, **budget)
    (shard,) = tmp_path.glob("*.rank0.jsonl")
    assert len(read_partial(shard)) == 12
    shard.write_bytes(shard.read_bytes()[:-25])  # the last line is cut, as by a power failure
    second = dummy()
    rows = predict(second, examples, path, **budget)
    assert second.calls == 3  # of five batches two were whole
    assert rows == predict(dummy(), examples, tmp_path / "uninterrupted.jsonl", **budget)
    assert path.read_bytes() == (tmp_path / "uninterrupted.jsonl").read_bytes()
    assert [row.id for row in rows] == examples.ids


@pytest.mark.parametrize(("parameters", "threads"), [(10, 1), (20_000_000, 2)])
def test_a_small_system_predicts_on_one_thread(dummy, examples, tmp_path, monkeypatch, parameters, threads):
    """The bits of its scores are then those of a rank, which has fewer threads than a process alone."""
    seen, before = set(), torch.get_num_threads()
    system = dummy()
    system.device, system.parameters = torch.device("cpu"), lambda: {"total": parameters}
    score = system.log_likelihood
    system.log_likelihood = lambda *texts: seen.add(torch.get_num_threads()) or score(*texts)
    torch.set_num_threads(2)
    try:
        predict(system, examples, tmp_path / "x.jsonl", max_new_tokens=4, batch_size=4)
        assert (seen, torch.get_num_threads()) == ({threads}, 2)
    finally:
        torch.set_num_threads(before)


MACHINE = {"cpu": "x", "cores": 1, "threads": 1, "gpus": []}
ORIGIN = {"commit": "a", "dirty": False, "date": "2026-01-01", "command": "", "versions": {}, "hardware": MACHINE}


def test_predictions_of_other_code_are_not_taken_over(dummy, examples, settings, monkeypatch):
    calls = []
    for source, versions in (("a", {}), ("b", {}), ("b", {}), ("b", {"torch": "9"}), ("b", {"torch": "9"})):
        monkeypatch.setattr("evaluation.compare.source_hash", lambda source=source: source)
        monkeypatch.setattr("evaluation.compare.provenance", lambda versions=versions: ORIGIN | {"versions": versions})
        system = dummy()
        compare([Arm(system, checkpoint="one")], examples, replace(settings, runs=0, seed=len(calls) + 1))
        calls.append(system.calls)
    assert calls == [5, 5, 0, 5, 0]


@pytest.mark.parametrize("mended", [{"commit": "b"}, {"versions": {"rouge-score": "9"}}, {"dirty": True}])
def test_what_was_predicted_before_scoring_was_mended_is_scored_anew(dummy, examples, settings, monkeypatch, mended):
    fast = replace(settings, runs=0)
    monkeypatch.setattr("evaluation.compare.provenance", lambda: ORIGIN)
    broken = patch("evaluation.compare.statistics_of", side_effect=AttributeError("of an old package"))
    with broken, pytest.raises(AttributeError, match="of an old package"):
        compare([Arm(dummy(), checkpoint="one")], examples, fast)
    monkeypatch.setattr("evaluation.compare.provenance", lambda: ORIGIN | mended)
    again = dummy()
    (path,) = compare([Arm(again, checkpoint="one")], examples, fast)
    assert again.calls == 0
    assert read_record(path)["provenance"] == ORIGIN | mended


def test_the_hash_of_what_predicts_leaves_out_what_scores(monkeypatch, tmp_path):
    package, library = tmp_path / "evaluation", tmp_path / "llmslm"
    for name in (*(f"evaluation/{each}.py" for each in predictions.MODULES), "evaluation/scoring.py", "llmslm/x/y.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(predictions, "__file__", str(package / "predictions.py"))
    monkeypatch.setattr(predictions.llmslm, "__file__", str(library / "__init__.py"))
    hashes = [predictions.source_hash()]
    for name in ("evaluation/scoring.py", "evaluation/peers.py", "llmslm/x/y.py"):
        (tmp_path / name).write_text("changed")
        hashes.append(predictions.source_hash())
    assert hashes[0] == hashes[1]
    assert len({*hashes}) == 3


def test_scores_are_written_before_the_clock_runs(dummy, examples, settings, monkeypatch):
    monkeypatch.setattr("evaluation.compare.provenance", lambda: ORIGIN)
    arms = [Arm(dummy("llm"), checkpoint="one"), Arm(dummy("slm", 0.5), checkpoint="two")]
    broken = patch("evaluation.compare.measure", side_effect=RuntimeError("out of memory"))
    with broken, pytest.raises(RuntimeError, match="out of memory"):
        compare(arms, examples, settings)
    kept = [read_record(path) for path in find_records([settings.out])]
    assert [record["speed"] for record in kept] == [[], []]
    timed = list(map(read_record, compare(arms, examples, settings)))  # they do not pass for what was asked
    assert all(record["speed"] for record in timed)
    assert [record["scores"] for record in timed] == [record["scores"] for record in kept]
    for arm in arms:
        arm.system.fails_after = 0
    compare(arms, examples, settings)  # and what is complete does


def test_splits_of_a_task_do_not_replace_each_other(dummy, examples, settings):
    test = compare([Arm(dummy())], examples, replace(settings, runs=0))
    validation = compare([Arm(dummy())], replace(examples, split="validation"), replace(settings, runs=0))
    assert [read_record(path)["task"]["split"] for path in (*test, *validation)] == ["test", "validation"]


@pytest.mark.parametrize(
    ("systems", "batch_size", "message"),
    [
        (["llm", "slm"], 4, r"controls destroy what an llm_to_slm system is told; give one \(--llm-to-slm DIR\)"),
        (["llm_to_slm"], 1, "20 examples in batches of 1 were given"),
    ],
)
def test_controls_that_cannot_be_made_are_refused_before_predicting(
    dummy, examples, settings, systems, batch_size, message
):
    made = [dummy(name) for name in systems]
    with pytest.raises(UserError, match=message):
        compare([Arm(each) for each in made], examples, replace(settings, controls=True, batch_size=batch_size))
    assert [system.calls for system in made] == [0] * len(made)


def test_finished_predictions_are_taken_over_and_other_systems_are_not(dummy, examples, settings):
    first, again, other = dummy(), dummy(), dummy()
    fast = replace(settings, runs=0)
    compare([Arm(first, checkpoint="one")], examples, fast)
    compare([Arm(again, checkpoint="one")], examples, fast)
    compare([Arm(other, checkpoint="two")], examples, fast)
    assert (first.calls, again.calls, other.calls) == (5, 0, 5)


def test_predictions_of_another_comparison_are_taken_over(dummy, examples, settings, tmp_path):
    fast = replace(settings, runs=0)
    llm, slm = Arm(dummy(), checkpoint="one"), Arm(dummy("slm"), checkpoint="two")
    first = compare([llm, slm], examples, replace(fast, out=tmp_path / "series/a"))
    again, other, unnamed = dummy(), dummy("slm"), dummy("own")
    arms = [Arm(again, checkpoint="one"), Arm(other, checkpoint="three"), Arm(unnamed)]
    for times in (1, 2):  # what does not say what it is, is predicted anew
        second = compare(arms, examples, replace(fast, out=tmp_path / "series/b", reuse=tmp_path / "series"))
        assert (again.calls, other.calls, unnamed.calls) == (0, 5, 5 * times)
    assert read_record(second[0])["hashes"] == read_record(first[0])["hashes"]
    texts = [(path.parent / read_record(path)["predictions"]).read_text() for path in (first[0], second[0])]
    assert texts[0] == texts[1]


def test_a_comparison_waits_for_another_that_predicts_the_same(dummy, examples, settings, tmp_path):
    fast = replace(settings, runs=0, reuse=tmp_path / "series")
    both, systems = Barrier(2), [dummy(), dummy()]

    def run(name, system):
        both.wait()
        compare([Arm(system, checkpoint="one")], examples, replace(fast, out=tmp_path / "series" / name))

    threads = [Thread(target=run, args=pair) for pair in zip("ab", systems, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(system.calls for system in systems) == [0, 5]


def test_complete_records_of_the_same_code_are_returned(dummy, examples, settings, monkeypatch):
    clean = {"commit": "c" * 40, "dirty": False, "date": "2026-01-01", "command": "", "versions": {}}
    machine = {"cpu": "x", "cores": 1, "threads": 1, "gpus": []}
    monkeypatch.setattr("evaluation.compare.provenance", lambda: clean | {"hardware": machine})
    first = compare([Arm(dummy(), checkpoint="one")], examples, settings)
    before = first[0].stat().st_mtime_ns
    assert compare([Arm(dummy(fails_after=0), checkpoint="one")], examples, settings) == first
    assert first[0].stat().st_mtime_ns == before
    compare([Arm(dummy(), checkpoint="one")], examples, replace(settings, metrics=("bleu",)))
    assert first[0].stat().st_mtime_ns != before


def test_a_reference_that_one_system_cuts_is_scored_by_none(dummy, examples, settings):
    arms = [Arm(dummy("llm")), Arm(dummy("slm"), target_limit=7)]
    llm, slm = map(read_record, compare(arms, examples, settings))
    whole = sum(len(text.split()) < 7 for text in examples.references)
    assert llm["examples"]["likelihood"] == slm["examples"]["likelihood"] == whole < len(examples)
    assert llm["examples"]["effective"] == len(examples)


def test_a_reference_that_one_system_cuts_is_no_length_to_reach(dummy, examples, settings):
    """What is cut to 6 tokens says nothing of how long it is."""
    arms = [Arm(dummy("llm")), Arm(dummy("slm"), target_limit=6)]
    llm, slm = map(read_record, compare(arms, examples, replace(settings, max_new_tokens=4)))
    kept = [text for text in examples.references if len(text.split()) < 6]
    assert llm["length"]["reference_tokens"] == slm["length"]["reference_tokens"] == 5 * len(kept)
    assert llm["length"]["ratio"] == 4 / 5


def test_stopping_early_fails_the_length_gate(dummy, examples, settings):
    (path,) = compare([Arm(dummy())], examples, replace(settings, max_new_tokens=3))
    length = read_record(path)["length"]
    assert length["ratio"] < 0.9
    assert length["met"] is False


def test_a_system_whose_likelihood_is_nan_is_marked(dummy, examples, settings):
    system = dummy()
    system.quality = float("nan")
    system._keeps = lambda prompt, word: True
    record = read_record(compare([Arm(system)], examples, settings)[0])
    assert record["scores"]["perplexity"]["value"] is None
    assert record["scores"]["perplexity"]["problem"] == "the score is nan"
    assert record["scores"]["bleu"]["value"] == pytest.approx(100)


def test_bad_records_are_refused(tmp_path):
    path = tmp_path / "x.record.json"
    with pytest.raises(UserError, match="there is no record"):
        read_record(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is not a record"):
        read_record(path)
    path.write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(UserError, match="has record schema 99; this llmslm-eval reads up to 4"):
        read_record(path)
    path.write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(UserError, match="is a required property"):
        read_record(path)
    with pytest.raises(UserError, match=r"holds no \*.record.json file"):
        find_records([tmp_path / "..", tmp_path.joinpath("empty").mkdir() or tmp_path / "empty"])


def test_texts_with_odd_line_ends_survive(dummy, examples, tmp_path):
    odd = [f"a{chr(0x2028)}b{chr(0x85)}c{chr(11)}d {index}" for index in range(len(examples))]
    path = tmp_path / "predictions.jsonl"
    rows = predict(dummy("llm", 1.0), replace(examples, prompts=odd), path, max_new_tokens=9, batch_size=8)
    assert read_partial(path) == sorted(
        rows, key=lambda row: [each["id"] for each in read_predictions(path)].index(row.id)
    )
    assert {row["prompt"] for row in read_predictions(path)} == set(odd)


def test_a_broken_predictions_line_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": "a"}\n{"id": \n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        read_predictions(path)


def test_systems_without_a_checkpoint_are_predicted_anew(dummy, examples, settings):
    again = dummy()
    compare([Arm(dummy())], examples, replace(settings, runs=0))
    compare([Arm(again)], examples, replace(settings, runs=0))
    assert again.calls == 5


def test_the_token_budget_is_the_longest_target_of_training(dummy, examples, settings):
    arms = [Arm(dummy("llm"), target_limit=7), Arm(dummy("slm"), target_limit=5)]
    record = read_record(compare(arms, examples, replace(settings, max_new_tokens=None))[1])
    assert record["settings"]["max_new_tokens"] == 7
    assert record["speed"][0]["max_new_tokens"] == 7


def test_perplexity_is_compared_between_equal_tokenizers_only(dummy, examples, settings):
    other = dummy("slm")
    score = other.log_likelihood
    other.log_likelihood = lambda prompts, targets: [
        replace(each, tokens=2 * each.tokens) for each in score(prompts, targets)
    ]
    _, slm = map(read_record, compare([Arm(dummy("llm")), Arm(other)], examples, settings))
    assert "versus_llm" not in slm["scores"]["perplexity"]
    assert slm["scores"]["bits_per_byte"]["versus_llm"]["p_value"] == 1.0


def test_unknown_metrics_are_refused_before_predicting(dummy, examples, settings):
    system = dummy()
    with pytest.raises(UserError, match="unknown metric 'blue'"):
        compare([Arm(system)], examples, replace(settings, metrics=("bleu", "blue")))
    assert system.calls == 0


def test_a_full_disk_is_one_line_and_nothing_is_lost(dummy, examples, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("evaluation.predictions.os.fsync", Mock(side_effect=[None, full]))
    path = tmp_path / "predictions.jsonl"
    with pytest.raises(UserError, match="the disk is full: free some space, and the same command goes on with"):
        predict(dummy(), examples, path, max_new_tokens=4, batch_size=4)
    assert len(read_partial(tmp_path / "predictions.rank0.jsonl")) >= 4
