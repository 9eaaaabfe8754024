"""The prompts that the LLM labels, beside those that it was trained on."""

import pyarrow.parquet as pq
import pytest

from evaluation import headline_data, headline_prompts
from llmslm.errors import UserError


def rows(*pairs):
    return [{"id": prompt, "prompt": prompt, "target": target} for prompt, target in pairs]


@pytest.fixture
def prompts(monkeypatch, tmp_path):
    """Texts by file, made of a few packages."""
    others = {
        "trixie": rows(("other for all\nheld", "new"), ("out\nof it", "x")),
        "sid": rows(("seen", "one for others")),
    }
    monkeypatch.setattr(headline_prompts, "DebianSummary", lambda release, **_: release)
    monkeypatch.setattr(headline_prompts, "rows_of", lambda source, split: others[source] if split == "train" else [])
    parts = {
        "en_it/train": rows(("known", "noto"), ("one for none", "uno per nessuno")),
        "en_it/validation": rows(("seen", "visto")),
        "en_it/test": rows(("one for all", "uno per tutti")),
        "summary/train": rows(("new\nknown\none for all\n" + "long " * 200, "held"), ("also\nnew\nout", "brief")),
        "summary/validation": rows(("held out", "held")),
        "summary/test": rows(("out\nof it", "test")),
    }
    for name, part in parts.items():
        tag = headline_data.TAGS[name.partition("/")[0]]
        written = [headline_data.tagged(tag, row) for row in part]
        headline_data.write_rows(tmp_path / "data" / f"{name}.parquet", written)
    headline_prompts.main([f"--out={tmp_path}", "--data", str(tmp_path / "data")])
    files = {path.stem: pq.read_table(path).to_pylist() for path in tmp_path.glob("*.parquet")}
    assert all(len({row["id"] for row in part}) == len(part) for part in files.values())
    tasks = {"spliced": "en_it", "recombined": "summary"}
    tags = {name: headline_data.TAGS[tasks.get(name, name)] + ": " for name in files}
    assert all(row["prompt"].startswith(tags[name]) for name, part in files.items() for row in part)
    return {name: [row["prompt"].removeprefix(tags[name]) for row in part] for name, part in files.items()}


def test_data_of_before_there_were_tags_is_refused(tmp_path):
    for split in ("train", "validation", "test"):
        headline_data.write_rows(tmp_path / "data" / "en_it" / f"{split}.parquet", rows(("known", "noto")))
    with pytest.raises(UserError, match="do not begin with 'it: '"):
        headline_prompts.prepare(tmp_path / "prompts", tmp_path / "data")


def test_they_are_new_and_held_out_of_neither_task(prompts):
    assert prompts["en_it"] == ["new", "also", "brief", "other for all", "x", "one for others"]
    assert prompts["summary"] == ["other for all\nheld", "seen"]


def test_what_splicing_gives_is_not_held_out_either(prompts):
    # Not "one for all", which is in the translation's test split.
    assert set(prompts["spliced"]) == {"other for none", "other for others"}


def test_no_text_is_in_two_files_that_are_trained_on_together(prompts):
    assert "one for others" in prompts["en_it"]  # and can be spliced of two others
    assert not set(prompts["spliced"]) & set(prompts["en_it"])


def test_splices_begin_as_one_text_and_end_as_another():
    texts = ["a library for reading maps", "tools for games", "one of them", "all for one, one of all", "nothing here"]
    many = headline_prompts.splices(texts, 60)
    assert {"a library for games", "tools for reading maps"} <= set(many)
    assert not set(many) & set(texts)
    assert headline_prompts.splices(texts, 6) == headline_prompts.splices(texts, 6)
    assert len(headline_prompts.splices(texts, 2)) == 2


def test_recombined_texts_have_paragraphs_of_two_in_order():
    texts = ["a map\nwith roads\nand towns", "a game\nwith rules", "alone"]
    many = headline_prompts.recombined(texts, 60)
    assert {"a map\nwith rules", "a game\nand towns", "a map\nwith roads", "alone\nwith rules"} <= set(many)
    assert all(text.split("\n")[0] in ("a map", "a game", "alone") for text in many)
    assert headline_prompts.recombined(texts, 6) == headline_prompts.recombined(texts, 6)
    assert len(headline_prompts.recombined(texts, 2)) == 2


def test_what_recombining_gives_is_new(prompts):
    assert not set(prompts["recombined"]) & {*prompts["summary"], "out\nof it", "held out", "also\nnew\nout"}
