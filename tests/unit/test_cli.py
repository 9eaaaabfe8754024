"""The command line: whole runs, resumption, and mistakes that end in one line."""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.loggers import MLFlowLogger
from safetensors.torch import load_file

from llmslm.callbacks.tracking import MlflowLogger
from llmslm.cli import main
from llmslm.errors import UserError
from llmslm.module import SystemModule
from llmslm.recipe import load_source, read_recipe
from llmslm.system import System
from llmslm.training import Cli, run
from tests import tiny
from tests.unit import toy
from tests.unit.data.tokenizers import bytes_of


def fit(recipe, system, *args):
    main(["fit", "--config", recipe, "--model.system", system, *args])


def fails(capsys, *args, code=1):
    """Run, expect an exit code and one line on standard error; return that line."""
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert stopped.value.code == code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("llmslm: error: ")
    return line


def test_three_systems_train_and_generate(workdir, capsys, monkeypatch):
    recipe = toy.write_recipe(workdir)
    for system in ("llm", "slm", "llm_to_slm"):
        fit(recipe, system)
    capsys.readouterr()
    main(["generate", "--checkpoint", "runs/toy/llm_to_slm", "--max-new-tokens", "3", "say alpha", "say beta"])
    from_arguments = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("say alpha\nsay beta\n"))
    main(["generate", "--checkpoint", "runs/toy/llm_to_slm/system", "--max-new-tokens", "3"])
    assert capsys.readouterr().out == from_arguments
    assert len(from_arguments.splitlines()) == 2
    card = json.loads(Path("runs/toy/llm_to_slm/system/system.json").read_text())
    assert (card["system"], card["recipe"], card["steps"], card["seed"]) == ("llm_to_slm", "toy", 4, 1)


