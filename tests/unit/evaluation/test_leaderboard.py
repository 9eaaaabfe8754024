"""The leaderboard: who wins, what is marked, and that a page and a table say the same."""

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from evaluation.compare import Settings, compare
from evaluation.leaderboard import build
from evaluation.leaderboard.plot import break_even, pareto_front, png, quality_speed
from evaluation.leaderboard.rows import best, leaderboard_rows
from evaluation.leaderboard.table import markdown_table
from evaluation.record import read_record
from evaluation.systems import Arm

FAST = {"max_new_tokens": 16, "batch_size": 8, "warmups": 0, "runs": 2, "resamples": 50}


@pytest.fixture
def folder(dummy, examples, tmp_path):
    arms = [Arm(dummy("llm", 0.95), "a"), Arm(dummy("slm", 0.4), "b"), Arm(dummy("llm_to_slm", 0.9), "c")]
    compare(arms, examples, Settings(out=tmp_path / "records", controls=True, **FAST))
    return tmp_path / "records"


def edit(folder, system, change, name=None):
    path = folder / f"copying.{system}.record.json"
    record = json.loads(path.read_text())
    change(record)
    (folder / f"{name or path.name}").write_text(json.dumps(record))
    return record


def rows_of(folder):
    return {row.system: row for row in leaderboard_rows(map(read_record, sorted(folder.glob("*.record.json"))))}


def clean(record):
    record["provenance"]["dirty"] = False


class Page(HTMLParser):
    """Collects what a page refers to and the cells of its table."""

    def __init__(self, text):
        super().__init__()
        self.links, self.best, self.scripts = [], 0, 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[key] for key in ("src", "href") if key in attrs]
        self.best += "best" in attrs.get("class", "").split()
        self.scripts += tag == "script"


def test_rows_are_ordered_and_compared_with_the_llm(folder):
    rows = rows_of(folder)
    assert list(rows)[:3] == ["llm", "slm", "llm_to_slm"]
    assert rows["llm"].scores["chrf"].percent == pytest.approx(100)
    assert rows["slm"].scores["chrf"].percent < rows["llm_to_slm"].scores["chrf"].percent < 100
    speed = [entry for name in ("llm", "llm_to_slm") for entry in rows[name].record["speed"]]
    llm, ours = (entry["total_s"]["p50"] for entry in speed if entry["mode"] == "fixed")
    assert rows["llm_to_slm"].speedup["fixed"] == pytest.approx(llm / ours)


def test_what_nothing_was_measured_of_has_no_column(dummy, examples, tmp_path, folder):
    compare([Arm(dummy("llm"), "a")], examples, Settings(out=tmp_path / "untimed", **FAST | {"runs": 0}))
    timed, untimed = (build([path], tmp_path / "out" / path.name) for path in (folder, tmp_path / "untimed"))
    for built, has in ((timed, True), (untimed, False)):
        heads = built.markdown.splitlines()[2], built.files["page"].read_text().partition("<tbody")[0]
        for title in ("first token", "tokens/s", "memory", "speed-up fixed"):
            assert [title in head for head in heads] == [has, has]
        assert [unit in heads[1] for unit in ("first token, ms", "further tokens, ms", "memory, MiB")] == [has] * 3
        assert all("BLEU" in head and "length" in head for head in heads)


def test_what_does_not_compare_is_marked(folder):
    for system in ("llm", "slm", "llm_to_slm"):
        edit(folder, system, clean)
    edit(folder, "slm", lambda record: record["provenance"]["hardware"].update(gpus=["NVIDIA H200"]))
    edit(folder, "llm_to_slm", lambda record: record["task"].update(version=2))
    rows = rows_of(folder)
    assert rows["llm"].marks == []
    assert rows["slm"].marks == ["other hardware"]
    assert rows["slm"].speedup == {"fixed": None, "natural": None}
    assert rows["llm_to_slm"].marks == ["task version 2"]
    edit(folder, "llm_to_slm", lambda record: record["hashes"].update(references="0" * 64))
    edit(folder, "llm", lambda record: record["provenance"].update(dirty=True))
    rows = rows_of(folder)
    assert "other examples" in rows["llm_to_slm"].marks
    assert rows["llm_to_slm"].scores["bleu"].percent is None
    assert rows["llm"].marks == ["dirty tree"]


def test_a_system_that_stops_early_gets_no_natural_speedup(folder):
    edit(folder, "llm_to_slm", lambda record: record["length"].update(ratio=0.5, met=False))
    row = rows_of(folder)["llm_to_slm"]
    assert "short" in row.marks
    assert row.speedup["natural"] is None
    assert row.speedup["fixed"] is not None


