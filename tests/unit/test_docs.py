"""The pages' examples run, and their links lead somewhere."""

import re
from pathlib import Path

import llmslm
from llmslm.cli import main
from llmslm.system import System
from tests.unit.toy import write_files, write_recipe

ROOT = Path(llmslm.__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"


def test_a_projector_of_your_own(workdir, monkeypatch):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1]
    assert len(code.splitlines()) < 30
    Path("low_rank.py").write_text(code)
    monkeypatch.syspath_prepend(workdir)
    recipe = write_recipe(workdir, max_steps=1)
    main(["fit", "--config", recipe, "--model.system", "llm"])
    command = re.search(r"llmslm (fit .*)", PAGE.read_text().replace("\\\n", ""))[1]
    main(command.replace("--config quickstart", f"--config {recipe}").replace("runs/quickstart", "runs/toy").split())
    system = System.load("runs/toy/low_rank")
    assert type(system.model.projector).__name__ == "LowRankProjector"
    assert system.model.config.projector == {"class_path": "low_rank.LowRankProjector", "init_args": {"rank": 32}}
    assert len(system.generate(["say alpha 1"], max_new_tokens=2)) == 1


def test_training_without_the_command_line(workdir, capsys):
    write_files(workdir)
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.S)[1]
    code = code.replace("max_steps=2,", "max_steps=2, accelerator='cpu', logger=False, enable_progress_bar=False,")
    exec(compile(code, "training.md", "exec"), {"__name__": "example"})
    assert System.load("my_run").name == "slm"


def test_links_lead_somewhere():
    pages = [
        page
        for part in (".", "docs", "docs/results", "recipes", "recipes/*", "evaluation/*")
        for page in ROOT.glob(f"{part}/*.md")
    ]
    assert len(pages) > 10
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            file, _, heading = link.partition("#")
            if "://" in link:
                continue
            target = page.parent / file if file else page
            assert target.exists(), f"{page}: {link}"
            headings = re.findall(r"^#+ (.+)", target.read_text(), re.M) if heading else []
            names = {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings}
            assert not heading or heading in names, f"{page}: {link}"
