"""Exported folders: loadable, with a card that says what is known and nothing else; mistakes cost one line."""

import json

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from llmslm.checkpoint import save_system
from llmslm.cli import main
from llmslm.export import known_license
from llmslm.models.trained import count_parameters
from llmslm.provenance import folder_hash
from llmslm.system import System
from tests.unit.models.test_trained import LORA, PROMPTS, codec_of, composition, disturb, language_model

SIGNATURE = "nrefs:1|case:mixed"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A composition whose slm was trained by adapters, and its folder."""
    monkeypatch.chdir(tmp_path)
    model = composition("llama", LORA, tmp_path)
    disturb(model)
    about = {"recipe": "some", "commit": "abc", "dirty": True, "data": "d1", "seed": 7}
    card = about | {"system": "llm_to_slm", "trained_parameters": count_parameters(model)["trained"]}
    save_system(tmp_path / "runs" / "system", model, codec_of(model, True), card)
    return tmp_path / "runs"


def record(path, run, system="llm_to_slm", **changes):
    score = {"value": 12.345678, "low": 11.0, "high": 13.0, "signature": SIGNATURE}
    values = {
        "system": system,
        "task": {"name": "debian_summary", "version": 1, "split": "test", "data": "d2"},
        "examples": {"effective": 9},
        "scores": {"rouge_l": score, "perplexity": {"value": None, "low": None, "high": None, "signature": "x"}},
        "hashes": {"checkpoint": folder_hash(run / "system")},
        "settings": {"dtype": "float32", "device": "cpu"},
        "provenance": {"commit": "abc", "command": "llmslm-eval compare"},
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values | changes))


def test_the_card_has_scores_origin_and_known_licences(run, tmp_path, capsys):
    record(tmp_path / "records" / "a.record.json", run)
    record(tmp_path / "records" / "b.record.json", run, system="llm_to_slm/zero_features")
    record(tmp_path / "records" / "c.record.json", run, hashes={"checkpoint": "of another"})
    (tmp_path / "t5" / "README.md").write_text("---\nlicense: mit\n---\n")
    main(["export", "--checkpoint", "runs", "--output", "hub/mine", "--records", "records", "--license", "apache-2.0"])
    said = capsys.readouterr()
    assert said.out == "hub/mine\n"
    assert (
        "names a local encoder, t5, which others do not have; give its place on the hub with --encoder-source"
        in said.err
    )
    card = ModelCard.load("hub/mine/README.md")
    result, *others = card.data.eval_results
    assert others == []
    assert (result.metric_type, result.metric_name, result.metric_value) == ("rouge", "ROUGE-L", 12.3457)
    assert (result.dataset_name, result.dataset_split, result.dataset_revision) == ("debian_summary", "test", "d2")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None
    for line in (
        "| trained weights | this folder | | apache-2.0 |",
        "- recipe: some",
        "- data (content hash): d1",
        "- commit: abc with changes that were not committed",
        "| ROUGE-L | 12.35 | 11 to 13 | `nrefs:1\\|case:mixed` |",
    ):
        assert line in card.content
    assert [
        line.split("|")[-2].strip() for line in card.content.splitlines() if line.startswith(("| enc", "| base"))
    ] == [
        "mit",
        "not stated",
    ]
    assert str(tmp_path) not in card.content


def test_an_export_predicts_as_its_run_and_loads_by_from_pretrained(run):
    main(["export", "--checkpoint", "runs", "--output", "hub/deeper/mine"])
    main(["export", "--checkpoint", "runs", "--output", "hub/whole", "--merge"])
    expected = System.load(run).generate(PROMPTS, max_new_tokens=6)
    for name in ("deeper/mine", "whole"):
        assert System.load(f"hub/{name}").generate(PROMPTS, max_new_tokens=6) == expected
        AutoModelForCausalLM.from_pretrained(f"hub/{name}")
    assert "frozen_base" not in json.loads((run.parent / "hub/whole/config.json").read_text())["slm_config"]


def test_sources_are_named_as_others_find_them(run, tmp_path, capsys):
    main(
        [
            "export",
            "--checkpoint",
            "runs",
            "--output",
            "hub",
            "--encoder-source",
            "google/t5",
            "--base-source",
            "me/llama",
        ]
    )
    assert "local" not in capsys.readouterr().err
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["encoder_source"] == "google/t5"
    assert config["slm_config"]["frozen_base"]["source"] == "me/llama"
    assert ModelCard.load("hub/README.md").data.base_model == ["google/t5", "me/llama"]


def test_adapters_of_an_llm_are_read_by_transformers_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = language_model("llama", LORA, tmp_path)
    disturb(model)
    save_system(tmp_path / "run", model, codec_of(model, False), {"system": "llm"})
    main(["export", "--checkpoint", "run", "--output", "hub", "--base-source", str(tmp_path / "llama")])
    theirs = AutoModelForCausalLM.from_pretrained("hub")
    for name, weight in theirs.state_dict().items():
        assert weight.equal(model.state_dict()[name]), name
    main(["export", "--checkpoint", "run", "--output", "whole", "--merge"])
    assert type(AutoModelForCausalLM.from_pretrained("whole")) is type(model)
    assert System.load("whole").generate(PROMPTS, max_new_tokens=6) == System.load("run").generate(
        PROMPTS, max_new_tokens=6
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--output", "runs"], "runs exists; give a folder that does not (--output)"),
        (["--output", "new", "--checkpoint", "nothing"], "nothing holds no system"),
        (
            ["--output", "t5/config.json/new"],
            "t5/config.json/new cannot be written: Not a directory; give another folder",
        ),
        (["--output", "new", "--records", "t5/config.json"], "t5/config.json is not an evaluation record"),
        (["--output", "new", "--records", "nothing"], "nothing is not an evaluation record"),
        (["--output", "new", "--records", "others"], "none of the 1 records in others is of the system in runs/system"),
    ],
)
def test_mistakes_cost_one_line_and_leave_nothing(args, message, run, tmp_path, capsys):
    record(tmp_path / "others" / "a.record.json", run, system="llm")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(["export", "--checkpoint", "runs", *args])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_package_states_its_licence():
    assert known_license("package:peft") is not None
    assert known_license("package:there_is_none") is None
    assert known_license("google/there-is-none") is None


def test_a_misspelt_recipe_loads_nothing(monkeypatch, capsys):
    monkeypatch.setattr("llmslm.cli._train", lambda *_: pytest.fail("training was imported"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "quickstrat"])
    assert stop.value.code == 1
    assert "no recipe 'quickstrat'" in capsys.readouterr().err