def test_seeds_are_averaged_and_old_records_of_a_checkpoint_left_out(folder):
    def reseed(value, checkpoint, date):
        def change(record):
            record["training"] = {"seed": value}
            record["hashes"]["checkpoint"] = checkpoint
            record["scores"]["bleu"]["value"] = 50.0 + value
            record["provenance"]["date"] = date

        return change

    for seed, checkpoint, date in ((1, "x", "2026-01-01"), (3, "y", "2026-01-01"), (5, "y", "2026-01-02")):
        edit(folder, "llm_to_slm", reseed(seed, checkpoint, date), f"seed{seed}.record.json")
    (folder / "copying.llm_to_slm.record.json").unlink()
    row = rows_of(folder)["llm_to_slm"]
    cell = row.scores["bleu"]
    assert (len(row.records), cell.value, cell.low) == (2, 53.0, None)
    assert cell.spread == pytest.approx(8**0.5)
    assert "llm_to_slm (2 seeds)" in markdown_table([row])


def again(folder, system, name, **changes):
    """Write a record of the system once more, with changes by section."""

    def change(record):
        for section, values in changes.items():
            record[section].update(values)

    edit(folder, system, change, f"{name}.record.json")


def labels(folder):
    return [row.label for row in leaderboard_rows(map(read_record, sorted(folder.glob("*.record.json"))))]


def test_the_same_seed_trained_again_is_another_row(folder):
    (folder / "copying.slm.record.json").unlink()
    for name, seed in (("x", 1), ("y", 2), ("z", 1)):
        hashes = {"checkpoint": name * 64}
        again(folder, "llm_to_slm", name, training={"seed": seed}, hashes=hashes, provenance={"date": f"2026-{name}"})
    (folder / "copying.llm_to_slm.record.json").unlink()
    rows = [row for row in leaderboard_rows(map(read_record, folder.glob("*.json"))) if row.system == "llm_to_slm"]
    assert {row.label: len(row.records) for row in rows} == {
        "llm_to_slm, weights yyyyyy": 2,
        "llm_to_slm, weights xxxxxx": 1,
    }


def test_rows_of_one_system_are_told_apart(folder, tmp_path):
    for name in ("llm", "slm"):
        edit(folder, name, lambda record: record["training"].update(recipe="small"))
        again(folder, name, f"{name}2", training={"recipe": "large"}, hashes={"checkpoint": name * 9})
    again(folder, "slm", "slm3", training={"recipe": "large"}, settings={"dtype": "bfloat16"})
    assert labels(folder)[:5] == [
        *("llm, large", "llm, small"),
        *("slm, large, bfloat16", "slm, large, dtype unknown", "slm, small, dtype unknown"),
    ]
    text = build([folder], tmp_path / "board").files["page"].read_text()
    assert text.count("slm, large, bfloat16</span>") == 12  # in each sample


def test_each_machine_is_compared_with_its_own_llm(folder):
    gpu = {"hardware": {"cpu": "x", "cores": 1, "threads": 1, "gpus": ["NVIDIA H200"]}, "date": "2001-01-01"}
    for name in ("llm", "slm"):
        again(folder, name, f"{name}-gpu", provenance=gpu)
    rows = {(row.system, row.hardware): row for row in leaderboard_rows(map(read_record, folder.glob("*.json")))}
    slm = rows["slm", "NVIDIA H200"]
    assert slm.llm is rows["llm", "NVIDIA H200"]
    assert slm.speedup["fixed"] is not None
    assert "other hardware" in slm.marks  # than the newest llm's
    assert all("other hardware" not in row.marks for (_, machine), row in rows.items() if machine != "NVIDIA H200")


def test_other_prompts_are_other_examples(folder):
    edit(folder, "slm", lambda record: record["hashes"].update(prompts="0" * 64))
    row = rows_of(folder)["slm"]
    assert "other examples" in row.marks
    assert row.scores["bleu"].percent is None


def test_prompts_that_differ_are_no_seeds_of_one_row(folder):
    for seed, prompts in ((1, "a"), (2, "b")):
        hashes = {"checkpoint": f"{seed}" * 9, "prompts": prompts * 64}
        again(folder, "slm", f"slm{seed}", training={"seed": seed}, hashes=hashes)
    (folder / "copying.slm.record.json").unlink()
    rows = [row for row in leaderboard_rows(map(read_record, folder.glob("*.json"))) if row.system == "slm"]
    assert [len(row.records) for row in rows] == [1, 1]


def test_speeds_of_other_batch_sizes_are_not_divided(folder):
    def rebatch(record):
        for entry in record["speed"]:
            entry["batch_size"] = 8

    edit(folder, "slm", rebatch)
    rows = rows_of(folder)
    assert "other batch size" in rows["slm"].marks
    assert rows["slm"].speedup == {"fixed": None, "natural": None}
    assert "other batch size" not in rows["llm_to_slm"].marks + rows["llm_to_slm/zero_features"].marks
    shown = list(rows.values())
    plot = quality_speed(shown, [row.label for row in shown])
    assert {text.get_text() for text in plot.axes[0].texts} == {"llm", "llm_to_slm"}


