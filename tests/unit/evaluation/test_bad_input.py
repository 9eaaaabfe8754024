"""What is wrong with an input is said in words, or marked; it never becomes a number."""

import json

import pytest

from evaluation.arms import load_arms
from evaluation.compare import Settings, compare
from evaluation.examples import load_examples
from evaluation.leaderboard import build
from evaluation.predictions import read_partial, read_predictions
from evaluation.record import read_record
from evaluation.scoring import text_statistics
from evaluation.systems import Arm
from llmslm.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_counts_that_differ():
    with pytest.raises(UserError, match="2 predictions but 1 references; expected one for one"):
        text_statistics(["bleu"], ["a", "b"], ["a"])


@pytest.mark.parametrize("method", ["generate", "log_likelihood"])
def test_a_system_that_returns_too_little(dummy, examples, tmp_path, method):
    system = dummy("mine")
    whole = getattr(system, method)
    setattr(system, method, lambda prompts, *rest, **settings: whole(prompts, *rest, **settings)[:-1])
    with pytest.raises(UserError, match=f"{method} of mine returned 15 results for 16 prompts"):
        compare([Arm(system)], examples, Settings(out=tmp_path, runs=0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"x\.jsonl has no rows"),
        ('{"prompt": "a", "target": "b"}\n{"prompt": "a", "tar', r"x\.jsonl, line 2"),
        ("[1]\n", r"x\.jsonl, line 1"),
        ('{"prompt": "a", "answer": "b"}\n', "no column 'target'; found prompt, answer"),
        ('{"prompt": "a", "reference": ""}\n', "reference is empty"),
    ],
    ids=["empty", "cut", "no object", "no target", "empty text"],
)
def test_data_files(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        load_examples(str(tmp_path / "x.jsonl"), "test", None, 0)


def test_a_broken_parquet_file(tmp_path):
    (tmp_path / "x.parquet").write_text("no such thing")
    with pytest.raises(UserError, match=r"x\.parquet is no Parquet file, or a broken one"):
        load_examples(str(tmp_path / "x.parquet"), "test", None, 0)


@pytest.mark.parametrize(
    ("device", "message"),
    [("quantum", "device 'quantum' was asked for; expected cpu, cuda"), ("cuda:99", r"but PyTorch sees \w+ GPUs here")],
)
def test_a_device_that_is_not_there(device, message):
    with pytest.raises(UserError, match=message):
        load_arms({}, device, "float32")


def test_references_may_be_called_so(tmp_path):
    path = write(tmp_path / "x.jsonl", {"prompt": "a", "reference": "b"})
    assert load_examples(path, "test", None, 0).references == ["b"]


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": "new"}', '{"scores": NaN}', "{", "\x00"])
def test_files_that_are_no_records(tmp_path, text):
    path = tmp_path / "x.record.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x\.record\.json is not a record"):
        read_record(path)


def test_records_of_the_first_schema_are_read(dummy, examples, tmp_path):
    (path,) = compare([Arm(dummy())], examples, Settings(out=tmp_path, warmups=0, runs=1, resamples=10))
    record = json.loads(path.read_text())
    for key in ("folder", "cost"):
        del record[key]
    for entry in record["speed"]:
        entry.pop("floor_s", None)
    path.write_text(json.dumps(record | {"schema_version": 1}))
    assert read_record(path)["schema_version"] == 1
    assert build([path], tmp_path / "board").rows[0].system == "llm"


def test_an_empty_or_cut_predictions_file_is_marked(dummy, examples, tmp_path):
    settings = Settings(out=tmp_path, runs=0, resamples=10)
    llm, slm = compare([Arm(dummy("llm")), Arm(dummy("slm"))], examples, settings)
    empty, cut = (tmp_path / read_record(path)["predictions"] for path in (llm, slm))
    empty.write_text("")
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(UserError, match="line 20: not JSON"):
        read_predictions(cut)
    assert len(read_partial(cut)) == 19
    marks = {row.system: row.marks for row in build([tmp_path], tmp_path / "board").rows}
    assert "predictions differ from the record" in marks["llm"]
    assert "predictions unreadable" in marks["slm"]
