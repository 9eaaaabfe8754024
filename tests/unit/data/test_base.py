"""What built sources share: a cache that is complete or not there."""

import pytest

from llmslm.data.sources.base import BuiltSource, drop_seen, split_by_group, take
from llmslm.errors import UserError


class Built(BuiltSource):
    name = "built"
    examples = ({"id": "a", "prompt": "one", "target": "uno"},)

    def key(self):
        return {"version": 1}

    def build(self):
        return {"train": list(self.examples), "test": []}


def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.rename", full)
    with pytest.raises(UserError, match=r"built data cannot be written to .*No space left.*cache_dir"):
        Built(str(tmp_path)).prepare()
    assert not list(tmp_path.iterdir())


def test_two_builders_at_once_leave_one_result(tmp_path, monkeypatch):
    quicker, slower = Built(str(tmp_path)), Built(str(tmp_path))
    monkeypatch.setattr(slower, "build", lambda: (quicker.prepare(), Built.build(slower))[1])
    slower.prepare()
    assert [path.name for path in tmp_path.iterdir()] == [slower.folder.name]
    assert slower.load("train")["target"][:] == ["uno"]


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    class Other(Built):
        examples = ({"id": "a", "prompt": "one", "target": "un"},)

    same = Built(str(tmp_path / "b")).fingerprint()
    assert Built(str(tmp_path / "a")).fingerprint() == same
    assert Other(str(tmp_path / "c")).fingerprint() != same


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_empty_split_is_named(tmp_path, split):
    with pytest.raises(UserError, match=f"the {split} split of built has no rows"):
        Built(str(tmp_path)).load(split)


def test_groups_are_dealt_out_in_proportion():
    groups = [split_by_group(str(i), 3) for i in range(10_000)]
    assert groups == [split_by_group(str(i), 3) for i in range(10_000)]
    for split in ("validation", "test"):
        assert 250 < groups.count(split) < 350


def test_a_sample_does_not_depend_on_the_order():
    examples = [{"id": str(i), "prompt": f"p{i}", "target": f"t{i % 7}"} for i in range(100)]
    chosen = take(examples, 10)
    assert {e["id"] for e in take(examples[::-1], 10)} == {e["id"] for e in chosen}
    assert [e for e in examples if e in chosen] == chosen
    assert take(examples, None) == take(examples, 100) == examples
    assert {e["target"] for e in drop_seen(examples, examples[:5])} == {"t5", "t6"}
