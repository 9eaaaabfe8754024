"""`llmslm label`: the file is what the system predicts, once each, whatever happens on the way; what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from llmslm.cli import main
from llmslm.data.tokenizer import same_tokenizer
from llmslm.distillation import label
from llmslm.distillation.label import Gate
from llmslm.system import System
from tests.unit import toy
from tests.unit.test_cli import fails, fit
from tests.unit.test_generate import shake

LIMIT = 12
OPEN = ["--gate", "0", "1000", "--max-new-tokens", str(LIMIT)]
SPLITS = {"train": 48, "validation": 9}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a recipe and an llm whose predictions differ in length."""
    folder = tmp_path_factory.mktemp("label")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LLMSLM_CACHE", str(folder / "cache"))
        fit(toy.write_recipe(folder), "llm")
        shake(Path("runs/toy/llm/system"))
        model = System.load("runs/toy/llm").model
        model.generation_config.eos_token_id = [2, *range(260, 300)]
        model.save_pretrained("runs/toy/llm/system")
    return folder


@pytest.fixture
def arguments(trained, workdir, monkeypatch):
    monkeypatch.setenv("LLMSLM_CACHE", str(trained / "cache"))
    monkeypatch.setattr(label, "SHARD_EXAMPLES", 10)
    llm = str(trained / "runs/toy/llm")
    return ["label", "--config", str(trained / "toy.yaml"), "--checkpoint", llm, "--out", "out"]


def predicted(trained, split="train"):
    """Examples of a split, each with the llm's prediction."""
    examples = [json.loads(line) for line in (trained / f"{split}.jsonl").read_text().splitlines()]
    system = System.load(trained / "runs/toy/llm")
    return list(zip(examples, system.generate([e["prompt"] for e in examples], max_new_tokens=LIMIT), strict=True))


def rows(split="train"):
    return pq.read_table(f"out/{split}.parquet").to_pylist()


def report(split="train"):
    return json.loads(Path("out/labels.json").read_text())["splits"][split]


def test_targets_are_the_systems_predictions(trained, arguments, capsys):
    main([*arguments, *OPEN, "--batch-size", "3"])
    out, err = capsys.readouterr()
    for split, count in SPLITS.items():
        pairs = predicted(trained, split)
        kept = [(e, one) for e, one in pairs if one.tokens < LIMIT and one.text]
        wanted = [e | {"target": one.text, "gold_target": e["target"], "gate": "passed"} for e, one in kept]
        assert rows(split) == wanted
        tokens = sum(one.tokens for _, one in pairs)
        assert (report(split)["examples"], report(split)["written"]) == (count, len(wanted))
        assert 0 < report(split)["failed"]["unfinished"] < count
        assert report(split)["tokens"] == tokens
        assert f"out/{split}.parquet: {len(wanted)} of {count} examples; " in out
        assert f"{split}: {count} prompts, {tokens} tokens in" in err


def test_another_gate_needs_no_second_run(arguments, monkeypatch):
    main([*arguments, *OPEN])
    everything = rows()
    monkeypatch.setattr(System, "generate", lambda *_a, **_k: pytest.fail("predicted again"))
    main([*arguments, *OPEN, "--gate", "0.8", "3"])
    assert 0 < len(rows()) < len(everything)
    assert report()["failed"]["long"] + report()["failed"]["short"] == len(everything) - len(rows())
    kept = {row["id"] for row in rows()}
    main([*arguments, *OPEN, "--gate", "0.8", "3", "--failed", "gold"])
    assert len(rows()) == report()["written"] == 48
    assert all(row["target"] == row["gold_target"] for row in rows() if row["gate"] != "passed")
    assert {row["id"] for row in rows() if row["gate"] == "passed"} == kept


