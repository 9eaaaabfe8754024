"""MT-Bench answers for an outside judge: both turns of each question, in the files that FastChat's judge reads.

    llmslm-eval mt-bench --questions question.jsonl --llm DIR --llm-to-slm DIR --out model_answer

The questions are FastChat's `question.jsonl` (question_id, turns). The judge is not run here: give it the answers.
"""

import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.systems import EvaluatedSystem
from llmslm.errors import UserError

Question = dict[str, Any]


def read_questions(path: Path) -> list[Question]:
    """Read the questions.

    Raises:
        UserError: if the file is missing or empty, or a line is no question.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; expected FastChat's question.jsonl (--questions)")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
            questions.append({"id": question["question_id"], "turns": [str(turn) for turn in question["turns"]]})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: no question; expected question_id and turns ({error})") from error
    if not questions:
        raise UserError(f"{path} has no questions (--questions)")
    return questions


def write_answers(
    system: EvaluatedSystem,
    questions: Sequence[Question],
    out: Path,
    max_new_tokens: int,
    checkpoint: str | None = None,
) -> Path:
    """Answer the questions turn by turn, one file a system; what an earlier call answered is not asked again.

    A later turn is asked after the earlier ones with their answers, separated by empty lines: the systems know no
    roles.

    Args:
        system: the system.
        questions: as read.
        out: folder of the answers.
        max_new_tokens: token budget of an answer.
        checkpoint: content hash of the system, by which its earlier answers are known; None for one that has none.

    Returns:
        The file.

    Raises:
        UserError: if the file holds answers of other weights under the same name.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{system.name.replace('/', '-')}.jsonl"
    done = _answered(path, checkpoint)
    with path.open("a", encoding="utf-8") as lines:
        for question in tqdm([each for each in questions if each["id"] not in done], desc=system.name, delay=1):
            choice = {"index": 0, "turns": _answers(system, question["turns"], max_new_tokens)}
            answer = {"question_id": question["id"], "answer_id": uuid.uuid4().hex, "model_id": system.name}
            answer |= {"checkpoint": checkpoint}
            lines.write(json.dumps(answer | {"choices": [choice], "tstamp": time.time()}, ensure_ascii=False) + "\n")
            lines.flush()
    return path


def _answers(system: EvaluatedSystem, turns: Sequence[str], max_new_tokens: int) -> list[str]:
    answers: list[str] = []
    conversation: list[str] = []
    for turn in turns:
        conversation.append(turn)
        answers.append(system.generate(["\n\n".join(conversation)], max_new_tokens=max_new_tokens)[0].text)
        conversation.append(answers[-1])
    return answers


def _answered(path: Path, checkpoint: str | None) -> set[Any]:
    """Find what is answered, and cut off a last line that a killed call left half-written."""
    if not path.is_file():
        return set()
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    answers = [json.loads(line) for line in whole.split("\n") if line]
    if any(answer.get("checkpoint") != checkpoint for answer in answers):
        raise UserError(f"{path} holds answers of other weights; remove it, or give another folder (--out)")
    return {answer["question_id"] for answer in answers}