def test_p_values_against_another_llm_are_not_shown(folder):
    assert rows_of(folder)["slm"].scores["chrf"].p_value is not None
    edit(folder, "llm", lambda record: (record.update(comparison="x"), record["hashes"].update(predictions="0" * 64)))
    row = rows_of(folder)["slm"]
    assert "not tested against this llm" in row.marks
    assert row.scores["chrf"].p_value is None
    assert row.scores["chrf"].percent is not None
    (folder / "copying.llm.record.json").unlink()
    assert (
        rows_of(folder)["slm"].scores["chrf"].p_value is not None
    )  # no llm beside it: the one that it was tested with


def test_of_two_llms_the_one_that_a_row_was_tested_against_counts(folder):
    for system in ("llm", "slm"):
        edit(folder, system, lambda record: record["training"].update(recipe=f"of {record['system']}"))
    percent = rows_of(folder)["slm"].scores["chrf"].percent

    def other(record):
        record["comparison"], record["provenance"]["date"] = "other", "2999-01-01"
        record["hashes"].update(checkpoint="another", predictions="0" * 64)
        record["training"]["recipe"] = "another"
        record["scores"]["chrf"]["value"] *= 2

    edit(folder, "llm", other, "other.record.json")
    row = rows_of(folder)["slm"]
    assert row.scores["chrf"].percent == percent
    assert "not tested against this llm" not in row.marks


def test_an_llm_evaluated_again_with_the_same_predictions_is_the_same(folder):
    def repeat(record):
        record["comparison"] = "again"
        record["provenance"]["date"] = "2999-01-01"

    edit(folder, "llm", repeat, "later.record.json")
    row = rows_of(folder)["slm"]
    assert "not tested against this llm" not in row.marks
    assert row.scores["chrf"].p_value is not None


def test_likelihood_of_other_references_does_not_compare(folder):
    edit(folder, "slm", lambda record: record["examples"].update(likelihood=3))
    rows = rows_of(folder)
    assert rows["slm"].scores["bits_per_byte"].percent is None
    assert rows["slm"].scores["chrf"].percent is not None
    assert rows["llm_to_slm"].scores["bits_per_byte"].percent is not None


def test_scores_by_other_settings_are_marked(folder):
    def lowercase(record):
        record["scores"]["bleu"]["signature"] = "nrefs:1|case:lc|bs:1000"

    edit(folder, "slm", lowercase)
    edit(
        folder,
        "llm_to_slm",
        lambda record: record["scores"]["bleu"].update(
            signature=record["scores"]["bleu"]["signature"].replace("bs:50", "bs:99")
        ),
    )
    rows = rows_of(folder)
    assert "other scoring" in rows["slm"].marks
    assert rows["slm"].scores["bleu"].percent is None
    assert rows["slm"].scores["chrf"].percent is not None
    assert "other scoring" not in rows["llm_to_slm"].marks


def test_break_even_is_dotted_where_nothing_was_measured(folder):
    rows = leaderboard_rows(map(read_record, folder.glob("*.json")))
    curves = break_even(rows, [row.label for row in rows]).axes[0].lines
    solid, dotted = curves[0], curves[1]
    assert (solid.get_linestyle(), dotted.get_linestyle()) == ("-", ":")
    assert max(solid.get_xdata()) <= 16 < min(dotted.get_xdata())


def test_a_system_that_the_engine_could_not_read_is_marked(folder):
    edit(folder, "llm", lambda record: record["settings"].update(decoder="generate"))
    edit(folder, "slm", lambda record: record["settings"].update(decoder="engine"))
    rows = rows_of(folder)
    assert "decoded by generate()" in rows["llm"].marks
    assert "decoded by generate()" not in rows["slm"].marks


def test_an_unknown_dtype_is_said_and_no_speed_compared(folder):
    edit(folder, "llm", lambda record: record["settings"].update(dtype="float32"))
    row = rows_of(folder)["slm"]
    assert "dtype unknown" in row.marks
    assert row.speedup == {"fixed": None, "natural": None}


def test_a_score_that_is_not_a_number_is_marked(folder):
    broken = {"value": None, "low": None, "high": None, "problem": "the score is nan", "signature": ""}
    edit(folder, "llm", lambda record: record["scores"].update(bleu=broken))
    rows = rows_of(folder)
    assert "score is not a number" in rows["llm"].marks
    assert rows["slm"].scores["bleu"].percent is None
    assert "not a number" in markdown_table(list(rows.values()))


