"""The headline's pages say what its records say."""

import json
import shutil

import pytest

from evaluation import headline_claims, results
from evaluation.compare import Settings, compare
from evaluation.headline_claims import claims
from evaluation.leaderboard.rows import leaderboard_rows
from evaluation.record import read_record
from evaluation.series import load_series
from evaluation.systems import Arm
from evaluation.targets import read_targets

FAST = {"max_new_tokens": 16, "batch_size": 8, "warmups": 0, "runs": 2, "resamples": 50}
README = "# name\n\nWhat it is,\nin two lines.\n\n![a picture](a.svg)\n\nThe rest.\n"


@pytest.fixture
def runs(dummy, examples, tmp_path):
    """Three stages of a series, one of them not complete."""
    arms = [Arm(dummy("llm", 0.95), "a"), Arm(dummy("slm", 0.4), "b"), Arm(dummy("llm_to_slm", 0.9), "c")]
    stages = {
        "quality": [arms, True],
        "speed": [arms, False],
        "verified": [[arms[0], Arm(dummy("verified", 0.95), "d")]],
    }
    for name, (systems, *controls) in stages.items():
        folder = tmp_path / "runs" / "en_it" / name
        compare(systems, examples, Settings(out=folder, controls=controls == [True], **FAST))
        state = {"command": f"python {name}", "seconds": 90.0, "commit": "abcdef0123", "complete": True}
        (folder / "stage.json").write_text(json.dumps(state))
    (tmp_path / "runs/en_it/add").mkdir()
    (tmp_path / "runs/en_it/add/stage.json").write_text(json.dumps({"seconds": 1, "complete": False}))
    return tmp_path / "runs"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/README.md").write_text(README)
    return tmp_path / "root"


def test_the_pages_of_this_checkout_are_what_its_records_make_them():
    assert results.stale(results.ROOT) == []


def test_pages_come_from_records_and_go_stale_with_them(runs, root):
    assert results.stale(root) == []  # no records: no pages
    results.collect(runs, root / results.RECORDS)
    assert len(results.stale(root)) == 3
    results.write(root)
    assert results.stale(root) == []
    page, readme = (root / results.PAGE).read_text(), (root / "README.md").read_text()
    assert "| en_it/quality | 1.5 | abcdef0 | `python quality` |" in page
    assert "en_it/add" not in page
    assert readme.startswith(f"# name\n\nWhat it is,\nin two lines.\n\n{results.BEGIN}\n| task |")
    (root / "README.md").write_text(readme.replace("| llm_to_slm |", "| llm_to_slm | 99.9 |"))
    assert results.stale(root) == [root / "README.md"]
    results.write(root)
    assert (root / "README.md").read_text() == readme


def test_without_records_nothing_of_them_stays(runs, root):
    results.collect(runs, root / results.RECORDS)
    results.write(root)
    assert results.with_table((root / "README.md").read_text(), "") == README
    for path in (root / results.RECORDS).rglob("*.json"):
        path.unlink()
    assert results.stale(root) == [root / "README.md", root / results.PAGE]


def test_numbers_are_those_of_the_records(runs, root):
    results.collect(runs, root / results.RECORDS)
    found = results.load(root / results.RECORDS)
    llm, slm, both = (found.one("en_it", "quality", name) for name in ("llm", "slm", "llm_to_slm"))
    measured = dict(zip((target.id for target in read_targets(topic="headline")), claims(found), strict=True))
    bleu = llm["scores"]["bleu"]["value"] - slm["scores"]["bleu"]["value"]
    assert measured["llm-above-slm"][2] == f"{bleu:.4g} BLEU"
    assert measured["kept-bleu"][2] == f"{both['scores']['bleu']['versus_llm']['percent']:.4g} %"
    assert measured["p-translation"][2] == f"{both['scores']['bleu']['versus_slm']['p_value']:.4g}"
    assert found.differences == {"en_it": 0}
    assert measured["verified-differences"][2:] == ("–", "–")  # one task is not all test examples
    found.differences["summary"] = 2
    assert dict(zip((target.id for target in read_targets(topic="headline")), claims(found), strict=True))[
        "verified-differences"
    ][2:] == ("2 predictions", "no")
    assert measured["p-summary"][2:] == ("–", "–")
    assert measured["recipe-minutes"][2:] == ("1.5 min", "yes")


def test_the_clock_has_plots_of_its_own(runs, root):
    results.collect(runs, root / results.RECORDS)
    results.write(root)
    folder = root / results.FOLDER
    plots = {path.name for path in (folder / "en_it").glob("*.png")}
    assert {name.split(".")[-2] for name in plots} == {"break-even", "quality-speed"}
    page = (root / results.PAGE).read_text()
    assert all(f"](headline/en_it/{name})" in page for name in plots)
    assert "llm_to_slm/zero_features" in (folder / "leaderboard.md").read_text()
    assert "zero_features" not in (folder / "en_it/leaderboard.md").read_text()


