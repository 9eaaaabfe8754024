"""Local files: what is read, and the line that a mistake is answered with."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluation.examples import read_source
from llmslm.data.sources import TextFiles
from llmslm.data.sources.base import load_pairs
from llmslm.data.tokenizer import TrainedBpe
from llmslm.errors import UserError
from llmslm.recipe import build_data, read_recipe


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
        (GOOD + '{"prompt": "a", "target": "b", "id": 1}', r"line 2: id '1' is also that of \S+train\.jsonl, line 1"),
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


def test_several_files_are_one_split(source, tmp_path):
    first, second = tmp_path / "train.jsonl", tmp_path / "more.jsonl"
    alone = source(GOOD + '{"id": "x", "prompt": "c", "target": "d"}')
    second.write_text('{"prompt": "e", "target": "f"}\n')
    cache = str(tmp_path / "cache")
    both = TextFiles(train=[str(first), str(second)], cache_dir=cache)
    assert both.load("train")["id"][:] == ["1", "x", "2:1"]
    assert both.load("train")["target"][:] == ["b", "d", "f"]
    assert TextFiles(train=[str(first)], cache_dir=cache).folder == alone.folder != both.folder
    second.write_text('{"id": "x", "prompt": "e", "target": "f"}\n')
    for paths, message in (
        ([str(first), str(second)], r"more\.jsonl, line 1: id 'x' is also that of \S+train\.jsonl, line 2"),
        ([], r"an empty list of files was given \(data\.source\.init_args\.train\)"),
    ):
        with pytest.raises(UserError, match=message):
            TextFiles(train=paths, cache_dir=cache).prepare()


@pytest.mark.parametrize(
    "content", ['{"prompt": "a"}\n{"prompt": "b", "id": 7}', {"id": ["1", "7"], "prompt": ["a", "b"]}]
)
def test_prompts_alone_are_read_but_are_nothing_to_learn_from(source, content):
    prompts = source(content, target_column=None)
    assert list(prompts.load("train")) == [
        {"id": "1", "prompt": "a", "target": None},
        {"id": "7", "prompt": "b", "target": None},
    ]
    message = (
        r"the train split of files has prompts alone; .*data\.source\.init_args\.target_column\), or .*llmslm label"
    )
    for use in (
        lambda: load_pairs(prompts, "train"),
        lambda: TrainedBpe(300).load(prompts),
        lambda: read_source(prompts, "files", "train", None, 0),
    ):
        with pytest.raises(UserError, match=message):
            use()


def test_a_recipe_and_the_command_line_take_lists():
    recipe = read_recipe(["headline/en_it"], ["--data.source.init_args.train", "[a.parquet,b.parquet]"])
    source = build_data(recipe | {"data": {**recipe["data"], "tokenizer": None}}).source
    assert [path.name for path in source.paths["train"]] == ["a.parquet", "b.parquet"]
    assert [path.name for path in source.paths["test"]] == ["test.parquet"]
