"""The benchmark of training speed: its steps are its own, and the other trainer sees the same tokens."""

import argparse
import json
from pathlib import Path

import pytest
from datasets import Dataset

from evaluation.benchmarks import training_speed
from evaluation.benchmarks.report import mistakes_in_one_line
from llmslm.errors import UserError
from tests.unit import toy


def rows_of(capsys):
    return [json.loads(line)["rows"] for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]


def test_an_overlay_does_not_change_the_number_of_steps(workdir, capsys):
    """It did: the overlay of a T5 says how long it is to be trained."""
    recipe = toy.write_recipe(workdir)
    Path("overlay.yaml").write_text("trainer: {max_steps: 4000}\n")
    training_speed.main(["--config", recipe, "--steps", "20", "--", "--config=overlay.yaml", "--model.system=slm"])
    ((row,),) = rows_of(capsys)
    assert (row["arm"], row["steps"]) == ("llmslm", 20)
    assert row["tokens_per_s"] > row["target_tokens_per_s"] > 0


def test_rows_are_drawn_with_their_lengths():
    rows = Dataset.from_dict({"input_prompt_ids": [[1] * n for n in range(9)], "target_ids": [[2]] * 9})
    some = training_speed.drawn(rows, 4)
    assert some["length"][:] == [len(row["input_prompt_ids"]) + 1 for row in some]
    assert len(set(some["length"])) == 4
    assert len(training_speed.drawn(rows, 40)) == 9


def test_the_other_trainer_beside_it(workdir, capsys):
    recipe = toy.write_recipe(workdir)
    training_speed.main(["--config", recipe, "--steps", "20", "--peer", "4", "8", "--", "--model.system=llm"])
    rows = rows_of(capsys)[-1]
    assert [(row["arm"], row.get("batch_size")) for row in rows[1:]] == [("Seq2SeqTrainer", 4), ("Seq2SeqTrainer", 8)]
    assert all(row["tokens_per_s"] > 0 and row["speedup_of_llmslm"] > 0 for row in rows[1:])


def test_mistakes_are_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        training_speed.main(["--config", "quickstart", "--steps", "9"])
    assert "--steps 9 was given; expected 10 or more" in capsys.readouterr().err
    for error in (UserError("no recipe"), argparse.ArgumentError(None, "no\n  recipe")):
        with pytest.raises(SystemExit, match=r"^error: no recipe$"), mistakes_in_one_line():
            raise error