def test_checkpoints_hold_what_was_trained(workdir):
    recipe = toy.write_recipe(workdir)
    fit(recipe, "llm")
    fit(recipe, "llm_to_slm")
    state = torch.load("runs/toy/llm_to_slm/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert not any("encoder" in name and name.startswith("model.encoder") for name in state["state_dict"])
    optimizer = state["optimizer_states"][0]["state"]
    trained = System.load("runs/toy/llm_to_slm").model
    assert len(optimizer) == len([p for p in trained.parameters() if p.requires_grad])


def test_a_system_may_be_saved_in_half_the_room(workdir):
    recipe = toy.write_recipe(workdir)
    fit(recipe, "llm", "--save_system.dtype=bfloat16")
    stored = load_file("runs/toy/llm/system/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    fit(recipe, "llm_to_slm")
    model = System.load("runs/toy/llm_to_slm").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    last = torch.load("runs/toy/llm/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {tensor.dtype for tensor in last.values()} == {torch.float32}


def test_a_resumed_run_equals_an_uninterrupted_one(workdir):
    """Stop in the middle of an epoch, resume: the same weights, bit for bit."""
    recipe = toy.write_recipe(workdir)
    constant = "--model.schedule=constant"
    fit(recipe, "slm", constant, "--trainer.default_root_dir=whole")
    fit(recipe, "slm", constant, "--trainer.default_root_dir=halves", "--trainer.max_steps=2")
    fit(recipe, "slm", constant, "--trainer.default_root_dir=halves", "--ckpt_path=halves/checkpoints/last.ckpt")
    whole, halves = (
        torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "halves")
    )
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_the_command_line_beats_the_checkpoint(workdir):
    recipe = toy.write_recipe(workdir)
    fit(recipe, "slm")
    fit(
        recipe,
        "slm",
        "--ckpt_path=runs/toy/slm/checkpoints/last.ckpt",
        "--trainer.max_steps=6",
        "--model.warmup_steps=3",
    )
    config = yaml.safe_load(Path("runs/toy/slm/config.yaml").read_text())
    assert (config["trainer"]["max_steps"], config["model"]["warmup_steps"]) == (6, 3)
    assert torch.load("runs/toy/slm/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_stages_read_a_checkpoint(workdir, command):
    recipe = toy.write_recipe(workdir)
    fit(recipe, "slm")
    main([command, "--config", recipe, "--model.system", "slm", "--ckpt_path", "runs/toy/slm/checkpoints/last.ckpt"])
    if command == "predict":
        lines = Path("runs/toy/slm/predictions.jsonl").read_text().splitlines()
        assert {json.loads(line)["id"] for line in lines} == {f"test-{i}" for i in range(9)}


def test_a_run_that_replaces_the_system_of_an_earlier_one_says_so(workdir, caplog):
    recipe = toy.write_recipe(workdir)
    fit(recipe, "slm")
    assert "will be replaced" not in caplog.text
    fit(recipe, "slm", "--ckpt_path=last")
    assert "will be replaced" not in caplog.text
    fit(recipe, "slm")
    assert f"{Path('runs/toy/slm/system')} is of an earlier run and will be replaced; --ckpt_path last" in caplog.text


def test_other_stages_say_where_no_checkpoint_is_read(workdir, capsys, caplog):
    recipe = toy.write_recipe(workdir)
    folder = str(Path("runs/toy/slm/checkpoints"))
    stage = ["--config", recipe, "--model.system=slm"]
    main(["predict", *stage])
    said = caplog.text
    assert "no --ckpt_path: predict takes the weights from before training; --ckpt_path last takes the" in said
    assert f"predictions: {Path('runs/toy/slm/predictions.jsonl')}" in said
    line = fails(capsys, "validate", *stage, "--ckpt_path=last")
    assert f"there is no whole checkpoint in {folder}; train first, or give another (--ckpt_path)" in line


def test_mlflow_gets_parameters_config_commit_and_data(workdir):
    from mlflow import MlflowClient

    recipe = toy.write_recipe(
        workdir, logger={"class_path": "llmslm.callbacks.tracking.MlflowLogger"}, log_every_n_steps=1
    )
    fit(recipe, "slm", "--trainer.logger.init_args.parent_run=parent")
    fit(recipe, "slm")  # a second run in the same folder is no error
    client = MlflowClient(f"sqlite:///{workdir}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("llmslm").experiment_id], order_by=["start_time"])
    assert len(runs) == 2
    run = runs[0]
    assert run.info.run_name == "toy/slm"
    assert run.data.params["model/warmup_steps"] == "2"
    assert {"train/loss", "val/loss", "val/perplexity", "val/bleu"} <= set(run.data.metrics)
    assert run.data.tags["mlflow.parentRunId"] == "parent"
    assert len(run.data.tags["data.fingerprint"]) == 16
    assert "git.commit" in run.data.tags
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["config.yaml"]


@pytest.mark.parametrize(("store", "others_wait"), [("sqlite:///{}/mlflow.db", True), ("http://127.0.0.1:9", False)])
def test_trainings_that_begin_at_once_open_a_new_store_in_turn(tmp_path, monkeypatch, store, others_wait):
    """MLflow makes the tables of a new file when it is opened; a second process would fail on those half made."""
    waiting = []

    def opened(*_, **__):
        try:
            with FileLock(tmp_path / "mlflow.db.lock", timeout=0):
                waiting.append(False)
        except Timeout:
            waiting.append(True)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(tmp_path))
    monkeypatch.setattr(MLFlowLogger, "__init__", opened)
    MlflowLogger()
    assert waiting == [others_wait]


def test_help_is_quick():
    for module in ("llmslm.cli", "evaluation.cli"):
        code = f"import sys; from {module} import main; main(['--help'])"
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout
        loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not loaded & {"torch", "transformers", "lightning", "mlflow", "datasets", "evaluate"}
        assert time.perf_counter() - start < 30  # a hang, not a speed: what counts is that nothing heavy is loaded


@pytest.mark.parametrize("name", ["ddp", '{"class_path": "lightning.pytorch.strategies.DDPStrategy"}'])
def test_copies_hold_each_gradient_once(workdir, monkeypatch, name):
    started = []
    monkeypatch.setattr(Cli, "_run_subcommand", lambda self, _: started.append(self.trainer))
    run(["fit", "--config", toy.write_recipe(workdir), f"--trainer.strategy={name}"])
    assert started[0].strategy._ddp_kwargs["gradient_as_bucket_view"] is True


def test_unknown_names_are_refused(workdir, capsys):
    assert "no recipe 'nothing'" in fails(capsys, "fit", "--config", "nothing")
    assert "unknown command 'train'" in fails(capsys, "train", code=2)
    recipe = toy.write_recipe(workdir)
    assert "model.slmm" in fails(capsys, "fit", "--config", recipe, "--model.slmm=3", code=2)
    assert "hiden" in fails(
        capsys, "fit", "--config", recipe, "--model.projector=MlpProjector", "--model.projector.hiden=3", code=2
    )
    assert "max_step" in fails(capsys, "fit", "--config", recipe, "--trainer.max_step=3", code=2)
    assert "trainer.strategy is ddpp" in fails(capsys, "fit", "--config", recipe, "--trainer.strategy=ddpp")
    wrong = '{"class_path": "llmslm.parallel.Fsdp", "init_args": {"shards": 2}}'
    assert "one of its init_args is wrong" in fails(capsys, "fit", "--config", recipe, f"--trainer.strategy={wrong}")


def test_no_room_on_the_device_is_one_line(workdir, capsys, monkeypatch):
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(SystemModule, "training_step", step)
    line = fails(capsys, "fit", "--config", toy.write_recipe(workdir), "--model.system=slm")
    assert "CUDA out of memory. Tried to allocate 2 GiB; lower data.micro_batch_size" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(workdir, capsys):
    line = fails(capsys, "fit", "--config", toy.write_recipe(workdir), "--config", "hardware/1gpu")
    assert line.endswith(
        "No supported gpu backend found!; --config hardware/cpu runs without one (trainer.accelerator)"
    )


def test_a_folder_that_cannot_be_is_one_line(workdir, capsys):
    recipe = toy.write_recipe(workdir)
    fit(recipe, "llm")
    Path("file").touch()
    expected = "cannot be used: Not a directory; if it is where this command writes, give another folder"
    for command, key in (
        (["fit", "--config", recipe, "--model.system=slm", "--trainer.default_root_dir=file/x"], "default_root_dir"),
        (["label", "--config", recipe, "--checkpoint", "runs/toy/llm", "--out", "file/x"], "--out"),
        (["features", "--config", recipe, "--out", "file/x"], "--out"),
        (["consolidate", "--checkpoint", "runs/toy/llm/checkpoints/last.ckpt", "--output", "file/x"], "--output"),
    ):
        line = fails(capsys, *command)
        assert expected in line
        assert line.endswith(f"{key})")


def test_what_was_meant_is_suggested(workdir, capsys):
    assert fails(capsys, "fit", "--config", "quickstrat").endswith("did you mean quickstart?")
    recipe = toy.write_recipe(workdir)
    for key, meant in (("trainer.max_step", "trainer.max_steps"), ("model.sytem", "model.system")):
        for spelt in (["--" + key, "3"], [f"--{key}=3"]):
            assert fails(capsys, "fit", "--config", recipe, *spelt, code=2).endswith(f"did you mean {meant}?")
    assert "did you mean" not in fails(capsys, "fit", "--config", recipe, "--flavour=3", code=2)
    Path("typo.yaml").write_text("model:\n  warmup_step: 3\n")
    line = fails(capsys, "fit", "--config", recipe, "--config", "typo.yaml", code=2)
    assert line.endswith("did you mean model.warmup_steps?")
    for part, spelt, meant in (
        ("projector", "GatedMlpProjectr", "GatedMlpProjector"),
        ("fusion", "GatdAdd", "GatedAdd"),
    ):
        for path in (spelt, f"llmslm.models.{part}.{spelt}"):
            line = fails(capsys, "fit", "--config", recipe, f"--model.{part}={path}", code=2)
            assert line.endswith(f"did you mean {meant}?")
    Path("typo.yaml").write_text("model: {optimiser: {init_args: {lr: 1}}}\n")
    line = fails(capsys, "fit", "--config", recipe, "--config", "typo.yaml", code=2)
    assert line.endswith("did you mean model.optimizer?")
    for option, meant in (
        ("model.projector.init_args.hidden=3", "did you mean hidden_size?"),
        ("data.tokenizer.init_args.vocabsize=300", "did you mean vocab_size?"),
        ("data.source.init_args.validations=x", "did you mean validation?"),
    ):
        assert fails(capsys, "fit", "--config", recipe, f"--{option}", code=2).endswith(meant)
    wrong = '{"class_path": "torch.optim.AdamW", "init_args": {"learning_rate": 1}}'
    assert "expected one of lr, " in fails(capsys, "fit", "--config", recipe, f"--model.optimizer={wrong}", code=2)
    assert "give a recipe: --config" in fails(capsys, "fit", code=2)


def test_a_broken_recipe_is_named(workdir, capsys):
    recipe = toy.write_recipe(workdir)
    Path("broken.yaml").write_text("model: [1,\n")
    Path("empty.yaml").write_text("# later\n")
    Path("text.yaml").write_text("a sentence\n")
    for name, text in (
        ("broken", "broken.yaml is no YAML: while parsing a flow node"),
        ("empty", "empty.yaml is no recipe: expected keys such as model, data and trainer, found nothing"),
        ("text", "found 'a sentence' (--config)"),
    ):
        for command in (["fit"], ["plan"], ["label", "--checkpoint", "x", "--out", "y"]):
            assert text in fails(capsys, *command, "--config", recipe, "--config", f"{name}.yaml")
        with pytest.raises(UserError, match=re.escape(text)):
            load_source(f"{name}.yaml")


def test_a_template_with_a_colon_stays_text(workdir):
    recipe = toy.write_recipe(workdir)
    given = ["--data.prompt_template", "it: {prompt}", "--data.tokenizer={vocab_size: 300}", "--data.x", "a: b: c"]
    data = read_recipe([recipe], given)["data"]
    assert (data["prompt_template"], data["tokenizer"], data["x"]) == ("it: {prompt}", {"vocab_size": 300}, "a: b: c")


def test_consolidate_replaces_nothing_but_a_system(workdir, capsys):
    fit(toy.write_recipe(workdir), "llm")
    command = ["consolidate", "--checkpoint", "runs/toy/llm/checkpoints/last.ckpt", "--output"]
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    for output in ("mine", "mine/thesis.txt"):
        assert f"{output} is there and is no system; give a folder that is new" in fails(capsys, *command, output)
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]
    Path("empty").mkdir()
    for output in ("new", "empty", "new"):
        main([*command, output])
        assert System.load(output).name == "llm"


def test_consolidate_says_what_it_takes(workdir, capsys):
    Path("run").mkdir()
    for checkpoint, problem in (("nothing", "it is not there"), ("run", "seal.json is missing")):
        line = fails(capsys, "consolidate", "--checkpoint", checkpoint)
        assert f"{checkpoint} cannot be used: {problem}; give a file or folder in the checkpoints folder" in line


def test_models_that_are_not_there_are_named(workdir, capsys):
    recipe = toy.write_recipe(workdir)
    assert "train it first with --model.system llm" in fails(capsys, "fit", "--config", recipe)
    line = fails(capsys, "fit", "--config", recipe, "--model.encoder.source=/nowhere")
    assert "no tokenizer at '/nowhere': there is no folder /nowhere" in line
    assert "expected a hub name or a folder with tokenizer.json" in line
    line = fails(capsys, "fit", "--config", recipe, "--model.slm.source=x")
    assert "model.slm has both of source and config" in line
    assert ": --model.slm.config null leaves out the recipe's" in line
    given = ["--model.system=slm", "--model.slm.source=/nowhere", "--model.slm.config=null"]
    assert "no tokenizer at '/nowhere'" in fails(capsys, "fit", "--config", recipe, *given)
    tiny.CONFIGS["t5"].save_pretrained("empty")
    bytes_of().save_pretrained("empty")
    line = fails(capsys, "fit", "--config", recipe, "--model.encoder.source=empty")
    assert "a folder with config.json and weights" in line
    assert "holds no system" in fails(capsys, "generate", "--checkpoint", "nowhere", "x")


def test_data_mistakes_are_named_and_nothing_is_written(workdir, capsys):
    recipe = toy.write_recipe(workdir)
    train = Path("train.jsonl")
    good = train.read_text()
    for content, message in (
        ('{"prompt": "a"}\n', "line 1: no column 'target'; found prompt"),
        ('{"prompt": "a", "target": "b"}\n{"prompt": \n', "line 2: not valid JSON"),
        ('{"prompt": "a", "target": " "}\n', "line 1: target is empty"),
        ("", "has no rows"),
    ):
        train.write_text(content)
        assert message in fails(capsys, "fit", "--config", recipe, "--model.system", "slm")
    train.write_text(good)
    line = fails(capsys, "fit", "--config", recipe, "--model.system", "slm", "--data.max_prompt_tokens=4")
    assert "the limit is 4" in line
    assert "data.truncate_prompt" in line
    assert not Path("runs/toy/slm/system").exists()


def test_truncation_is_counted(workdir):
    recipe = toy.write_recipe(workdir)
    cut = r"prompts were cut to 4 tokens \(left\)"
    with (
        pytest.warns(UserWarning, match="train: 48 of 48 " + cut),
        pytest.warns(UserWarning, match="validation: 9 of 9 " + cut),
    ):
        fit(recipe, "slm", "--data.max_prompt_tokens=4", "--data.truncate_prompt=left")


def test_a_checkpoint_of_another_composition_is_refused(workdir, capsys):
    recipe = toy.write_recipe(workdir)
    fit(recipe, "llm")
    fit(recipe, "slm")
    line = fails(capsys, "fit", "--config", recipe, "--ckpt_path=runs/toy/slm/checkpoints/last.ckpt")
    assert "the checkpoint is of another composition: its system is 'slm', the recipe's is 'llm_to_slm'" in line


def test_the_encoder_is_the_same_after_training(workdir):
    recipe = toy.write_recipe(workdir)
    fit(recipe, "llm")
    before = Path("runs/toy/llm/system/model.safetensors").read_bytes()
    fit(recipe, "llm_to_slm")
    assert Path("runs/toy/llm/system/model.safetensors").read_bytes() == before
    system = System.load("runs/toy/llm_to_slm")
    assert system.model.encoder.content_hash() == system.model.config.encoder_hash
    names = {name.partition(".")[0] for name, p in system.model.named_parameters() if p.requires_grad}
    assert names == {"projector", "slm"}
