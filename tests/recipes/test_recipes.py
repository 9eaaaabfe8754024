"""Every recipe runs through the real command line, for one step of each system, on stand-ins of its models and data."""

import json

import pytest
import yaml

from llmslm.cli import main
from llmslm.recipe import find_recipe, recipe_names
from tests.recipes.conftest import LLAMA, T5, make_dataset, make_debian_lists, make_model

RECIPES = [name for name in recipe_names() if "/" not in name]  # those of a series: test_headline.py
OVERLAYS = [name for name in recipe_names() if name.startswith("hardware/")]
TINY = {"t5": T5 | {"model_type": "t5"}, "llama": LLAMA | {"model_type": "llama"}}


def overrides(recipe, folder):
    """Arguments that put stand-ins in the place of what the recipe names, and nothing else."""
    values = yaml.safe_load(find_recipe(recipe).read_text())
    args = []
    for key in ("llm", "slm"):
        if source := values["model"][key].get("source"):
            args.append(f"--model.{key}.source={make_model(source, folder)}")
        else:
            tiny = TINY[values["model"][key]["config"]["model_type"]]
            args.append(f"--model.{key}.config={json.dumps(tiny)}")
    source = values["data"]["source"]
    if source["class_path"].endswith("HubDataset"):
        args.append(f"--data.source.init_args.path={make_dataset(source['init_args'], folder)}")
        args.append("--data.source.init_args.config_name=null")
    elif "Debian" in source["class_path"]:
        make_debian_lists(folder / "cache", "it")
    if "tokenizer" in values["data"]:
        args.append("--data.tokenizer.vocab_size=300")
    step = ["--trainer.max_steps=1", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=1"]
    step += ["--trainer.val_check_interval=1", "--trainer.check_val_every_n_epoch=null"]
    return [*args, *step, "--data.micro_batch_size=2", "--model.bleu_examples=1", "--trainer.enable_progress_bar=false"]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "quickstart"])
def test_recipe_trains_saves_and_generates(recipe, stand_ins, capsys):
    args = overrides(recipe, stand_ins)
    for system in ("llm", "llm_to_slm"):
        main(["fit", "--config", recipe, "--config", "hardware/cpu", "--model.system", system, *args])
    main(["generate", "--checkpoint", f"runs/{recipe}/llm_to_slm", "--max-new-tokens", "2", "a prompt", "another"])
    assert len(capsys.readouterr().out.splitlines()) >= 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_says_what_it_is_for(recipe):
    head = find_recipe(recipe).read_text().split("seed_everything")[0]
    assert head.startswith("# Question: ")
    assert "# Hardware and time: " in head
    assert f"--config {recipe}" in head


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_touch_no_experiment(overlay):
    values = yaml.safe_load(find_recipe(overlay).read_text())
    assert set(values) <= {"trainer", "model"}
    assert set(values.get("model", {})) <= {"compile"}
