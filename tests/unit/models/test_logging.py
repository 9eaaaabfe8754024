"""What the parts between the models learn is in the log of a run."""

import csv
from pathlib import Path

from llmslm.cli import main
from tests.unit.toy import write_recipe


def test_gates_and_the_mix_of_layers_are_logged_with_each_validation(workdir):
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "logs", "name": "", "version": ""},
    }
    recipe = write_recipe(workdir, max_steps=2)
    main(["fit", "--config", recipe, "--model.system", "llm"])
    recipe = write_recipe(workdir, max_steps=2, logger=logger)
    parts = ["--model.encoder.layer=[0,last]", "--model.fusion=llmslm.models.fusion.GatedAdd"]
    main(["fit", "--config", recipe, *parts])
    with Path("logs/metrics.csv").open() as lines:
        last = [row for row in csv.DictReader(lines) if row["layer_mix/0"]][-1]
    assert 0.4 < float(last["layer_mix/0"]) < 0.6
    assert abs(float(last["layer_mix/0"]) + float(last["layer_mix/last"]) - 1) < 1e-5
    assert float(last["fusion/gate"]) > 0
