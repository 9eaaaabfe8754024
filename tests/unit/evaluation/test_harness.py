"""The systems run tasks of the lm-evaluation-harness, with data from a local file."""

import json

import pytest

pytest.importorskip("lm_eval", reason="needs the package lm-eval")

from dummy import DummySystem, Produced, Scored
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from test_systems import composed, saved

from evaluation.harness import HarnessModel, cut
from llmslm.errors import UserError
from llmslm.system import System


class Knowing(DummySystem):
    """Knows the capital of France and finds every other text unlikely."""

    def generate(self, prompts, *, max_new_tokens, min_new_tokens=0, on_first_token=None):
        return [Produced("Paris" if "France" in prompt else "no idea\nand more", 3) for prompt in prompts]

    def log_likelihood(self, prompts, targets):
        return [Scored(1.0 if text.strip() == "Paris" else 9.0, 2) for text in targets]


def task(folder, name, **settings):
    rows = [
        {"question": "The capital of France is", "choices": ["Paris", "Rome"], "gold": 0, "answer": "Paris"},
        {"question": "The capital of Peru is", "choices": ["Paris", "Lima"], "gold": 1, "answer": "Lima"},
    ]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    return {"task": name, "doc_to_text": "{{question}}"} | files | settings


def run(model, config, monkeypatch, folder):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    result = simple_evaluate(model, tasks=[config], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0)
    return result["results"][config["task"]]


def test_multiple_choice(tmp_path, monkeypatch):
    config = task(
        tmp_path,
        "capitals",
        output_type="multiple_choice",
        doc_to_choice="choices",
        doc_to_target="gold",
        metric_list=[{"metric": "acc"}],
    )
    assert run(HarnessModel(system=Knowing()), config, monkeypatch, tmp_path)["acc,none"] == 0.5


def test_generation(tmp_path, monkeypatch):
    config = task(
        tmp_path,
        "write",
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 5},
        metric_list=[{"metric": "bypass"}],
    )
    assert "bypass,none" in run(HarnessModel(system=Knowing()), config, monkeypatch, tmp_path)


def test_the_three_systems_are_its_models(tmp_path, monkeypatch):
    """Real weights: llm and slm from the folder they lie in, the composition as loaded."""
    llm = System.load(saved(tmp_path, "llm", "llama"))
    models = [
        *(HarnessModel(folder=saved(tmp_path, name, "llama", seed)) for seed, name in enumerate(("llm", "slm"))),
        HarnessModel(system=composed(llm)),
    ]
    config = task(tmp_path, "choose", output_type="multiple_choice", doc_to_choice="choices", doc_to_target="gold")
    for model in models:
        found = run(model, config | {"metric_list": [{"metric": "acc"}]}, monkeypatch, tmp_path)["acc,none"]
        pairs = [("The capital of France is", ("Paris", "Rome")), ("The capital of Peru is", ("Paris", "Lima"))]
        likelier = []
        for prompt, texts in pairs:
            nats = [score.nats for score in model.system.log_likelihood([prompt] * 2, [f" {text}" for text in texts])]
            likelier.append(nats.index(min(nats)))
        assert found == ((likelier[0] == 0) + (likelier[1] == 1)) / 2, model.system.name


def test_requests_in_batches():
    model = HarnessModel(system=Knowing(), batch_size=2)
    requests = [
        Instance("loglikelihood", {}, ("France", text), index) for index, text in enumerate((" Paris", "x", "y"))
    ]
    assert model.loglikelihood(requests) == [(-1.0, True), (-9.0, False), (-9.0, False)]
    texts = [Instance("loglikelihood_rolling", {}, ("Paris",), 0)]
    assert model.loglikelihood_rolling(texts) == [-1.0]
    asked = [Instance("generate_until", {}, ("Peru", {"until": ["\n"]}), 0)]
    assert model.generate_until(asked) == ["no idea"]


def test_a_request_gets_its_own_budget_whatever_is_beside_it():
    asked = []
    system = Knowing()
    system.generate = lambda prompts, max_new_tokens: (
        asked.append((tuple(prompts), max_new_tokens))
        or [Produced(f"{prompt} {max_new_tokens}", 1) for prompt in prompts]
    )
    budgets = [("a", 5), ("b", 9), ("c", 5)]
    requests = [Instance("generate_until", {}, (text, {"max_gen_toks": size}), 0) for text, size in budgets]
    assert HarnessModel(system=system).generate_until(requests) == ["a 5", "b 9", "c 5"]
    assert asked == [(("a", "c"), 5), (("b",), 9)]


def test_an_automatic_batch_size_is_refused():
    with pytest.raises(UserError, match=r"batch size 'auto' was given; expected a number of at least 1"):
        HarnessModel(system=Knowing(), batch_size="auto")


def test_a_text_that_would_be_cut_is_refused():
    system = Knowing()
    system.codec = type("Codec", (), {"text_format": type("Format", (), {"max_target_tokens": 2})})
    with pytest.raises(UserError, match="a text has 2 tokens or more, which is where llm cuts targets"):
        HarnessModel(system=system).loglikelihood([Instance("loglikelihood", {}, ("a", "b"), 0)])


def test_needs_a_folder():
    with pytest.raises(UserError, match="no system was given; expected its folder"):
        HarnessModel()


def test_cut():
    assert cut("a\nb. c", ["c", "\n"]) == "a"
    assert cut("abc", "c") == "ab"