KILLED = """
import os, signal, sys
from pathlib import Path
from llmslm.distillation import label
label.SHARD_EXAMPLES, calls, original = 10, [], Path.replace
def replace(*args):
    calls.append(args)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
Path.replace = replace
label.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_call_goes_on_without_loss_or_doubles(trained, arguments):
    """The process dies when its third shard is on disk, but not yet under its name."""
    environment = os.environ | {"PYTHONPATH": str(Path(label.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments[1:], *OPEN], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    shards = sorted(Path("out/predictions/train").glob("[0-9]*"))
    assert len(shards) == 2
    before = {shard: shard.stat().st_mtime_ns for shard in shards}
    main([*arguments, *OPEN])
    assert before == {shard: shard.stat().st_mtime_ns for shard in shards}
    wanted = [(e["id"], one.text) for e, one in predicted(trained) if one.tokens < LIMIT and one.text]
    assert [(row["id"], row["target"]) for row in rows()] == wanted


def test_ranks_share_the_work(trained, arguments, monkeypatch, capsys):
    asked = []
    original = System.generate
    monkeypatch.setattr(
        System, "generate", lambda self, prompts, **kwargs: asked.extend(prompts) or original(self, prompts, **kwargs)
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert not Path("out/labels.json").exists()
        main([*arguments, *OPEN])
    assert "shards are still with other ranks" in capsys.readouterr().err
    assert len(asked) == 48 + 9
    wanted = [(e["id"], one.text) for e, one in predicted(trained) if one.tokens < LIMIT and one.text]
    assert [(row["id"], row["target"]) for row in rows()] == wanted


def test_a_recipe_trains_on_the_labels(trained, arguments, capsys):
    """With the tokenizer that the llm was trained with."""
    main([*arguments, *OPEN])
    assert f"llmslm fit --config {trained}/toy.yaml --config out/recipe.yaml" in capsys.readouterr().out
    overlay = ["--config", "out/recipe.yaml", "--data.max_target_tokens=16", "--data.max_prompt_tokens=30"]
    fit(str(trained / "toy.yaml"), "llm_to_slm", *overlay)
    system, llm = System.load("runs/toy/llm_to_slm"), System.load(trained / "runs/toy/llm")
    assert same_tokenizer(system.codec.slm_tokenizer, llm.codec.slm_tokenizer)
    assert system.codec.encoder_tokenizer is None


def test_without_the_overlay_an_llm_of_other_tokens_is_refused(trained, arguments, capsys):
    root = f"--trainer.default_root_dir={trained}/runs/toy/llm_to_slm"
    fitting = ["fit", "--config", str(trained / "toy.yaml"), root]
    line = fails(capsys, *fitting, "--data.tokenizer.vocab_size=290")
    assert "runs/toy/llm/system was trained with another tokenizer than this data's; set model.encoder.source" in line


def test_a_bare_model_reads_prompts_as_the_recipe_says(trained, arguments):
    shutil.copytree(trained / "runs/toy/llm/system", "bare")
    Path("bare/system.json").unlink()
    given = [*arguments, "--checkpoint", "bare", *OPEN]
    main([*given, "--splits", "validation"])
    wanted = [one.text for _, one in predicted(trained, "validation") if one.tokens < LIMIT and one.text]
    assert [row["target"] for row in rows("validation")] == wanted
    main([*given, "--splits", "validation", "--out", "do", "--data.prompt_template", "'do: {prompt}'"])
    first, second = (Path(name, "manifest.json").read_text() for name in ("out", "do"))
    assert first != second


ALONE = ["--data.source.init_args.target_column", "null"]


def test_prompts_alone_get_targets(trained, arguments, capsys, monkeypatch):
    given = [*arguments, *ALONE, "--max-new-tokens", str(LIMIT), "--splits", "train"]
    for option, named in ((["--failed", "gold"], "--failed gold"), (["--gate", "0", "9"], "--gate")):
        assert f"{named} was given, but the train split has no gold targets; " in fails(capsys, *given, *option)
    main(given)
    pairs = predicted(trained)
    wanted = [(e["id"], one.text) for e, one in pairs if one.tokens < LIMIT and one.text]
    assert [(row["id"], row["target"]) for row in rows()] == wanted
    assert {(row["gold_target"], row["gate"]) for row in rows()} == {(None, "passed")}
    found = report()
    assert found["failed"].keys() == {"unfinished", "empty"}
    assert sum(found["failed"].values()) == found["examples"] - found["written"] == 48 - len(wanted)
    assert (found["gate"], found["length_ratio"], found["tokens"]) == (None, None, sum(one.tokens for _, one in pairs))
    out = capsys.readouterr().out
    assert f"{len(wanted)} of 48 examples; " in out
    assert "; no gold targets to compare lengths with" in out
    with monkeypatch.context() as patch:
        patch.setattr(System, "generate", lambda *_a, **_k: pytest.fail("predicted again"))
        main(given)
    logits = ["logits", *arguments[1:5], "--config", "out/recipe.yaml", "--out", "logits", "--data.tokenizer", "null"]
    main([*logits, "--top-k", "4"])


def test_prompts_alone_are_nothing_to_train_on(trained, arguments, capsys):
    command = ["fit", "--config", str(trained / "toy.yaml"), "--data.source.init_args.target_column=null"]
    assert "the train split of files has prompts alone; expected targets too" in fails(capsys, *command)


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        ({"prediction": "ab", "tokens": 4}, "passed"),
        ({"prediction": " ", "tokens": 1}, "empty"),
        ({"prediction": "ab", "tokens": 1}, "short"),
        ({"prediction": "ab", "tokens": 9}, "long"),
        ({"prediction": "ab", "tokens": 20}, "unfinished"),
    ],
)
def test_the_gate(row, verdict):
    assert Gate(0.5, 2.0, limit=20).verdict(row | {"gold_tokens": 4}) == verdict
    without_gold = Gate(0.5, 2.0, limit=20).verdict(row | {"gold_tokens": None})
    assert without_gold == ("passed" if verdict in ("short", "long") else verdict)


def test_what_does_not_belong_is_refused(arguments, capsys):
    main([*arguments, *OPEN])
    assert "out is of another max_new_tokens: '12', here it is '9'" in fails(
        capsys, *arguments, "--max-new-tokens", "9"
    )
    rows_before = rows()
    Path("other.jsonl").write_text('{"prompt": "say x", "target": "x"}\n')
    other = ["--data.source.init_args.train", "other.jsonl"]
    assert "out is of other data (data.source); give another folder (--out)" in fails(capsys, *arguments, *OPEN, *other)
    assert rows() == rows_before


def test_mistakes_are_named(trained, arguments, capsys):
    for given, message in (
        (["--gate", "2", "1"], "--gate 2.0 1.0 was given; expected LOW below HIGH"),
        (["--batch-size", "0"], "--batch-size 0"),
        (
            ["--max-new-tokens", "1"],
            "none of the 48 predictions for train passed the gate (42 unfinished, 0 short, 0 long, 6 empty)",
        ),
        (["--checkpoint", "nowhere"], "expected a hub name or a folder with config.json and weights"),
        (["--data.sauce", "1"], "has no valid data section"),
        (["--data.source.init_args.validation", "null", "--out", "other"], "there is no validation file"),
        (["--splits", "validation", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    ):
        assert message in fails(capsys, *arguments, "--out", "fresh", *given), given
    assert not Path("other").exists()


def test_gold_data_is_not_written_over(arguments, capsys):
    Path("out").mkdir()
    Path("out/train.parquet").write_text("gold")
    assert "out/train.parquet is there and was not written by llmslm label" in fails(capsys, *arguments)
    assert Path("out/train.parquet").read_text() == "gold"
