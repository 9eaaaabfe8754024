"""The metrics give the reference packages' numbers, by class, by path and combined."""

import math
import random
from pathlib import Path

import evaluate
import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from evaluation import metrics
from evaluation.metrics.bleu import Bleu
from evaluation.metrics.chrf import Chrf, chrf_statistics
from evaluation.metrics.exact_match import ExactMatch
from evaluation.metrics.perplexity import Perplexity, perplexity_statistics
from evaluation.metrics.rouge import Rouge, rouge_statistics
from evaluation.metrics.smoothed_bleu import SmoothedBleu, smoothed_bleu_statistics
from evaluation.metrics.ter import Ter
from evaluation.metrics.texts import reference_lists
from llmslm.errors import UserError

FOLDER = Path(metrics.__file__).parent
PREDICTIONS = [
    "The cat sat on the mat .",
    "It is running quickly through\nthe garden of our neighbours",
    "",
    "così è la vita",
]
REFERENCES = [
    "The cat is sitting on the mat.",
    "through our neighbours' garden\nit ran quickly",
    "something",
    "così è la vita",
]
MANY = [[text, "another reference of the cat"] for text in REFERENCES[:3]] + [[REFERENCES[3]]]


def test_bleu_is_sacrebleus():
    metric = sacrebleu.BLEU()
    expected = metric.corpus_score(PREDICTIONS, [REFERENCES])
    found = Bleu().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found == {"bleu": expected.score, "bleu_signature": str(metric.get_signature())}


def test_several_references_of_uneven_number():
    streams = [REFERENCES, [each[1] if len(each) > 1 else None for each in MANY]]
    found = Bleu().compute(predictions=PREDICTIONS, references=MANY)
    assert found["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, streams).score
    assert "nrefs:var" in found["bleu_signature"]
    found = Chrf().compute(predictions=PREDICTIONS, references=MANY)
    assert found["chrf"] == pytest.approx(sacrebleu.CHRF().corpus_score(PREDICTIONS, streams).score, abs=1e-9)


def test_chrf_is_sacrebleus():
    found = Chrf().compute(predictions=PREDICTIONS, references=REFERENCES)
    for name, order in (("chrf", 0), ("chrf_plus_plus", 2)):
        metric = sacrebleu.CHRF(word_order=order)
        assert found[name] == pytest.approx(metric.corpus_score(PREDICTIONS, [REFERENCES]).score, abs=1e-9)
        assert found[f"{name}_signature"] == str(metric.get_signature())


def test_ter_is_sacrebleus():
    metric = sacrebleu.TER()
    found = Ter().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found["ter"] == metric.corpus_score(PREDICTIONS, [REFERENCES]).score
    assert found["ter_signature"] == str(metric.get_signature())


def test_rouge_is_rouge_scores():
    types = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(types, use_stemmer=True)
    scores = [scorer.score(gold, text) for gold, text in zip(REFERENCES, PREDICTIONS, strict=True)]
    found = Rouge().compute(predictions=PREDICTIONS, references=REFERENCES)
    for name, key in zip(("rouge1", "rouge2", "rouge_l", "rouge_lsum"), types, strict=True):
        assert found[name] == pytest.approx(100 * np.mean([each[key].fmeasure for each in scores]), abs=1e-9)
    assert found["rouge_l"] != found["rouge_lsum"]
    assert "stemmer:porter" in found["rouge_signature"]


def test_rouge_lsum_of_single_lines_is_rouge_scores():
    rng = random.Random(0)
    texts = [[" ".join(rng.choices("abcdé ", k=rng.randint(0, 25))) for _ in range(300)] for _ in range(2)]
    scorer = rouge_scorer.RougeScorer(["rougeLsum"])
    expected = [scorer.score(gold, text)["rougeLsum"].fmeasure for text, gold in zip(*texts, strict=True)]
    found = {each.name: each for each in rouge_statistics(*texts)}["rouge_lsum"]
    assert found.rows[:, 0].tolist() == expected


def test_smoothed_bleu_is_codexglues():
    """The numbers are those of the evaluator in microsoft/CodeXGLUE, Code-Text/code-to-text."""
    texts = ["the cat sat on mat", "Return a new_value, of the thing (x2).", "nothing at all", ""]
    gold = ["the cat sat on the mat today", "Returns a new_value of the new thing.", "something else here", "two words"]
    (found,) = smoothed_bleu_statistics(texts, gold)
    assert (100 * found.rows[:, 0]).tolist() == pytest.approx([56.98363775, 32.20606399, 0, 13.53352832])
    several = SmoothedBleu().compute(predictions=texts[:1], references=[[gold[0], "a cat sat"]])
    assert several["smoothed_bleu"] == pytest.approx(79.52707287)
    assert several["smoothed_bleu_signature"].startswith("codexglue|case:lc|tok:words and signs|smooth:add-1")


def test_exact_match_ignores_outer_space_only():
    found = ExactMatch().compute(predictions=["a b", " a b\n", "A b", "ab"], references=["a b"] * 4)
    assert found == {"exact_match": 50.0}


def test_perplexity_and_bits_per_byte():
    nats, references = [2 * math.log(7), 3 * math.log(7)], ["ab", "né"]
    found = Perplexity().compute(nats=nats, tokens=[2, 3], references=references)
    assert found["perplexity"] == pytest.approx(7)
    assert found["bits_per_byte"] == pytest.approx(5 * math.log2(7) / 5)


def test_an_example_without_tokens_adds_nothing():
    scored = [each.value() for each in perplexity_statistics([1.0, 99.0], [1, 0], ["ab", "left out"])]
    alone = [each.value() for each in perplexity_statistics([1.0], [1], ["ab"])]
    assert scored == alone


def test_perplexity_keeps_small_differences_of_large_sums():
    many = perplexity_statistics([1e9] + [1e-7] * 1000, [10**9] + [1] * 1000, ["x"] * 1001)[0]
    assert many.rows[:, 0].sum() - 1e9 == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("name", ["bleu", "chrf", "ter", "rouge", "exact_match", "smoothed_bleu"])
def test_loads_by_path(name):
    loaded = evaluate.load(str(FOLDER / f"{name}.py"))
    assert loaded.compute(predictions=["a b c d e"], references=["a b c d e"])[
        {"rouge": "rouge_l"}.get(name, name)
    ] == pytest.approx(0 if name == "ter" else 100)


def test_combines():
    together = evaluate.combine([Bleu(), Chrf(), Rouge()])
    found = together.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found["bleu"] == Bleu().compute(predictions=PREDICTIONS, references=REFERENCES)["bleu"]
    assert {"chrf", "rouge_lsum"} <= set(found)


def test_different_counts_are_refused():
    with pytest.raises(UserError, match="2 predictions but 1 references; expected one for one"):
        chrf_statistics(["a", "b"], ["a"])
    with pytest.raises(UserError, match="nothing to score"):
        reference_lists([], [])
    with pytest.raises(UserError, match="prediction 1 has no reference"):
        reference_lists(["a", "b"], [["a"], []])
    with pytest.raises(UserError, match="no reference was scored"):
        perplexity_statistics([0.0], [0], ["a"])
