"""The mixture that the LLM is pretrained on, and the prompts that it only labels."""

import pyarrow.parquet as pq

from evaluation import headline_data


def rows(*pairs):
    return [{"id": prompt, "prompt": prompt, "target": target} for prompt, target in pairs]


def test_what_is_held_out_of_a_task_is_in_no_part_of_the_mixture(monkeypatch, tmp_path):
    further = rows(("one", "ein"), ("held out", "vorenthalten"))
    monkeypatch.setattr(headline_data, "FURTHER", ("de",))
    monkeypatch.setattr(headline_data, "_rows", lambda source, split: further)
    translation = {"train": rows(("one", "uno")), "validation": rows(("held out", "escluso")), "test": rows(("a", "b"))}
    summary = {"train": rows(("long", "short"), ("text", "b")), "validation": [], "test": []}
    found = headline_data.mixture(translation, summary)
    assert found == [
        {"prompt": "summary: long", "target": "short"},
        {"prompt": "de: one", "target": "ein"},
        {"prompt": "en: uno", "target": "one"},
        {"prompt": "it: one", "target": "uno"},
    ]
    assert headline_data.write_rows(tmp_path / "folder" / "train.parquet", found) == 4
    assert pq.read_table(tmp_path / "folder" / "train.parquet").to_pylist() == found


def test_further_prompts_are_new_and_held_out_of_neither_task(monkeypatch, tmp_path):
    others = {"trixie": rows(("other\nheld", "new")), "sid": rows(("seen", "latest"))}
    monkeypatch.setattr(headline_data, "DebianSummary", lambda release, **_: release)
    monkeypatch.setattr(headline_data, "_rows", lambda source, split: others[source] if split == "train" else [])
    long, data = "long " * 200, tmp_path / "data"
    parts = {
        "en_it/train": rows(("known", "noto")),
        "en_it/validation": rows(("seen", "visto")),
        "en_it/test": rows(("tested", "provato")),
        "summary/train": rows((f"new\nknown\ntested\n{long}", "held"), ("also\nnew\nout", "brief")),
        "summary/validation": rows(("held out", "held")),
        "summary/test": rows(("out\nof it", "test")),
    }
    for name, part in parts.items():
        headline_data.write_rows(data / f"{name}.parquet", part)
    headline_data.main([f"--out={tmp_path}", "--beyond", str(data)])
    found = pq.read_table(tmp_path / "train.parquet").to_pylist()
    assert [row["prompt"] for row in found] == ["new", "also", "brief", "other", "latest"]
    assert len({row["id"] for row in found}) == 5
