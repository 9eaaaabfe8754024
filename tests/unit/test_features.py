"""The feature cache: training from it is training on the fly, without the LLM; what does not belong is refused."""

import csv
import re
import types
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from llmslm.cli import main
from llmslm.data import features
from llmslm.errors import UserError
from llmslm.models.encoder import Encoder
from llmslm.system import System
from tests.unit import toy


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "SHARD_EXAMPLES", 10)
    path = toy.write_recipe(tmp_path, log_every_n_steps=1)
    fit(path, "llm")
    main(["features", "--config", path, "--out", "states"])
    return path


def fit(recipe, system, *args):
    main(["fit", "--config", recipe, f"--model.system={system}", *args])


def losses(recipe, name, *args):
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={name}"]
    fit(recipe, "llm_to_slm", *logger, *args)
    with next(Path(name).rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[key]) for row in rows for key in ("train/loss", "val/loss") if row.get(key)]


@pytest.mark.parametrize("packing", [[], ["--data.pack_tokens=48"]])
def test_training_from_the_cache_has_the_losses_of_training_on_the_fly(recipe, packing, monkeypatch):
    expected = losses(recipe, "fly", *packing)
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "from_source", lambda *_a, **_k: pytest.fail("the LLM was loaded"))
        cached = losses(recipe, "cached", "--model.encoder.features=states", *packing)
    assert cached == pytest.approx(expected, rel=1e-3)
    assert System.load("runs/toy/llm_to_slm").generate(["say alpha 0"], max_new_tokens=3)


def test_a_stopped_call_goes_on_where_it_was(recipe, monkeypatch):
    shards = sorted(Path("states").rglob("*.safetensors"))
    assert len(shards) == 5 + 1
    before = {shard: (shard.read_bytes(), shard.stat().st_mtime_ns) for shard in shards}
    shards[2].unlink()
    with pytest.raises(SystemExit):
        fit(recipe, "llm_to_slm", "--model.encoder.features=states")
    main(["features", "--config", recipe, "--out", "states"])
    assert {shard: shard.read_bytes() for shard in shards} == {shard: old for shard, (old, _) in before.items()}
    assert [s for s in shards if s.stat().st_mtime_ns != before[s][1]] == [shards[2]]


def test_ranks_share_the_shards(tmp_path):
    lengths = torch.randint(1, 9, (35,)).numpy()
    rows = features.Dataset.from_dict({"prompt_ids": [[5] * int(n) for n in lengths]})
    wide = torch.nn.Embedding(9, 4)
    encoder = lambda ids, mask: (wide(ids), mask)  # noqa: E731
    encoder.parameters = wide.parameters
    codec = type("Codec", (), {"encoder_pad_id": 0})
    for rank in range(3):
        features.write_features(encoder, codec, rows, lengths, tmp_path, "train", rank=rank, world_size=3)
    states = features.StoredStates(tmp_path, "train", lengths)
    assert all(states[i].shape == (lengths[i], 4) for i in range(35))
    torch.testing.assert_close(states[34], wide(torch.tensor([5] * int(lengths[34]))).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--data.max_prompt_tokens=31", r"features in states are of another (train|validation) tokens"),
        ("--model.encoder.layer=0", r"of another layer \(model\.encoder\.layer\)"),
        ("--model.encoder.features=elsewhere", r"elsewhere holds no features.*llmslm features --out"),
    ],
)
def test_a_cache_of_something_else_is_refused(recipe, capsys, change, message):
    with pytest.raises(SystemExit):
        fit(recipe, "llm_to_slm", "--model.encoder.features=states", change)
    assert re.search(message, capsys.readouterr().err)


def test_a_cache_of_another_encoder_is_refused(recipe, capsys):
    fit(recipe, "llm", "--trainer.max_steps=6")
    with pytest.raises(SystemExit):
        fit(recipe, "llm_to_slm", "--model.encoder.features=states")
    assert "of another encoder (model.encoder.source)" in capsys.readouterr().err


def test_shards_of_other_layers_are_not_taken_over(tmp_path):
    encoder = types.SimpleNamespace(
        config=LlamaConfig(), content_hash=lambda: "same", layer=[0, 2], quantization=None, max_positions=None
    )
    features.write_manifest(tmp_path, encoder, "llm", {})
    encoder.layer = [1, 2]
    with pytest.raises(UserError, match=r"of another encoder \(layer\): '\[0, 2\]', here it is '\[1, 2\]'"):
        features.write_manifest(tmp_path, encoder, "llm", {})
