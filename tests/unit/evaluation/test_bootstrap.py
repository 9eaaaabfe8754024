"""Intervals and p-values are sacrebleu's where it has them, and sound where it does not."""

import random

import numpy as np
import pytest
import sacrebleu
from sacrebleu.significance import PairedTest

from evaluation.bootstrap import SEED, Statistics, interval, mean_statistics, paired, resample
from evaluation.metrics.perplexity import perplexity_statistics
from evaluation.scoring import as_record, is_lower_better, score, text_statistics
from llmslm.errors import UserError


def spoilt(texts, share, seed):
    rng = random.Random(seed)
    return [" ".join("x" if rng.random() < share else word for word in text.split()) for text in texts]


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    vocabulary = [f"word{index}" for index in range(50)]
    return [" ".join(rng.choices(vocabulary, k=rng.randint(4, 20))) for _ in range(200)]


def test_draws_and_p_values_are_sacrebleus(texts):
    baseline, system = spoilt(texts, 0.2, 1), spoilt(texts, 0.22, 2)
    test = PairedTest(
        [("llm", baseline), ("slm", system)],
        {"BLEU": sacrebleu.BLEU(), "chrF2": sacrebleu.CHRF()},
        [texts],
        test_type="bs",
        n_samples=300,
    )
    _, expected = test()
    metrics = ["bleu", "chrf"]
    ours = score(text_statistics(metrics, system, texts), 300)
    theirs = score(text_statistics(metrics, baseline, texts), 300)
    record = as_record(ours, {"llm": theirs}, 300, SEED)
    for name, key in (("bleu", "BLEU"), ("chrf", "chrF2")):
        llm, slm = expected[key]
        assert record[name]["value"] == pytest.approx(slm.score, abs=1e-9)
        assert record[name]["versus_llm"]["difference"] == pytest.approx(slm.score - llm.score, abs=1e-9)
        assert record[name]["versus_llm"]["p_value"] == pytest.approx(slm.p_value, abs=0.005)  # theirs is float32
        assert ours.drawn[name].mean() == pytest.approx(slm.mean, abs=1e-3)
        assert record[name]["low"] < slm.score < record[name]["high"]
        assert (record[name]["high"] - record[name]["low"]) / 2 == pytest.approx(slm.ci, rel=0.1)
        assert record[name]["signature"].endswith("|bs:300|seed:12345")


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        sample = mean_statistics("share", rng.random(80), "", scale=1.0)
        low, high = interval(resample({"share": sample}, 200, seed)["share"])
        covered += low <= 0.5 <= high
    assert 180 <= covered <= 199


def test_equal_outputs_do_not_differ(texts):
    same = score(text_statistics(["bleu", "exact_match"], spoilt(texts, 0.3, 1), texts), 50)
    for entry in as_record(same, {"llm": same}, 50, SEED).values():
        assert entry["versus_llm"] == {"difference": 0.0, "p_value": 1.0, "percent": pytest.approx(100)}


def test_a_clear_difference_is_significant(texts):
    good = score(text_statistics(["rouge"], spoilt(texts, 0.1, 1), texts), 200)
    bad = score(text_statistics(["rouge"], spoilt(texts, 0.6, 2), texts), 200)
    versus = as_record(bad, {"llm": good}, 200, SEED)["rouge_l"]["versus_llm"]
    assert versus["p_value"] == pytest.approx(1 / 201)
    assert 30 < versus["percent"] < 60


def test_nan_is_marked_and_never_a_number():
    broken = mean_statistics("rouge_l", [1.0, float("nan")], "sig")
    entry = as_record(score([broken], 20), {"llm": score([broken], 20)}, 20, SEED)["rouge_l"]
    assert entry["value"] is None
    assert entry["problem"] == "the score is nan"
    assert entry["versus_llm"] == {"difference": None, "p_value": None, "percent": None}


def test_a_draw_without_a_score_is_no_evidence():
    """One scored example among twenty: many draws have none, and a count of those that differ would mean nothing."""
    ours, theirs = (perplexity_statistics([nats] * 20, [4] + [0] * 19, ["abcd"] * 20) for nats in (3.0, 5.0))
    entry = as_record(score(ours, 50), {"llm": score(theirs, 50)}, 50, SEED)["bits_per_byte"]
    assert (entry["low"], entry["high"], entry["versus_llm"]["p_value"]) == (None, None, None)
    assert entry["versus_llm"]["percent"] == pytest.approx(60)


def test_paired_needs_the_same_examples():
    one, two = (mean_statistics("bleu", [1.0] * count, "") for count in (2, 3))
    with pytest.raises(UserError, match="bleu: 2 examples against 3 of the baseline"):
        paired(one, two, np.zeros(5), np.zeros(5))


def test_unknown_metric_is_named():
    with pytest.raises(UserError, match=r"unknown metric 'blue'; expected one of bleu, chrf"):
        text_statistics(["blue"], ["a"], ["a"])


def test_direction_of_scores(texts):
    for each in text_statistics(["bleu", "chrf", "ter", "rouge", "exact_match"], texts[:5], texts[:5]):
        assert isinstance(each, Statistics)
        assert is_lower_better(each.name) != each.higher_is_better
