"""BERTScore and COMET: with a model on this machine, and clear words where something is missing."""

import importlib.util
import os
import sys
from pathlib import Path

import evaluate
import pytest

from evaluation import metrics
from evaluation.compare import Settings, compare
from evaluation.metrics.bertscore import Bertscore, bertscore_statistics
from evaluation.metrics.comet import Comet, comet_statistics
from evaluation.record import read_record
from evaluation.scoring import check_metrics
from evaluation.systems import Arm
from llmslm.errors import UserError
from tests import tiny
from tests.unit.data.test_codec import byte_tokenizer

PREDICTIONS = ["the cat sat", "", "a dog", "x"]
REFERENCES = ["the cat sat", "something", "two cats and a dog", "x y z"]
needs_bert_score = pytest.mark.skipif(
    importlib.util.find_spec("bert_score") is None, reason="needs the package bert-score"
)
COMET = """#!{python}
import json, sys
arguments = sys.argv[1:]
take = lambda flag: arguments[arguments.index(flag) + 1]
sides = [open(take(flag), encoding="utf-8").read().split("\\n")[:-1] for flag in ("-s", "-t", "-r")]
if "nonsense" in sides[1]:
    sys.exit("RuntimeError: the checkpoint cannot be read")
rows = [dict(src=s, mt=t, ref=r, COMET=len(t) / len(s + r)) for s, t, r in zip(*sides)]
json.dump({{take("-t"): rows}}, open(take("--to_json"), "w"))
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "judge"
    tokenizer = byte_tokenizer()
    tokenizer.sep_token, tokenizer.cls_token = "</s>", "<s>"
    tokenizer.save_pretrained(folder)
    tiny.build("bert", vocab_size=len(tokenizer)).base_model.save_pretrained(folder)
    return folder


@pytest.fixture
def comet(tmp_path, monkeypatch):
    """A stand-in for the command, with its files and its output."""
    command = tmp_path / "bin" / "comet-score"
    command.parent.mkdir()
    command.write_text(COMET.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    checkpoint = tmp_path / "wmt22-comet-da" / "checkpoints" / "model.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    return str(checkpoint)


@needs_bert_score
def test_bertscore_is_that_of_the_package(bert):
    from bert_score import BERTScorer

    scorer = BERTScorer(model_type=str(bert), num_layers=2, use_fast_tokenizer=True, nthreads=0)
    scorer._tokenizer.model_max_length = 62
    expected = scorer.score([PREDICTIONS[0], *PREDICTIONS[2:]], [REFERENCES[0], *REFERENCES[2:]])[2].tolist()
    (found,) = bertscore_statistics(PREDICTIONS, REFERENCES, f"{bert}@2")
    assert found.rows[:, 0].tolist() == pytest.approx([expected[0], 0.0, *expected[1:]], abs=1e-6)
    assert expected[0] == pytest.approx(1, abs=1e-5)
    assert "model:judge|layer:2" in found.signature
    several = [[text, "the cat sat"] for text in REFERENCES]
    (best,) = bertscore_statistics(["the cat sat"] * 4, several, f"{bert}@2")
    assert best.value() == pytest.approx(100, abs=1e-3)


@needs_bert_score
def test_bertscore_by_path(bert):
    loaded = evaluate.load(str(Path(metrics.__file__).with_name("bertscore.py")))
    long = ["word " * 60]  # beyond the model's positions
    assert loaded.compute(predictions=long, references=long, model=f"{bert}@1")["bertscore"] == pytest.approx(100)
    assert Bertscore().compute(predictions=["a"], references=["a"], model=f"{bert}@1")["bertscore_signature"]


@needs_bert_score
def test_bertscore_mistakes(bert, tmp_path, monkeypatch):
    for model, text in (
        (str(tmp_path), "there is no model in '.*'; expected a folder in the hub's format"),
        (str(bert), r"bert-score has no layer for 'judge'; choose one \(bertscore=.*@LAYER\)"),
    ):
        with pytest.raises(UserError, match=text):
            check_metrics([f"bertscore={model}"])


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bert_score.utils", None)
    with pytest.raises(UserError, match=r"needs the package bert-score: pip install 'llmslm\[bertscore\]'"):
        check_metrics(["bleu", "bertscore=x"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs the command comet-score of the package unbabel-comet"):
        check_metrics(["comet=x.ckpt"])
    with pytest.raises(UserError, match="metric 'comet' was given; expected comet=PATH, a model on this machine"):
        check_metrics(["comet"])
    with pytest.raises(UserError, match="metric 'bleu=x' was given; expected bleu"):
        check_metrics(["bleu=x"])


def test_comet_reads_sources_and_goes_into_the_record(comet, dummy, examples, tmp_path):
    settings = Settings(out=tmp_path / "out", runs=0, resamples=10, metrics=["bleu", f"comet={comet}"])
    entry = read_record(compare([Arm(dummy("llm", 1.0))], examples, settings)[0])["scores"]["comet"]
    assert entry["value"] == pytest.approx(50)
    assert entry["signature"].startswith("comet-score|model:wmt22-comet-da/model.ckpt")
    found = Comet().compute(predictions=["a\nb"], references=["a b"], sources=["a b"], model=comet)
    assert found["comet"] == pytest.approx(50)


def test_comet_mistakes(comet, tmp_path):
    with pytest.raises(UserError, match="comet-score failed: RuntimeError: the checkpoint cannot be read"):
        comet_statistics(["nonsense"], ["a"], ["a"], comet)
    with pytest.raises(UserError, match="1 predictions but 2 sources"):
        comet_statistics(["a"], ["a"], ["a", "b"], comet)
    with pytest.raises(UserError, match="there is no COMET checkpoint"):
        check_metrics([f"comet={tmp_path}"])


@pytest.mark.parametrize("old", ["rouge_score.rouge_scorer.RougeScorer.score_multi", "evaluation.scoring._known"])
def test_a_package_that_does_not_work_is_found_before_anything_is_predicted(
    dummy, examples, tmp_path, monkeypatch, old
):
    def fail(*_, **__):
        raise ImportError("cannot import name 'tokenizers' from 'rouge_score'")

    monkeypatch.setattr(old, fail)
    system = dummy()
    with pytest.raises(
        UserError, match=r"metric \w+ cannot be computed here \(ImportError: .*'rouge_score'\); install"
    ):
        compare([Arm(system)], examples, Settings(out=tmp_path))
    assert not system.calls
