"""The list of targets is sound, and the command judges it."""

import json

import pytest

from evaluation import targets as module
from evaluation.cli import main
from evaluation.targets import FILE, TOPICS, Target, all_met, read_origin, read_targets, record_measurement, table
from llmslm.errors import UserError


def test_the_list_is_sound():
    targets = read_targets()
    assert len({target.id for target in targets}) == len(targets)
    assert {target.topic for target in targets} == set(TOPICS)
    for target in targets:
        if target.measured is None:
            assert (target.met, target.commit, target.command, target.date) == (None,) * 4, target.id
        else:
            assert target.met is target.judge(target.measured), target.id
            assert target.commit, target.id
            assert target.command, target.id
            assert target.hardware, target.id
            assert target.date, target.id


def test_a_bar_holds_in_its_direction():
    low, high = (Target("a", "decode", "", 1.0, sign, "s") for sign in ("<=", ">="))
    assert (low.judge(1.0), low.judge(1.1)) == (True, False)
    assert (high.judge(1.0), high.judge(0.9)) == (True, False)


def test_a_measurement_is_written_with_where_it_comes_from(tmp_path, monkeypatch, capsys):
    path = tmp_path / "targets.json"
    path.write_text(FILE.read_text())
    target = record_measurement("score-10000", 31.5, "python -m x", path=path)
    assert target.met is False
    assert target.hardware
    assert target in read_targets(path)
    assert len(json.loads(path.read_text())) == len(read_targets())
    assert "| ≤ 30 s | 31.5 s | **no** |" in table([target])
    with pytest.raises(UserError, match="there is no target 'x'"):
        record_measurement("x", 1, "", path=path)


def test_a_measurement_is_of_its_records_commit(monkeypatch, capsys):
    written = {}

    def record(name, value, command, **more):
        written.update(more, command=command)
        return Target(name, "decode", "", 1.0, "<=", "s", value)

    monkeypatch.setattr(module, "record_measurement", record)
    records = FILE.parent / "records"
    decode, scaling = records / "decode/h200-host-gpt2.json", records / "training/h200-scaling-1b.json"
    main(["targets", "--measured", "a", "1", "--record", str(decode)])
    said = json.loads(decode.read_text())
    assert written == {key: said[key] for key in ("command", "commit", "hardware")}
    main(["targets", "--measured", "a", "1", "--record", str(decode), str(scaling), "--by", "make figures"])
    commits = [said["commit"], json.loads(scaling.read_text())["provenance"]["commit"]]
    expected = {"command": "make figures", "commit": ", ".join(commits), "hardware": "NVIDIA H200, 2 x NVIDIA H200"}
    assert written == expected


def test_a_record_without_a_commit_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"command": "a", "commit": None, "hardware": "b"}))
    with pytest.raises(UserError, match=r"a\.json names no commit; measure in a checkout"):
        read_origin([path])


def test_every_record_says_where_it_comes_from():
    apart = {"differences.json", "labels.json", "stages.json"}  # of the headline: parts of the others
    paths = [path for path in (FILE.parent / "records").rglob("*.json") if path.name not in apart]
    assert all(read_origin([path])["commit"] for path in paths)


def test_the_command_fails_while_a_target_is_open(tmp_path, monkeypatch, capsys):
    met = Target("a", "decode", "all well", 1.0, "<=", "s", 0.5, "c", "d", "h", "2026-01-01", True)
    monkeypatch.setattr(module, "read_targets", lambda topic: [met])
    main(["targets"])
    assert "1 met, 0 missed, 0 not measured" in capsys.readouterr().out
    monkeypatch.setattr(module, "read_targets", lambda topic: [met, Target("b", "decode", "", 1.0, "<=", "s")])
    with pytest.raises(SystemExit, match="1"):
        main(["targets"])
    assert not all_met([Target("b", "decode", "", 1.0, "<=", "s")])


def test_mistakes_are_one_line(capsys):
    for arguments, text in (
        (["targets", "--topic", "cooking"], "unknown topic 'cooking'; expected one of method, decode"),
        (["targets", "--measured", "gpt2-tpot", "fast", "--by", "x"], "'fast' is no number"),
        (
            ["targets", "--measured", "gpt2-tpot", "1"],
            "needs its record (--record), or the command that made it (--by)",
        ),
        (["targets", "--measured", "gpt2-tpot", "1", "--record", "no.json"], "no.json cannot be read: No such file"),
        (
            ["targets", "--measured", "gpt2-tpot", "1", "--record", str(FILE)],
            "targets.json is no record: expected JSON",
        ),
    ):
        with pytest.raises(SystemExit, match="1"):
            main(arguments)
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
