"""Files that are written whole or not at all."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmslm.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file aside and rename it, so that nobody ever reads half of it.

    Raises:
        UserError: if the disk is full.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file aside and rename it; missing folders are made.

    Raises:
        UserError: if the disk is full.
    """
    with file_aside(path) as aside:
        aside.write_bytes(data)


@contextmanager
def file_aside(path: Path) -> Iterator[Path]:
    """Yield the path of a file beside `path` that takes its name when the block ends well, and is removed otherwise.

    Raises:
        UserError: if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield aside
        make_readable(aside)
        aside.replace(path)
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise_if_full(error, f"{path} was not written; free some space and run again")
        raise
    finally:
        aside.unlink(missing_ok=True)


def refuse_existing(path: Path, key: str) -> None:
    """Refuse to write over what somebody made before.

    Args:
        path: where a file is to be written.
        key: option that names it.

    Raises:
        UserError: if there is something.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists; give a file that does not ({key})")


def make_readable(path: Path) -> None:
    """Give a file the permissions of a new one: safetensors 0.8 keeps its files from all but their owner."""
    probe = path.with_name(f"{path.name}.mode")
    probe.touch()
    path.chmod(probe.stat().st_mode)
    probe.unlink()


def not_writable(error: OSError) -> str | None:
    """Say in words which path cannot be used and why: no permission, a file where a folder is to be; else None."""
    reasons = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
    if error.errno not in reasons or error.filename is None:
        return None
    return f"{error.filename} cannot be used: {error.strerror}"


def raise_if_full(error: BaseException, advice: str) -> None:
    """Turn the error of a full disk into a line for the user; any other passes.

    Raises:
        UserError: if the disk is full.
    """
    if is_disk_full(error):
        raise UserError(f"the disk is full: {advice}") from error


def is_disk_full(error: BaseException) -> bool:
    """Recognise a full disk, also where a library wraps the system's error in its own, or SQLite has its own words."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(words in str(error) for words in ("No space left on device", "database or disk is full"))
