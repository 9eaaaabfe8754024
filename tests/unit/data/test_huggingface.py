"""Datasets in the hub's format, from local folders."""

import json

import pytest

from llmslm.data.sources import HubDataset
from llmslm.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of JSONL splits with nested texts, as WMT has, in three shards; one row has no target."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "pairs"
    path.mkdir()
    for shard in range(3):
        rows = [{"translation": {"en": f"one {shard} {i}", "it": f"uno {shard} {i}"}, "note": "n"} for i in range(4)]
        rows[2]["translation"]["it"] = None if shard == 1 else rows[2]["translation"]["it"]
        (path / f"train-0000{shard}-of-00003.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "validation.jsonl").write_text(json.dumps({"translation": {"en": "two", "it": "due"}, "note": ""}))
    return str(path)


def make(folder, **kwargs):
    return HubDataset(folder, **({"prompt_column": "translation.en", "target_column": "translation.it"} | kwargs))


@pytest.mark.parametrize("streaming", [False, True])
def test_nested_columns_and_rows_without_text(folder, streaming, caplog):
    rows = list(make(folder, streaming=streaming).load("train"))
    assert [row["target"] for row in rows] == [f"uno {s} {i}" for s in range(3) for i in range(4) if (s, i) != (1, 2)]
    assert {len(row) for row in rows} == {3}
    assert len({row["id"] for row in rows}) == len(rows)
    assert streaming or "left out 1 of 12 rows of train" in caplog.text


def test_a_stream_has_the_same_ids_on_every_rank(folder):
    from datasets.distributed import split_dataset_by_node

    stream = make(folder, streaming=True).load("train")
    whole = {row["id"]: row["target"] for row in stream}
    for rank in range(3):
        for row in split_dataset_by_node(stream, rank, 3):
            assert whole.pop(row["id"]) == row["target"]
    assert not whole


def test_slices_and_a_second_part_of_the_prompt(folder):
    source = make(folder, train="train[:2]", extra_prompt_column="note")
    assert source.load("train")["prompt"][:] == ["one 0 0\nn", "one 0 1\nn"]
    assert source.load("validation")["prompt"][:] == ["two"]


def test_the_fingerprint_follows_data_and_columns(folder):
    assert make(folder).fingerprint() == make(folder).fingerprint()
    assert make(folder).fingerprint() != make(folder, train="train[:2]").fingerprint()
    assert make(folder).fingerprint() != make(folder, target_column="note").fingerprint()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt_column": "text"}, "no column 'text': no 'text'; found translation, note .*prompt_column"),
        ({"target_column": "translation.de"}, "no column 'translation.de': no 'de'; found en, it .*target_column"),
        ({"target_column": "note.de"}, "no 'de'; found no columns within it"),
        ({"train": "training"}, "cannot be loaded.*training.*init_args"),
    ],
)
def test_missing_columns_and_splits(folder, streaming, kwargs, message):
    with pytest.raises(UserError, match=message):
        make(folder, streaming=streaming, **kwargs).load("train")


def test_a_dataset_that_is_not_there():
    with pytest.raises(UserError, match=r"'/no/such' \(train\) cannot be loaded: .*init_args\.path"):
        make("/no/such").prepare()
