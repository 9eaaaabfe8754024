"""Local files: what is read, and the line that a mistake is answered with."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmslm.data.sources import TextFiles
from llmslm.errors import UserError


@pytest.fixture
def source(tmp_path):
    """Make a source whose training file holds the given text (JSONL) or columns (Parquet)."""

    def make(content, **kwargs):
        path = tmp_path / ("train.parquet" if isinstance(content, dict) else "train.jsonl")
        if isinstance(content, dict):
            pq.write_table(pa.table(content), path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return TextFiles(train=str(path), cache_dir=str(tmp_path / "cache"), **kwargs)

    return make


def test_jsonl_and_parquet_hold_the_same_examples(source):
    rows = [{"id": "a", "question": "été?", "answer": "oui\nnon"}, {"id": "b", "question": "2 ", "answer": " x"}]
    columns = {"prompt_column": "question", "target_column": "answer"}
    jsonl = source("\ufeff" + "\n\n".join(json.dumps(row) for row in rows), **columns)
    parquet = source({key: [row[key] for row in rows] for key in rows[0]}, **columns)
    expected = [{"id": row["id"], "prompt": row["question"], "target": row["answer"]} for row in rows]
    assert list(jsonl.load("train")) == list(parquet.load("train")) == expected
    assert jsonl.fingerprint() == parquet.fingerprint()


def test_ids_are_line_numbers_where_none_are_given(source):
    lines = '{"prompt": "a", "target": "b"}\n\n{"prompt": "c", "target": "d", "id": null}\n'
    assert source(lines).load("train")["id"][:] == ["1", "3"]


def test_a_changed_file_is_read_again(source):
    first = source('{"prompt": "a", "target": "b"}')
    assert first.load("train")["target"][:] == ["b"]
    second = source('{"prompt": "a", "target": "c"}')
    assert second.load("train")["target"][:] == ["c"]
    assert first.fingerprint() != second.fingerprint()


GOOD = '{"prompt": "a", "target": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + '{"prompt": "a", "tar', r"train\.jsonl, line 2: not valid JSON \(.*column 17\)"),
        (GOOD + "[1]", r"line 2: expected an object, found list"),
        (GOOD + '{"prompt": "a", "answer": "b"}', r"line 2: no column 'target'; found prompt, answer .*target_column"),
        (GOOD + '{"prompt": "a", "target": " "}', r"line 2: target is empty"),
        (GOOD + '{"prompt": null, "target": "b"}', r"line 2: prompt is empty or no text"),
        (GOOD + '{"prompt": "a", "target": "b", "id": 1}', r"line 2: id '1' is also that of line 1"),
        (GOOD.encode() + b'{"prompt": "\xff"}', r"line 2: not UTF-8 \(.*byte 13\)"),
        ("", r"train\.jsonl has no rows .*init_args\.train"),
        ({"prompt": ["a"], "answer": ["b"]}, r"train\.parquet: no column 'target'; found prompt, answer"),
        ({"prompt": ["a", "b"], "target": ["c", None]}, r"row 2: target is empty or no text"),
        ({"prompt": pa.array([], pa.string()), "target": pa.array([], pa.string())}, r"train\.parquet has no rows"),
    ],
)
def test_mistakes_name_their_place(source, content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        source(content).prepare()
    assert not list((tmp_path / "cache").glob("*"))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    for name, message in (
        ("a.parquet", "not a readable Parquet file"),
        ("b.jsonl", "cannot be read: No such file"),
        ("c.csv", "neither .jsonl nor .parquet"),
    ):
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            TextFiles(train=str(tmp_path / name), cache_dir=str(tmp_path)).prepare()


def test_a_split_without_a_file(source):
    with pytest.raises(UserError, match=r"there is no test file; set data\.source\.init_args\.test"):
        source(GOOD).load("test")
