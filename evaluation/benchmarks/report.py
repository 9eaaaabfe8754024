"""How a benchmark ends."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmslm.provenance import provenance
from llmslm.writing import write_text


def report(record: Mapping[str, Any], out: Path | None) -> None:
    """Write a record with its provenance, if `out` names a file, and print it as the last line, one JSON object."""
    whole = {**record, "provenance": provenance()}
    if out is not None:
        write_text(out, json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole))
