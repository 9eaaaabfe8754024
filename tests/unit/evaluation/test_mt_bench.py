"""Answers in FastChat's format: both turns, the second after the first, each question once."""

import json

import pytest

from evaluation.cli import main
from evaluation.mt_bench import read_questions, write_answers
from llmslm.errors import UserError

QUESTIONS = [{"question_id": 80 + index, "category": "x", "turns": [f"say {index}", "again"]} for index in range(3)]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


def test_both_turns_are_answered(questions, dummy, tmp_path):
    path = write_answers(dummy("llm", 1.0), read_questions(questions), tmp_path / "model_answer", 16)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.name == "llm.jsonl"
    assert [line["question_id"] for line in lines] == [80, 81, 82]
    assert lines[1]["choices"] == [{"index": 0, "turns": ["say 1", "say 1 say 1 again"]}]
    assert set(lines[0]) == {"question_id", "answer_id", "model_id", "checkpoint", "choices", "tstamp"}


def test_goes_on_after_a_kill(questions, dummy, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_answers(dummy("llm", 1.0, fails_after=3), read_questions(questions), tmp_path, 16)
    path = tmp_path / "llm.jsonl"
    with path.open("a") as lines:
        lines.write('{"question_id": 81, "ans')
    second = dummy("llm", 1.0)
    write_answers(second, read_questions(questions), tmp_path, 16)
    assert [json.loads(line)["question_id"] for line in path.read_text().splitlines()] == [80, 81, 82]
    assert second.calls == 4


def test_answers_of_other_weights_are_not_taken_over(questions, dummy, tmp_path):
    write_answers(dummy("llm", 1.0), read_questions(questions), tmp_path, 16, "one")
    again = dummy("llm", 1.0)
    write_answers(again, read_questions(questions), tmp_path, 16, "one")
    assert again.calls == 0
    with pytest.raises(UserError, match=r"llm\.jsonl holds answers of other weights; remove it, or give another"):
        write_answers(again, read_questions(questions), tmp_path, 16, "two")


def test_mistakes_are_named(tmp_path, capsys):
    path = tmp_path / "question.jsonl"
    with pytest.raises(UserError, match=r"there is no file .*question\.jsonl; expected FastChat's"):
        read_questions(path)
    path.write_text("")
    with pytest.raises(UserError, match="has no questions"):
        read_questions(path)
    path.write_text('{"question_id": 1, "turns": ["a"]}\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match="line 2: no question; expected question_id and turns"):
        read_questions(path)
    with pytest.raises(SystemExit, match="1"):
        main(["mt-bench", "--questions", str(path), "--out", str(tmp_path)])
    assert "no system was given" in capsys.readouterr().err