def test_what_was_timed_has_the_scores_of_all_test_examples_or_none():
    def record(system, value, seed=1):
        training = {"recipe": "r", "seed": seed}
        parts = dict.fromkeys(("comparison", "examples", "hashes", "length", "predictions"), value)
        return {"system": system, "training": training, "scores": {"bleu": value}, "speed": [value], **parts}

    scored = {results._trained(twin): twin for twin in (record("llm", 40), record("llm_to_slm", 39))}
    timed = results._with_test_scores(record("llm_to_slm", 12), scored)
    assert (timed["scores"], timed["hashes"], timed["speed"]) == ({"bleu": 39}, 39, [12])
    for other in (record("verified", 12), record("llm", 12, seed=2)):
        assert results._with_test_scores(other, scored) == other | {"scores": {}}


def test_a_system_that_stands_in_several_comparisons_is_a_percentage_of_the_same_llm(runs, root, dummy, examples):
    """The slm beside another llm is the same slm still."""
    arms = [Arm(dummy("llm", 0.2), "t5"), Arm(dummy("slm", 0.4), "b")]
    compare(arms, examples, Settings(out=runs / "en_it/quality_t5", **FAST | {"runs": 0}))
    shutil.copy(runs / "en_it/quality/stage.json", runs / "en_it/quality_t5")
    results.collect(runs, root / results.RECORDS)
    rows = leaderboard_rows(map(read_record, results._of_quality(root)))
    (slm,) = [row for row in rows if row.system == "slm"]
    found = results.load(root / results.RECORDS)
    assert slm.scores["chrf"].percent == pytest.approx(
        found.one("en_it", "quality", "slm")["scores"]["chrf"]["versus_llm"]["percent"]
    )


def test_what_was_measured_goes_into_the_targets(runs, root, monkeypatch):
    state = {"command": "python prompts", "seconds": 900, "commit": None, "complete": True}
    (runs / "prompts").mkdir()
    (runs / "prompts/stage.json").write_text(json.dumps(state))  # needs no GPU
    results.collect(runs, root / results.RECORDS)
    noted = {}
    monkeypatch.setattr(
        headline_claims, "record_measurement", lambda name, value, *_, **more: noted.update({name: (value, more)})
    )
    headline_claims.record_claims(results.load(root / results.RECORDS), "make headline")
    assert noted["recipe-minutes"][0] == 1.5
    assert noted["kept-bleu"][1].keys() == {"hardware", "commit"}
    assert "p-summary" not in noted


def test_every_part_of_the_series_is_in_the_report(runs, root):
    state = json.loads((runs / "en_it/quality/stage.json").read_text())
    for place in ("en_it/quality_read", "t5_en_it/quality", "smollm2_docstrings/quality"):
        shutil.copytree(runs / "en_it/quality", runs / place)
    labels = {"examples": 40, "failed_share": 0.1, "failed": {"short": 4, "long": 0}, "gate": [0.5, 2.0]}
    more = {"examples": 30, "failed_share": 0.0, "failed": {"unfinished": 0}, "gate": None}
    for name, found in (
        ("labels", labels | {"failed_became": "gold"}),
        ("labels_more", more | {"failed_became": "dropped"}),
    ):
        (runs / "en_it" / name).mkdir()
        (runs / "en_it" / name / "labels.json").write_text(json.dumps({"splits": {"train": found}}))
        (runs / "en_it" / name / "stage.json").write_text(json.dumps(state))
    results.collect(runs, root / results.RECORDS)
    page = results.report(results.load(root / results.RECORDS), [])
    gated = "40 training prompts; 10.0 % failed the length gate (4 short) and kept the gold target."
    ungated = "30 further prompts, without gold targets; 0.0 % failed to be a text that ended and were left out."
    assert f"Stage labels: {gated}" in page
    assert f"Stage labels_more: {ungated}" in page
    assert "| encoder-decoder SLM | slm" in page
    assert "## T5 1.1 as the LLM: English to Italian" in page
    assert "## SmolLM2-135M as the LLM: docstrings" in page
    shown = {name.split("/")[-1] for name in load_series("headline") if "/quality" in name}
    assert shown == {*results.VARIANTS, *headline_claims.SEEDS}
    assert {name.split("/")[0] for name in load_series("headline") if "/" in name} == {*results.TITLES, "pretrain"}


def test_the_verified_mode_is_compared_text_by_text(runs):
    paths = sorted((runs / "en_it/verified").glob("*.record.json"))
    record = json.loads(paths[0].read_text())
    assert results.differing(paths) == 0
    predictions = paths[0].parent / record["predictions"]
    lines = predictions.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"prediction": "another"})
    predictions.write_text("\n".join(lines) + "\n")
    assert results.differing(paths) == 1
