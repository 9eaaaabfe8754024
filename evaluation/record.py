"""Evaluation records: one JSON file a system and task, under the schema in record.schema.json."""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from llmslm.errors import UserError
from llmslm.writing import write_text

SCHEMA_VERSION = 4
"""2 added folder, cost and floor_s, 3 versus_slm, 4 decoder and each batch size's peak_memory_bytes, and left
cut references out of length; records of earlier versions are read as they are."""
SCHEMA = Path(__file__).with_name("record.schema.json")
SUFFIX = ".record.json"

Record = dict[str, Any]


def write_record(path: Path, record: Record) -> None:
    """Write a record, or nothing.

    Raises:
        UserError: if the disk is full.
        jsonschema.ValidationError: if the record does not follow the schema (a defect of the program).
    """
    _validator().validate(record)
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_record(path: Path) -> Record:
    """Read one record.

    Raises:
        UserError: if the file is no record, or one of a newer schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"there is no record {path}; expected a *{SUFFIX} file or a folder of them") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a record: {error}") from error
    return parse_record(text, str(path))


def parse_record(text: str, place: str) -> Record:
    """Read a record from its text.

    Args:
        text: JSON.
        place: where it was found, for errors.

    Raises:
        UserError: if it is no record, or one of a newer schema.
    """
    try:
        record = json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise UserError(f"{place} is not a record: {error}") from error
    version = record.get("schema_version") if isinstance(record, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"{place} has record schema {version}; this llmslm-eval reads up to {SCHEMA_VERSION}: "
            "install a newer llmslm"
        )
    problem = next(iter(_validator().iter_errors(record)), None)
    if problem is not None:
        raise UserError(f"{place} is not a record: {problem.json_path}: {problem.message[:200]}")
    return dict(record)


def find_records(paths: Iterable[str | Path]) -> list[Path]:
    """Resolve files and folders (searched through) to record files, in order and once each.

    Raises:
        UserError: if a folder holds none.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        inside = sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path} holds no *{SUFFIX} file; expected the --out folder of llmslm-eval compare")
        found |= dict.fromkeys(each.resolve() for each in inside)
    return list(found)


def _refuse(constant: str) -> None:
    """Refuse what Python reads and JSON does not know; scores that are no numbers are null in a record."""
    raise ValueError(f"{constant} is no number")


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