def test_perplexity_gives_way_where_tokenizers_differ(folder):
    def retokenise(record):
        record["length"]["reference_tokens"] += 1
        record["scores"]["perplexity"]["value"] = 1.0

    assert "| perplexity |" in markdown_table(list(rows_of(folder).values()))
    edit(folder, "slm", retokenise)
    rows = list(rows_of(folder).values())
    text = markdown_table(rows)
    assert "| bits/byte |" in text
    assert "perplexity" not in text
    assert best(rows, "perplexity") == rows[0].scores["perplexity"].value


def test_builds_table_csv_page_and_plots(folder, tmp_path):
    built = build([folder], tmp_path / "board")
    assert set(built.files) == {"markdown", "csv", "page", "quality-speed", "break-even"}
    assert all(path.stat().st_size > 1000 for path in built.files.values())
    assert re.search(r"\| llm \| \*\*\d+\.\d\*\* ±", built.markdown)
    lines = list(csv.DictReader(built.files["csv"].read_text().splitlines()))
    assert [line["system"] for line in lines] == [row.system for row in built.rows]
    assert float(lines[1]["bleu"]) == read_record(folder / "copying.slm.record.json")["scores"]["bleu"]["value"]


def test_the_page_needs_no_network_and_shows_the_winner(folder, tmp_path):
    text = build([folder], tmp_path).files["page"].read_text()
    page = Page(text)
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert "@import" not in text
    assert page.scripts == 1
    assert page.best == len(rows_of(folder)["llm"].scores)
    assert text.count("<svg") == 2
    assert "fill: #ffffff" not in text  # plots stand on the page's own ground, light or dark
    assert text.count('class="card sample"') == 12


def test_text_of_predictions_is_escaped(dummy, examples, tmp_path):
    evil = [f"<script>alert({index})</script> & co" for index in range(len(examples))]
    system = dummy("llm", 1.0)
    compare([Arm(system)], replace(examples, prompts=evil, references=evil), Settings(out=tmp_path, **FAST))
    text = build([tmp_path], tmp_path / "board").files["page"].read_text()
    assert Page(text).scripts == 1
    assert "&lt;script&gt;alert(" in text


def test_changed_and_cut_predictions_are_marked_and_not_shown(folder, tmp_path):
    slm, llm = (read_record(folder / f"copying.{name}.record.json")["predictions"] for name in ("slm", "llm"))
    path = folder / slm
    path.write_text(path.read_text().replace("spoilt", "improved"))
    path = folder / llm
    path.write_text(path.read_text()[:-30])
    built = build([folder], tmp_path)
    rows = {row.system: row for row in built.rows}
    assert "predictions differ from the record" in rows["slm"].marks
    assert "predictions unreadable" in rows["llm"].marks
    assert "improved" not in built.files["page"].read_text()
    assert "predictions differ from the record" in built.markdown


def test_records_without_predictions_are_enough(folder, tmp_path):
    for path in (folder / "predictions").iterdir():
        path.unlink()
    text = build([folder], tmp_path).files["page"].read_text()
    assert "Sample predictions" not in text
    assert "predictions unreadable" not in text


def test_many_rows_are_named_below_the_panels(folder):
    for name in ("one", "two", "three"):
        edit(folder, "slm", lambda record, name=name: record.update(system=name), f"{name}.record.json")
    rows = leaderboard_rows(map(read_record, folder.glob("*.json")))
    for figure in (quality_speed(rows, [row.label for row in rows]), break_even(rows, [row.label for row in rows])):
        png(figure)  # lays it out
        (legend,) = figure.legends
        bottom = min(axes.get_tightbbox().y0 for axes in figure.axes)
        assert legend.get_window_extent().y1 <= bottom


def test_a_tie_has_no_winner(folder):
    rows = list(rows_of(folder).values())
    assert best(rows, "chrf") == rows[0].scores["chrf"].value
    assert best([rows[0], rows[0]], "chrf") is None


def test_pareto_front():
    assert pareto_front([(1, 9), (2, 8), (2, 7), (3, 8), (4, 1)]) == [0, 3, 4]
    assert pareto_front([(1, 1)]) == [0]


@pytest.mark.parametrize(("times", "scale"), [(2.0, "linear"), (1000.0, "log")])
def test_speeds_far_apart_are_on_a_scale_of_logarithms(folder, monkeypatch, times, scale):
    shown = list(rows_of(folder).values())[:2]
    speeds = dict(zip((row.label for row in shown), (10.0, 10.0 * times), strict=True))
    monkeypatch.setattr("evaluation.leaderboard.rows.Row.tokens_per_s", lambda row, mode: speeds[row.label])
    figure = quality_speed(shown, [*speeds])
    assert {axes.get_xscale() for axes in figure.axes} == {scale}
