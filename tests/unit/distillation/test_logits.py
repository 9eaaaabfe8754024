"""`llmslm logits` stores the LLM's own distribution; training finds it at the right tokens, or refuses it."""

import csv
import json
import warnings
from pathlib import Path

import pytest
import torch

from llmslm.cli import main
from llmslm.data import logits as cache
from llmslm.data.datamodule import token_counts, tokenise
from llmslm.data.sources import TextFiles
from llmslm.system import System
from tests.unit import toy
from tests.unit.test_cli import fails, fit
from tests.unit.test_generate import shake

VOCABULARY = 300
T5_SLM = ["--model.slm.config", json.dumps(toy.T5)]
FROZEN = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a recipe, and an encoder-decoder and a decoder-only llm that have opinions."""
    folder = tmp_path_factory.mktemp("logits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LLMSLM_CACHE", str(folder / "cache"))
        recipe = toy.write_recipe(folder, log_every_n_steps=1, num_sanity_val_steps=0)
        for name, config in (("t5", toy.T5), ("llama", toy.LLAMA)):
            root = [f"--trainer.default_root_dir=runs/{name}/llm", "--trainer.max_steps=1"]
            fit(recipe, "llm", "--model.llm.config", json.dumps(config), *root)
            shake(Path(f"runs/{name}/llm/system"))
    return folder


@pytest.fixture
def recipe(trained, workdir, monkeypatch):
    monkeypatch.setenv("LLMSLM_CACHE", str(trained / "cache"))
    monkeypatch.setattr(cache, "SHARD_BYTES", 30_000)
    return str(trained / "toy.yaml")


def store(trained, recipe, *args, llm="t5"):
    folder = str(trained / f"runs/{llm}/llm")
    main(["logits", "--config", recipe, "--checkpoint", folder, "--out", "logits", "--top-k", str(VOCABULARY), *args])


def divergences(trained, recipe, system, *args, llm="t5"):
    """Train on the stored logits; the divergence of each step."""
    encoder = f"--model.encoder.source={trained}/runs/{llm}/llm/system"
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=log"]
    fit(recipe, system, encoder, "--model.distillation.logits=logits", *logger, *args)
    with max(Path("log").rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    return [float(row["train/divergence"]) for row in rows if row.get("train/divergence")]


@pytest.mark.parametrize("llm", ["t5", "llama"])
def test_stored_is_the_llms_distribution(trained, recipe, llm):
    """The log-probabilities of the targets are those by which the evaluation scores the LLM."""
    store(trained, recipe, "--batch-tokens", "64", llm=llm)
    system = System.load(trained / f"runs/{llm}/llm")
    rows = tokenise(TextFiles(train=str(trained / "train.jsonl")), "train", system.codec)
    lengths = token_counts(rows, ("target_ids",))
    shards = cache.shards_of(lengths, VOCABULARY, cache.SHARD_BYTES)
    assert len(shards) == len(list(Path("logits/train").iterdir())) > 2
    stored = cache.StoredRows(Path("logits"), "train", shards, cache.COLUMNS)
    scores = system.log_likelihood(rows["prompt"], rows["target"])
    for example, score in enumerate(scores):
        tokens, log_probs = (stored[example][name] for name in ("llm_tokens", "llm_log_probs"))
        at_target = tokens == torch.tensor(rows[example]["target_ids"]).unsqueeze(1)
        assert tokens.shape == (score.tokens, VOCABULARY)
        assert -log_probs[at_target].float().sum().item() == pytest.approx(score.nats, rel=2e-3)


@pytest.mark.parametrize("packing", [[], ["--data.pack_tokens=48"]])
@pytest.mark.parametrize("llm", ["t5", "llama"])
def test_a_copy_of_the_llm_does_not_diverge(trained, recipe, llm, packing):
    """Each target token meets its own stored row, in buckets by length and in packed rows."""
    store(trained, recipe, "--top-k", "20", llm=llm)
    fixed = ["--trainer.max_steps=2", *FROZEN, *packing]
    copy = ["--model.slm.config=null", f"--model.slm.source={trained}/runs/{llm}/llm/system"]
    found = divergences(trained, recipe, "slm", *fixed, *copy, "--data.tokenizer=null", llm=llm)
    assert len(found) == 2
    assert max(found) < 1e-3
    assert min(divergences(trained, recipe, "slm", *fixed, llm=llm)) > 0.1, "the case is void otherwise"


@pytest.mark.parametrize(
    ("system", "more"),
    [
        ("slm", [*T5_SLM, "--model.distillation.temperature=2"]),
        ("llm_to_slm", ["--data.pack_tokens=48", "--model.distillation.direction=reverse"]),
        ("llm_to_slm", T5_SLM),
    ],
)
def test_training_lowers_the_divergence(trained, recipe, system, more):
    store(trained, recipe, "--top-k", "20")
    steps = ["--trainer.max_steps=15", "--model.distillation.weight=1", "--trainer.val_check_interval=15"]
    found = divergences(trained, recipe, system, *steps, *more, "--model.schedule=constant", "--model.bleu_examples=0")
    assert len(found) == 15
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


def test_stored_states_and_logits_go_together(trained, recipe):
    """Neither needs the LLM."""
    store(trained, recipe)
    encoder = f"--model.encoder.source={trained}/runs/t5/llm/system"
    main(["features", "--config", recipe, encoder, "--out", "states"])
    assert len(divergences(trained, recipe, "llm_to_slm", "--model.encoder.features=states")) == 4


def test_the_llm_itself_is_not_distilled(trained, recipe):
    fit(recipe, "llm", "--model.distillation.logits=nowhere", "--trainer.max_steps=1")


def test_a_stopped_call_goes_on_where_it_was(trained, recipe, capsys):
    store(trained, recipe)
    shards = sorted(Path("logits/train").iterdir())
    before = {shard: (shard.read_bytes(), shard.stat().st_mtime_ns) for shard in shards}
    shards[1].unlink()
    line = fails(capsys, *fitting(recipe))
    assert f"logits lacks 1 of {len(shards)} shards: run llmslm logits again" in line
    store(trained, recipe)
    assert {shard: shard.read_bytes() for shard in shards} == {shard: old for shard, (old, _) in before.items()}
    assert [s for s in shards if s.stat().st_mtime_ns != before[s][1]] == [shards[1]]


def test_ranks_share_the_shards(trained, recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, complete in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        store(trained, recipe)
        shards = {int(path.stem) for path in Path("logits/train").iterdir()}
        assert (shards == set(range(max(shards) + 1))) == complete


def fitting(recipe):
    return ["fit", "--config", recipe, "--model.system=slm", "--model.distillation.logits=logits"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--data.tokenizer.vocab_size=290", "writes in another vocabulary than the slm"),
        ("--data.max_target_tokens=1", "the logits in logits are of other targets"),
        ("--data.source.init_args.validation=other.jsonl", "the logits in logits are of other data"),
        ("--model.distillation.logits=elsewhere", "elsewhere holds no logits: write them with llmslm logits --out"),
        ("--model.distillation.weight=2", "model.distillation.weight is 2"),
    ],
)
def test_logits_of_something_else_are_refused(trained, recipe, capsys, change, message):
    store(trained, recipe, "--top-k", "2")
    Path("other.jsonl").write_text('{"prompt": "say", "target": "omega"}\n')
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\w+: 0 of \d+ prompts were cut")  # some targets are
        assert message in fails(capsys, *fitting(recipe), change)


def test_a_folder_of_something_else_is_refused(trained, recipe, capsys):
    store(trained, recipe, "--top-k", "2")
    same = ["logits", "--config", recipe, "--out", "logits", "--checkpoint"]
    t5, llama = (str(trained / f"runs/{name}/llm") for name in ("t5", "llama"))
    assert "logits is of another top_k: '2', here it is '3'" in fails(capsys, *same, t5, "--top-k", "3")
    assert "logits is of another LLM (--checkpoint); give another" in fails(capsys, *same, llama, "--top-k", "2")
    assert "--top-k 0 was given" in fails(capsys, *same, t5, "--top-k", "0")
    manifest = Path("logits/manifest.json")
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 9'))
    assert "has version 9, this llmslm reads 1" in fails(capsys, *fitting(recipe))
