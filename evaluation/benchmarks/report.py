"""How a benchmark ends."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmslm.errors import UserError
from llmslm.provenance import provenance
from llmslm.writing import write_text


def report(record: Mapping[str, Any], out: Path | None) -> None:
    """Write a record with its provenance, if `out` names a file, and print it as the last line, one JSON object."""
    whole = {**record, "provenance": provenance()}
    if out is not None:
        write_text(out, json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """End the process with status 1 and one line where the recipe or an option is wrong."""
    try:
        yield
    except (UserError, argparse.ArgumentError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
