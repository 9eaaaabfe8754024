"""Whole runs on several gloo ranks: sharded checkpoints, resumed on other numbers of ranks, and what comes out."""

import json
import math
import time

import pytest
import torch
from safetensors import safe_open

from llmslm.consolidate import consolidate
from llmslm.resume import CheckpointFiles, fault, newest
from llmslm.system import System
from tests.processes import Run, free_port
from tests.unit import toy

FSDP = {"class_path": "llmslm.parallel.Fsdp"}


def torchrun(rank, world_size, port):
    """The variables that torchrun sets."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    fixed = {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return {name: str(value) for name, value in (numbers | fixed).items()}


def fit(folder, world_size, name, *args, strategy=FSDP, system="llm_to_slm"):
    """Run `llmslm fit` on so many ranks to its end; return what rank 0 wrote."""
    losses = [{"class_path": "tests.probe.Losses", "init_args": {"file": name}}]
    fixed = [f"--model.system={system}", f"--trainer.devices={world_size}", f"--trainer.default_root_dir={name}"]
    fixed += [f"--trainer.callbacks={json.dumps(losses)}", "--model.schedule=constant"]
    fixed += [f"--trainer.strategy={strategy if isinstance(strategy, str) else json.dumps(strategy)}"]
    port = free_port()
    runs = []
    for rank in range(world_size):
        environment = {"LLMSLM_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
        environment |= torchrun(rank, world_size, port) if strategy != "auto" else {}
        runs.append(
            Run(["fit", "--config", str(folder / "toy.yaml"), *fixed, *args], folder, environment, f"{name}{rank}")
        )
    end = time.monotonic() + 90
    while None in (codes := [run.process.exitcode for run in runs]) and not any(codes) and time.monotonic() < end:
        time.sleep(0.05)
    assert codes == [0] * world_size, "".join(run.stop() for run in runs)
    return runs[0].text


def loss(folder, name, world_size):
    """Mean over ranks of each micro-batch's loss, in the order in which they were trained."""
    ranks = [(folder / f"{name}.{rank}.txt").read_text().splitlines() for rank in range(world_size)]
    return [
        math.fsum(float.fromhex(line.split()[1]) for line in lines) / world_size for lines in zip(*ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained llm, and two ranks that trained a llm_to_slm with it for four steps."""
    folder = tmp_path_factory.mktemp("runs")
    toy.write_recipe(folder, max_steps=4, val_check_interval=4, limit_val_batches=2, num_sanity_val_steps=0)
    fit(folder, 1, "llm", strategy="auto", system="llm")
    fit(folder, 2, "two", "--safeguard.every_n_steps=2", "--trainer.gradient_clip_val=1.0")
    return folder


def test_a_checkpoint_is_a_whole_folder_of_what_was_trained(folder):
    path = newest(folder / "two" / "checkpoints")
    assert path.is_dir()
    state = CheckpointFiles().load_checkpoint(path, weights_only=True)
    assert state["global_step"] == 4
    assert {name.split(".")[1] for name in state["state_dict"]} == {"projector", "slm"}
    assert len(state["optimizer_states"][0]["state"]) == len(state["state_dict"])
    part = next(path.glob("__1_*"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert "is damaged" in fault(path)
    part.unlink()
    assert "is missing or cut off" in fault(path)
    with pytest.warns(UserWarning, match="is broken"):
        assert newest(path.parent) != path


def test_the_system_agrees_with_its_checkpoint_and_predicts(folder):
    system = System.load(folder / "two")
    best = next((folder / "two" / "checkpoints").glob("step-*.ckpt"))
    output = consolidate(best, folder / "one_file")
    with safe_open(output / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"projector", "slm"}  # noqa: SIM118 (no mapping)
    again = System.load(output)
    for name, value in system.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    prompts = ["say alpha 0", "say beta 7"]
    assert system.generate(prompts, max_new_tokens=5) == again.generate(prompts, max_new_tokens=5)


@pytest.mark.parametrize("system", ["llm", "slm"])
def test_tied_weights_are_in_a_checkpoint_once_and_the_dtype_is_kept(folder, system):
    """One of T5's embeddings has four names. The checkpoint goes on sharded and not, and gives the run's system."""
    name, args = f"tied_{system}", ["--model.slm.config.tie_word_embeddings=true", "--save_system.dtype=bfloat16"]
    args += ["--trainer.val_check_interval=2"]
    fit(folder, 2, name, *args, "--trainer.max_steps=2", system=system)
    path = next((folder / name / "checkpoints").glob("step-*.ckpt"))
    weights = CheckpointFiles().load_checkpoint(path, weights_only=True)["state_dict"]
    tied = [key for key in weights if "shared" in key or "embed_tokens" in key or "lm_head" in key]
    assert len(tied) == 1
    with safe_open(consolidate(path, folder / f"{name}_again") / "model.safetensors", "pt") as file:
        again = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    assert {value.dtype for value in again.values()} == {torch.bfloat16}
    with safe_open(folder / name / "system" / "model.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(key), value) for key, value in again.items())
    resume = [*args, f"--ckpt_path={path}", "--trainer.limit_val_batches=0"]
    fit(folder, 1, f"{name}_plain", *resume, strategy="auto", system=system)
    fit(folder, 1, f"{name}_sharded", *resume, system=system)
    assert loss(folder, f"{name}_sharded", 1) == pytest.approx(loss(folder, f"{name}_plain", 1), rel=1e-6)


@pytest.mark.parametrize("system", ["llm", "llm_to_slm"])
def test_adapters_train_sharded_and_become_a_system(folder, system):
    """The checkpoint holds no frozen weight, the system is the one that the checkpoint gives, and it goes on."""
    lora = [f"--model.{key}.source={folder}/llm/system" for key in ("llm", "slm")]
    lora += ["--model.llm.config=null", "--model.slm.config=null"]
    lora += [f"--model.{'llm' if system == 'llm' else 'slm'}.train.rank=2", "--trainer.gradient_clip_val=1.0"]
    name = f"lora_{system}"
    assert "parameters are trained" in fit(folder, 2, name, *lora, system=system)
    path = newest(folder / name / "checkpoints")
    state = CheckpointFiles().load_checkpoint(path, weights_only=True)["state_dict"]
    assert all(".lora_" in key or key.startswith("model.projector.") for key in state)
    output = consolidate(next((folder / name / "checkpoints").glob("step-*.ckpt")), folder / f"{name}_consolidated")
    system_of_run, again = System.load(folder / name), System.load(output)
    for key, value in system_of_run.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key
    resume = [*lora, "--ckpt_path=last", "--trainer.max_steps=6", "--trainer.val_check_interval=6"]
    fit(folder, 1, name, *resume, system=system)
    assert (
        CheckpointFiles().load_checkpoint(newest(folder / name / "checkpoints"), weights_only=True)["global_step"] == 6
    )


@pytest.mark.parametrize("world_size", [1, 3])
def test_it_resumes_on_another_number_of_ranks(folder, world_size):
    """The same weights and moments: the next two steps' losses are what one process without sharding has."""
    start = next((folder / "two" / "checkpoints").glob("step-*.ckpt"))
    args = [f"--ckpt_path={start}", "--trainer.max_steps=6", "--trainer.limit_val_batches=0"]
    if not (folder / "plain.0.txt").exists():
        fit(folder, 1, "plain", *args, strategy="auto")
    name = f"resumed{world_size}"
    fit(folder, world_size, name, *args)
    if world_size == 1:
        assert loss(folder, name, 1) == pytest.approx(loss(folder, "plain", 1), rel=1e-6)
    else:
        assert len(loss(folder, name, world_size)) == 2
    states = [CheckpointFiles().load_checkpoint(p, weights_only=True) for p in (start, _last(folder / name))]
    step = {int(state["step"]) for state in states[1]["optimizer_states"][0]["state"].values()}
    assert step == {6}


def _last(run):
    return next(path for path in (run / "checkpoints").glob("*.ckpt"))


def test_a_file_of_one_device_goes_on_sharded(folder):
    args = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    fit(folder, 1, "file", *args, strategy="auto")
    args = [
        f"--ckpt_path={folder}/file/checkpoints/last.ckpt",
        "--trainer.max_steps=4",
        "--trainer.limit_val_batches=0",
    ]
    fit(folder, 1, "unsharded", *args, strategy="auto")
    fit(folder, 1, "sharded", *args)
    assert loss(folder, "sharded", 1) == pytest.approx(loss(folder, "unsharded", 1), rel=1e-6)


@pytest.mark.parametrize("strategy", [FSDP, "ddp"], ids=["fsdp", "ddp"])
def test_two_ranks_train_as_one_on_the_same_global_batch(folder, strategy):
    """One process that accumulates the micro-batches of two ranks; all targets have equally many tokens here.

    Lightning divides the loss that it hands on by the number of micro-batches.
    """
    rows = [json.dumps({"prompt": f"say {'la ' * (i % 4)}{i}", "target": "x"}) for i in range(48)]
    (folder / "equal.jsonl").write_text("\n".join(rows))
    args = [f"--data.source.init_args.train={folder}/equal.jsonl", "--trainer.max_steps=3"]
    args += ["--trainer.limit_val_batches=0", "--model.encoder.source=llm/system", "--data.tokenizer=null"]
    name = "ddp" if strategy == "ddp" else "fsdp"
    if not (folder / "accumulated.0.txt").exists():
        fit(folder, 1, "accumulated", *args, "--trainer.accumulate_grad_batches=2", strategy="auto")
    fit(folder, 2, name, *args, strategy=strategy)
    one = loss(folder, "accumulated", 1)
    assert loss(folder, name, 2) == pytest.approx([a + b for a, b in zip(one[::2], one[1::2], strict=True)], rel=1e-5)


def test_a_recipe_that_names_fsdp1_trains_clips_validates_and_goes_on(folder):
    """Also on a CPU, where FSDP1 itself refuses to start."""
    strategy = "lightning.pytorch.strategies.FSDPStrategy"
    args = ["--trainer.strategy.sharding_strategy=SHARD_GRAD_OP", "--trainer.gradient_clip_val=1.0"]
    args += ["--trainer.val_check_interval=2"]
    text = fit(folder, 2, "fsdp1", *args, "--trainer.max_steps=2", strategy=strategy)
    assert "FSDPStrategy is run as FSDP2: " in text
    assert "Tip: For" not in text
    assert "sync_dist" not in text
    fit(folder, 2, "fsdp1", *args, "--ckpt_path=last", strategy=strategy)
    path = newest(folder / "fsdp1" / "checkpoints")
    assert path.is_dir()
    assert CheckpointFiles().load_checkpoint(path, weights_only=True)["global_step"] == 4
    assert System.load(folder / "fsdp1").generate(["say alpha 0"], max_new_tokens=2)
