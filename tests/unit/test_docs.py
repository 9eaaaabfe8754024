"""The example of docs/extending.md is as short as it promises, trains from the command line and is found again."""

import re
from pathlib import Path

import llmslm
from llmslm.cli import main
from llmslm.system import System
from tests.unit.toy import write_recipe

PAGE = Path(llmslm.__file__).parents[1] / "docs" / "extending.md"


def test_a_projector_of_your_own(workdir, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1]
    assert len(code.splitlines()) < 30
    Path("low_rank.py").write_text(code)
    monkeypatch.syspath_prepend(workdir)
    recipe = write_recipe(workdir, max_steps=1)
    main(["fit", "--config", recipe, "--model.system", "llm"])
    command = re.search(r"llmslm (fit .*)", PAGE.read_text())[1].replace("quickstart", recipe)
    main(command.split())
    system = System.load("runs/toy/llm_to_slm")
    assert type(system.model.projector).__name__ == "LowRankProjector"
    assert system.model.config.projector == {"class_path": "low_rank.LowRankProjector", "init_args": {"rank": 32}}
    assert len(system.generate(["say alpha 1"], max_new_tokens=2)) == 1
