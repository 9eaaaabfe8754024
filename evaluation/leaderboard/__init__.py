"""The leaderboard: a table, a page and plots from evaluation records."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from evaluation.leaderboard.rows import Row, leaderboard_rows
from evaluation.record import Record, find_records, read_record
from llmslm.writing import write_bytes, write_text


@dataclass(frozen=True)
class Leaderboard:
    """What was built."""

    records: list[Record]
    """As read; `predictions` is a path from here."""
    rows: list[Row]
    markdown: str
    files: dict[str, Path]
    """By what they are: markdown, csv, page, plot, break-even."""
    plots: dict[tuple[str, str], list[Path]]
    """Those of the files that are plots, by task and hardware."""


def build(paths: Iterable[str | Path], out: Path) -> Leaderboard:
    """Read records and write leaderboard.md, leaderboard.csv, leaderboard.html and the plots.

    Args:
        paths: record files, or folders that are searched through.
        out: folder to write to.

    Raises:
        UserError: if a record cannot be read, or there is none.
    """
    return publish([_read(path) for path in find_records(paths)], out)


def publish(records: list[Record], out: Path) -> Leaderboard:
    """Write the same of records at hand, whose `predictions` are paths from here."""
    from evaluation.leaderboard.page import page, sections
    from evaluation.leaderboard.table import csv_table, markdown_table

    rows = leaderboard_rows(records)
    parts = sections(rows)
    markdown = markdown_table(rows)  # after the samples were read: rows whose predictions changed are marked
    files = {name: out / f"leaderboard.{end}" for name, end in (("markdown", "md"), ("csv", "csv"))}
    write_text(files["markdown"], markdown + "\n")
    write_text(files["csv"], csv_table(rows))
    files["page"] = out / "leaderboard.html"
    write_text(files["page"], page(rows, parts))
    plots: dict[tuple[str, str], list[Path]] = {}
    for part in parts:
        for name, data in part.images.items():
            key = name if len(parts) == 1 else f"{name} {part.task}, {part.hardware}"
            files[key] = out / f"{part.slug}.{name}.png"
            write_bytes(files[key], data)
            plots.setdefault((part.task, part.hardware), []).append(files[key])
    return Leaderboard(records, rows, markdown, files, plots)


def _read(path: Path) -> Record:
    record = read_record(path)
    return record | {"predictions": str(path.parent / record["predictions"])}
