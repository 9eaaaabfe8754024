"""The command line: quick help, no abbreviations, mistakes in one line."""

import errno
import subprocess
import sys

import pytest

from evaluation.cli import main


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom evaluation.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'datasets', 'evaluate', 'mlflow', 'matplotlib', 'transformers', 'numpy'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "leaderboard" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["compare", "--data", "x.jsonl", "--out", "y"],
            "no system was given; expected at least one of --llm",
        ),
        (
            ["compare", "--llm", "a", "--data", "nowhere.jsonl", "--out", "y"],
            "there is no file nowhere.jsonl",
        ),
        (["compare", "--llm", "a", "--data", "no-such-recipe", "--out", "y"], "no recipe 'no-such-recipe'"),
        (
            ["compare", "--llm", "a", "--task", "docstrings", "--split", "train", "--out", "y"],
            "--split train was given; a task says its split itself",
        ),
        (["leaderboard", "nowhere", "--out", "y"], "there is no record"),
        (["leaderboard", "--out", "y"], "expected either RECORDS or --from-mlflow EXPERIMENT"),
    ],
)
def test_mistakes_are_one_line(arguments, text, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("llmslm-eval: ")
    assert text in error
    assert error.count("\n") == 1


def test_a_folder_without_permission_is_one_line(monkeypatch, capsys):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "there/x")

    monkeypatch.setattr("evaluation.leaderboard.build", refused)
    with pytest.raises(SystemExit, match="1"):
        main(["leaderboard", "records", "--out", "there/x", "--no-mlflow"])
    problem = "there/x cannot be used: Permission denied"
    expected = f"llmslm-eval: {problem}; if it is where this command writes, give another folder (--out)\n"
    assert capsys.readouterr().err == expected


def test_abbreviations_and_bad_numbers_are_refused(capsys):
    for arguments in (
        ["leaderboard", "x", "--o", "y"],
        ["compare", "--data", "x", "--out", "y", "--limit", "0"],
        ["compare", "--data", "x", "--out", "y", "--speed-batch-sizes", "1", "biggest"],
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    error = capsys.readouterr().err
    assert "--limit: '0' was given; expected a whole number of at least 1" in error
    for out in (__file__, f"{__file__}/deeper"):
        with pytest.raises(SystemExit, match="2"):
            main(["leaderboard", "x", "--out", out])
        assert "expected a folder" in capsys.readouterr().err
    assert "--speed-batch-sizes: 'biggest' was given; expected a whole number" in error
    with pytest.raises(SystemExit, match="2"):
        main(["targets", "--colour"])
    assert "unrecognized arguments: --colour" in capsys.readouterr().err


def test_the_harness_says_which_package_it_needs():
    code = (
        "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_module('evaluation.harness', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.endswith("the package lm-eval is not installed; pip install 'llmslm[harness]'\n")
    assert "Traceback" not in done.stderr
