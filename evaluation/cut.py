"""A prepared folder of Parquet files, cut to a few rows each: data to rehearse a series on.

python -m evaluation.cut --of runs/headline/data --rows 200 --out small
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmslm.errors import UserError
from llmslm.writing import file_aside


def cut(of: Path, out: Path, rows: int, longest: int) -> dict[str, int]:
    """Write the folder's files with at most `rows` rows each, spread over the file; return their numbers by file.

    Args:
        of: folder of Parquet files, also in folders.
        out: the same files are written here.
        rows: of a file.
        longest: characters of a text; rows with longer ones are left out.

    Raises:
        UserError: if there are no such files.
    """
    paths = sorted(of.rglob("*.parquet"))
    if not paths:
        raise UserError(
            f"there are no Parquet files in {of}; run make headline-data first, or give another folder (--of)"
        )
    sizes = {}
    for path in paths:
        table = pq.read_table(path)
        for column in table.column_names:
            table = table.filter(pc.less_equal(pc.utf8_length(table[column]), longest))
        table = table.take(list(range(0, len(table), -(-len(table) // rows) or 1)))
        name = path.relative_to(of)
        with file_aside(out / name) as aside:
            pq.write_table(table, aside)
        sizes[name.as_posix()] = len(table)
    return sizes


def main(args: Sequence[str] | None = None) -> None:
    """Cut from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rows", type=int, default=200, help="of a file, at most (default: 200)")
    parser.add_argument("--longest", type=int, default=200, help="characters of a text, at most (default: 200)")
    options = parser.parse_args(args)
    try:
        sizes = cut(options.of, options.out, options.rows, options.longest)
    except UserError as error:
        sys.exit(str(error))
    for name, size in sizes.items():
        print(f"{options.out / name}: {size} rows")


if __name__ == "__main__":
    main()
