"""A checkpoint folder takes another one's name in two steps; a kill between them does not lose the old one."""

import pytest

from llmslm.resume import aside_of, checksums, newest, put, remove_leftovers, seal


class Killed(BaseException):
    pass


def write(path, text):
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_text(text)
    seal(path, checksums(path, "__*"))


def content(path):
    return (path / "__0_0.distcp").read_text()


def test_a_kill_between_the_two_renames(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    for text in ("first", "second"):
        write(aside_of(path), text)
        put(aside_of(path), path)
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]
    aside, rename = aside_of(path), type(path).rename

    def killed(self, target):
        if self == aside:
            raise Killed
        return rename(self, target)

    for text in ("third", "fourth"):  # and once more, by the run that went on with what was left
        write(aside, text)
        with monkeypatch.context() as patch:
            patch.setattr(type(path), "rename", killed)
            with pytest.raises(Killed):
                put(aside, path)
        remove_leftovers(tmp_path)
        assert content(newest(tmp_path)) == "second"
    write(aside, "fifth")
    put(aside, path)
    assert content(newest(tmp_path)) == "fifth"
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_kill_after_the_renames_leaves_is_removed(tmp_path):
    write(tmp_path / "last.ckpt", "new")
    write(tmp_path / ".last.ckpt.old", "old")
    write(tmp_path / ".resume-7.ckpt.part", "half")
    assert content(newest(tmp_path)) == "new"
    remove_leftovers(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]
