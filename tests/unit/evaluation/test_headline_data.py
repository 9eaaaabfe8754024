"""The mixture that the LLM is pretrained on."""

import pyarrow.parquet as pq

from evaluation import headline_data


def rows(*pairs):
    return [{"id": prompt, "prompt": prompt, "target": target} for prompt, target in pairs]


def test_what_is_held_out_of_a_task_is_in_no_part_of_the_mixture(monkeypatch, tmp_path):
    further = rows(("one", "ein"), ("held out", "vorenthalten"))
    monkeypatch.setattr(headline_data, "FURTHER", ("de",))
    monkeypatch.setattr(headline_data, "rows_of", lambda source, split: further)
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
