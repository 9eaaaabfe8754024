"""The example of the documentation runs, and is as short as it promises."""

import json
import re
from pathlib import Path

import evaluation
from evaluation.record import read_record

PAGE = Path(evaluation.__file__).parents[1] / "docs" / "evaluation.md"


def test_a_system_of_your_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"say {index}", "target": f"say {index}"} for index in range(4)]
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1]
    lines = [line for line in code.splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 20
    exec(compile(code, str(PAGE), "exec"), {"__name__": "example"})
    record = read_record(Path("out/test.echo.record.json"))
    assert record["scores"]["exact_match"]["value"] == 100
    assert record["examples"]["effective"] == 4
