"""A series of stages: each once, in order, gone on with after a stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation import series
from llmslm.errors import UserError

SERIES = """
for: {task: [a, b]}
stages:
  first: {append: first}
  "{task}/second": {needs: first, append: "{task}"}
  last: {needs: a/second b/second, alone: last}
"""
PROGRAM = """
import sys
folder, word = sys.argv[1:3]
open("order.txt", "a").write(word + " ")
open(folder + "/found.txt", "a").write("x")
sys.exit(("broken: cannot" if "fail" in sys.argv else None))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A series of stages that append a word to order.txt."""
    (tmp_path / "toy.yaml").write_text(SERIES)
    (tmp_path / "append_word.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(series, "FOLDER", tmp_path)
    monkeypatch.setattr(series, "KINDS", dict.fromkeys(("append", "alone"), ("append_word", "{folder}")))
    monkeypatch.setattr(series, "ALONE", ("alone",))
    return tmp_path


def order(folder):
    words = (folder / "order.txt").read_text().split()
    (folder / "order.txt").unlink()
    return words


def test_stages_run_once_and_in_order(here, capsys):
    series.run("toy", jobs=2)
    words = order(here)
    assert (words[0], sorted(words[1:3]), words[3]) == ("first", ["a", "b"], "last")
    series.run("toy")
    assert not (here / "order.txt").exists()
    assert "a/second: complete already" in capsys.readouterr().out


def test_one_stage_with_what_it_needs(here):
    series.run("toy", only=["b/*"])
    assert order(here) == ["first", "b"]


def test_a_changed_stage_starts_from_nothing_and_so_does_what_needs_it(here):
    series.run("toy")
    order(here)
    (here / "toy.yaml").write_text(SERIES.replace('append: "{task}"', 'append: "{task}!"'))
    series.run("toy", only=["a/*"])
    assert order(here) == ["a!"]
    assert (here / "runs/toy/a/second/found.txt").read_text() == "x"
    series.run("toy")
    assert order(here) == ["b!", "last"]


def test_a_failed_stage_is_named_and_gone_on_with(here):
    (here / "toy.yaml").write_text(SERIES.replace("append: first", "append: first fail"))
    with pytest.raises(UserError, match=r"stage first ended with status 1 \(runs/toy/first/log.txt\): broken: cannot"):
        series.run("toy")
    assert order(here) == ["first"]
    (here / "append_word.py").write_text(PROGRAM.replace("fail", "never"))
    series.run("toy", only=["first"])
    assert (here / "runs/toy/first/found.txt").read_text() == "xx"  # its folder was kept: a training goes on there


def test_what_does_not_need_a_failed_stage_is_run(here):
    (here / "toy.yaml").write_text(
        SERIES.replace('append: "{task}"', 'append: "{task} fail"') + "  other: {needs: first, append: x}\n"
    )
    with pytest.raises(UserError, match=r"^stage a/second ended .*; stage b/second ended .*; not begun: last$"):
        series.run("toy")
    assert order(here) == ["first", "a", "b", "x"]


def test_wrong_arguments_end_the_series_and_leave_what_was_there(here):
    series.run("toy")
    order(here)
    refused = 'print("toy: error: unrecognized arguments: fail") or 2'
    (here / "append_word.py").write_text(PROGRAM.replace('"broken: cannot"', refused))
    (here / "toy.yaml").write_text(SERIES.replace('append: "{task}"', 'append: "{task} fail"'))
    with pytest.raises(UserError, match=r"^stage a/second was given wrong arguments: toy: .*: fail; nothing further"):
        series.run("toy")
    assert order(here) == ["a"]
    (here / "toy.yaml").write_text(SERIES)
    series.run("toy")  # all of it is complete still
    assert not (here / "order.txt").exists()
    assert not list(here.rglob(f"*{series.BEFORE}"))


def test_a_changed_stage_that_fails_is_gone_on_with(here):
    series.run("toy")
    (here / "toy.yaml").write_text(SERIES.replace("append: first", "append: first fail"))
    for runs in (1, 2):
        with pytest.raises(UserError, match="stage first ended with status 1"):
            series.run("toy")
        assert (here / "runs/toy/first/found.txt").read_text() == "x" * runs


def test_stages_are_listed_with_their_state(here):
    (here / "toy.yaml").write_text(SERIES.replace('append: "{task}"', 'append: "{task} fail"'))
    with pytest.raises(UserError):
        series.run("toy", only=["a/second"])
    assert [line.split()[1] for line in series.list_stages("toy").splitlines()] == ["complete", "begun", "not", "not"]
    (here / "toy.yaml").write_text(SERIES)
    order(here)
    words = [line.split()[1:3] for line in series.list_stages("toy", only=["a/*"]).splitlines()]
    assert [word for word, _ in words] == ["complete", "changed"]
    assert not (here / "order.txt").exists()


def test_stages_that_run_at_a_time_have_a_gpu_each(here, monkeypatch):
    (here / "append_word.py").write_text(
        PROGRAM.replace("word + ", "__import__('os').environ.get('CUDA_VISIBLE_DEVICES', '-') + ")
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    series.run("toy", jobs=2)
    words = order(here)
    assert len(words) == 4
    assert set(words[1:3]) == {"4", "7"}  # side by side
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert series._places(2).get() == {}


def test_a_rehearsal_runs_all_stages_with_more_arguments_in_a_folder_of_its_own(here):
    (here / "small.yaml").write_text(
        "like: toy\nstages: {first: {alone: one}}\nmore: {append *: '{folder}', append b/*: --tiny}\n"
    )
    stages = series.load_series("small")
    assert (stages["first"].kind, stages["first"].arguments) == ("alone", ("one",))
    assert stages["a/second"].arguments == ("a", "runs/toy/a/second")
    assert stages["b/second"].arguments == ("b", "runs/toy/b/second", "--tiny")
    series.run("toy")
    order(here)
    series.run("small", jobs=2)
    assert not (here / "order.txt").exists()
    assert sorted(order(here / "runs/small")) == ["a", "b", "last", "one"]
    assert "complete" in series.list_stages("small", only=["last"])
    assert "not begun" not in series.list_stages("toy") + series.list_stages("small")
    series.run("toy")  # and what it rehearses is complete still
    assert not (here / "order.txt").exists()


def test_mistakes_in_names(here):
    with pytest.raises(UserError, match=r"no series 'x'; expected one of toy \(--series\)"):
        series.run("x")
    with pytest.raises(UserError, match=r"no stage 'c/\*'; expected one of first, a/second.*\(--only\)"):
        series.run("toy", only=["c/*"])
    (here / "toy.yaml").write_text("stages: {one: {needs: two, append: x}}")
    with pytest.raises(UserError, match=r"stage 'one' needs one of append, alone, and stages above it"):
        series.run("toy")


def test_nothing_runs_beside_what_is_timed(here):
    stages = series.load_series("toy").values()
    timed, other = (next(stage for stage in stages if stage.kind == kind) for kind in ("alone", "append"))
    everything = {stage.name for stage in stages}
    assert series._next([timed], everything, [other], 2) is None
    assert series._next([other], everything, [timed], 2) is None
    assert series._next([timed, other], everything, [], 2) is timed


def test_seeds_share_a_row_of_the_leaderboard(here, monkeypatch):
    monkeypatch.setattr(series, "KINDS", {"append": ("module", "{label}", "{series}")})
    stage = series.Stage("a/b_labels_3", "append", (), (), here / "a/b_labels_3")
    assert stage.command() == ["-m", "module", "a-b_labels", str(here)]
    assert sys.executable not in stage.command()


def started(here):
    """Start the series in a process of its own, and wait for its first stage."""
    path = os.pathsep.join([str(here), str(Path(series.__file__).parent.parent)])
    program = (
        "from evaluation import series; from pathlib import Path; series.FOLDER = Path(); series.TICK_S = 0.1; "
        "series.KINDS = dict.fromkeys(('append', 'alone'), ('append_word', '{folder}')); series.run('toy')"
    )
    environment = os.environ | {"PYTHONPATH": path}
    run = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
    while not (here / "runs/toy/first/log.txt").is_file():
        time.sleep(0.1)
    return run


def test_a_stage_that_outlives_a_killed_series_is_not_begun_beside_it(here):
    stage = "import os, time\nwhile not os.path.exists('go'):\n    time.sleep(0.05)\n"
    (here / "append_word.py").write_text(stage)
    first = here / "runs/toy/first"
    run = started(here)
    while not (seconds := series.read_state(first).get("seconds")):  # they are counted while it runs
        time.sleep(0.05)
    run.kill()
    run.wait()
    with pytest.raises(UserError, match=r"^stage first is run by another process still; wait for it, or end it; not"):
        series.run("toy")
    (here / "go").touch()
    while True:  # it ends by itself
        try:
            series.run("toy")
        except UserError:
            time.sleep(0.1)
        else:
            break
    left = json.loads((first / "stage.json").read_text())
    assert left["complete"]
    assert left["seconds"] >= seconds


def test_told_to_stop_it_tells_its_stages(here):
    stage = "import signal, time\ntold = []\nsignal.signal(signal.SIGTERM, lambda *_: told.append(1))\n"
    stage += "while not told:\n    time.sleep(0.05)\ntime.sleep(0.5)\nprint('told', len(told), flush=True)\nexit(75)\n"
    (here / "append_word.py").write_text(stage)
    run = started(here)
    state = here / "runs/toy/first/stage.json"
    time.sleep(0.5)
    for _ in range(3):  # as timeout does, to its child and to the group
        os.killpg(run.pid, signal.SIGTERM)
        time.sleep(0.1)
    assert run.wait(timeout=20) == 128 + signal.SIGTERM
    assert (state.parent / "log.txt").read_text() == "told 1\n"
    left = json.loads(state.read_text())
    assert not left["complete"]
    assert 0.1 < left["seconds"] < 50
