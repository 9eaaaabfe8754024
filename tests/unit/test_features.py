"""The feature cache: training from it is training on the fly, without the LLM; what does not belong is refused."""

import csv
import os
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import LlamaConfig, LlamaModel

from evaluation.benchmarks import feature_cache
from llmslm.cli import main
from llmslm.data import features
from llmslm.data.shards import Shards
from llmslm.errors import UserError
from llmslm.models.encoder import Encoder
from llmslm.system import System
from tests import tiny
from tests.unit import toy


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A trained llm and the features that it wrote, in a folder that nobody changes."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMSLM_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        patch.setattr(features, "SHARD_BYTES", 4000)
        path = toy.write_recipe(folder, log_every_n_steps=1)
        fit(path, "llm")
        main(["features", "--config", path, "--out", "states"])
    return folder


@pytest.fixture
def recipe(written, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSLM_CACHE", str(written / "cache"))
    monkeypatch.setattr(features, "SHARD_BYTES", 4000)
    for name in ("runs", "states"):
        shutil.copytree(written / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return str(written / "toy.yaml")


def fit(recipe, system, *args):
    main(["fit", "--config", recipe, f"--model.system={system}", *args])


def losses(recipe, name, *args):
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={name}"]
    fit(recipe, "llm_to_slm", *logger, *args)
    with next(Path(name).rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[key]) for row in rows for key in ("train/loss", "val/loss", "val/bleu") if row.get(key)]


@pytest.mark.parametrize("packing", [[], ["--data.pack_tokens=48"]])
def test_training_from_the_cache_has_the_losses_of_training_on_the_fly(recipe, packing, monkeypatch):
    expected = losses(recipe, "fly", *packing)
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "from_source", lambda *_a, **_k: pytest.fail("the LLM was loaded"))
        cached = losses(recipe, "cached", "--model.encoder.features=states", *packing)
    for weights in Path("runs/toy/llm/system").glob("*.safetensors"):  # nobody asks for them
        weights.rename(weights.with_suffix(".away"))
    assert losses(recipe, "gone", "--model.encoder.features=states", *packing) == cached
    for weights in Path("runs/toy/llm/system").glob("*.away"):
        weights.rename(weights.with_suffix(".safetensors"))
    with monkeypatch.context() as patch:  # as where a GPU has room for them
        patch.setattr(features.StoredStates, "fits", lambda *_: True)
        assert losses(recipe, "resident", "--model.encoder.features=states", *packing) == cached
    assert cached == pytest.approx(expected, rel=1e-3)
    assert System.load("runs/toy/llm_to_slm").generate(["say alpha 0"], max_new_tokens=3)


def test_what_stands_for_the_encoder_reads_the_prompts_that_it_learned(written):
    encoder = features.StoredEncoder(written / "states")
    states = [torch.rand(length, encoder.width).bfloat16() for length in (3, 1)]
    encoder.learn([[4, 5, 6], [7]], states)
    ids = torch.tensor([[0, 0, 7], [4, 5, 6]])
    hidden, mask = encoder(ids, (ids > 0).long())
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert torch.equal(hidden[1], states[0])
    assert torch.equal(hidden[0, :1], states[1])
    with pytest.raises(UserError, match="cannot read other prompts"):
        encoder(ids[:, :2], torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(
        UserError, match=r"reads the LLM's embeddings.*model\.alignment to .*Offsets, or leave model\.en"
    ):
        encoder.embed_tokens(ids, (ids > 0).long())


def test_a_stopped_call_goes_on_where_it_was(recipe, monkeypatch):
    shards = sorted(Path("states").rglob("*.safetensors"))
    assert len(shards) > 4
    before = {shard: (shard.read_bytes(), shard.stat().st_mtime_ns) for shard in shards}
    shards[2].unlink()
    with pytest.raises(SystemExit):
        fit(recipe, "llm_to_slm", "--model.encoder.features=states")
    main(["features", "--config", recipe, "--out", "states"])
    assert {shard: shard.read_bytes() for shard in shards} == {shard: old for shard, (old, _) in before.items()}
    assert [s for s in shards if s.stat().st_mtime_ns != before[s][1]] == [shards[2]]


def test_what_a_killed_run_left_of_a_shard_is_removed(recipe, monkeypatch):
    shard = Path("states/train/00001.safetensors")
    shard.unlink()

    def stopped(_stored, path):
        path.with_name(".tmpXYZ").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llmslm.data.shards.save_file", stopped)
        patch.setattr("shutil.rmtree", lambda *_a, **_k: None)  # a killed process removes nothing
        with pytest.raises(SystemExit):
            main(["features", "--config", recipe, "--out", "states"])
    (left,) = Path("states/train").glob(".0*")
    other = left.with_name(left.name.replace(f"-{os.getpid()}.", f"-{os.getppid()}."))
    other.mkdir()  # of a process that runs: it writes the same shard
    main(["features", "--config", recipe, "--out", "states"])
    assert shard.is_file()
    assert list(Path("states").rglob(".*")) == [other]


def test_a_full_disk_ends_the_call_though_the_next_shards_are_encoded(recipe, monkeypatch, capsys):
    shutil.rmtree("states/train")

    def full(_stored, _path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("llmslm.data.shards.save_file", full)
    with pytest.raises(SystemExit):
        main(["features", "--config", recipe, "--out", "states"])
    assert "the disk is full" in capsys.readouterr().err
    assert not list(Path("states/train").iterdir())


def test_prompts_are_encoded_in_the_precision_of_training(recipe, monkeypatch):
    seen, forward = set(), Encoder.forward

    def spied(self, *args, **kwargs):
        seen.add(torch.is_autocast_enabled("cpu"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Encoder, "forward", spied)
    main(["features", "--config", recipe, "--out", "mixed", "--trainer.precision=bf16-mixed"])
    assert seen == {True}


def test_ranks_share_the_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD_BYTES", 100)
    lengths = torch.randint(1, 30, (35,)).numpy()
    rows = features.Dataset.from_dict({"prompt_ids": [[5] * int(n) for n in lengths]})
    encoder = Encoder(
        LlamaModel(LlamaConfig(**{k: v for k, v in toy.LLAMA.items() if k != "model_type"}, vocab_size=9))
    )
    codec = type("Codec", (), {"encoder_pad_id": 0})
    shards = features.shards_of(encoder, lengths)
    features.write_manifest(tmp_path, encoder, "llm", None, {"train": {"shards": len(shards)}})
    for rank in range(3):
        features.write_features(encoder, codec, rows, shards, tmp_path, "train", rank=rank, world_size=3)
    states = features.StoredStates(tmp_path, "train", lengths)
    stored = [states[i]["hidden_states"] for i in range(35)]
    assert all(rows.shape == (length, 32) for rows, length in zip(stored, lengths, strict=True))
    ids = torch.tensor([[5] * int(lengths[34])])
    torch.testing.assert_close(stored[34], encoder(ids, torch.ones_like(ids))[0][0].bfloat16(), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("limit", [1, 300, 10**9])
def test_shards_hold_no_more_than_their_limit_and_one_example(limit):
    lengths = torch.randint(0, 30, (200,)).numpy()
    shards = Shards(lengths, 8, limit)
    assert [example for shard in range(len(shards)) for example in shards.members(shard)] == list(range(200))
    for shard in range(len(shards)):
        members = shards.members(shard)
        assert lengths[members].sum() * 8 <= limit + lengths[members[-1]] * 8
        rows = [shards.rows(example) for example in members]
        assert {number for number, _ in rows} == {shard}
        assert [place.stop - place.start for _, place in rows] == lengths[members].tolist()
        assert shards.places(shard, members).tolist() == list(range(lengths[members].sum()))
        some = [members[-1], members[0]]
        assert shards.places(shard, some).tolist() == [n for e in some for n in range(200 * 30)[shards.rows(e)[1]]]
        assert [rows[0][1].start, *(place.stop for _, place in rows[:-1])] == [place.start for _, place in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--data.max_prompt_tokens=31", r"of another (train|validation) tokens \(.*data\.max_prompt_tokens.*\): '"),
        ("--model.encoder.layer=0", r"of another layer \(model\.encoder\.layer\)"),
        ("--model.encoder.quantization=8bit", r"of another quantization \(model\.encoder\.quantization\): 'None'"),
        ("--model.encoder.revision=abc", r"of another revision \(model\.encoder\.revision\): 'None', here it is 'abc'"),
        ("--model.encoder.features=elsewhere", r"elsewhere holds no features.*llmslm features --out"),
    ],
)
def test_a_cache_of_something_else_is_refused(recipe, capsys, change, message):
    with pytest.raises(SystemExit):
        fit(recipe, "llm_to_slm", "--model.encoder.features=states", change)
    assert re.search(message, capsys.readouterr().err)


def test_a_split_that_was_not_written_is_named(recipe, capsys):
    with pytest.raises(SystemExit):
        main(["test", "--config", recipe, "--model.encoder.features=states"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert "states has features of train and validation, none of test; leave model.encoder.features out" in line


def test_a_cache_of_another_encoder_is_refused(recipe, capsys):
    fit(recipe, "llm", "--trainer.max_steps=6")
    with pytest.raises(SystemExit):
        fit(recipe, "llm_to_slm", "--model.encoder.features=states")
    assert "of another encoder (model.encoder.source)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [("layer", [0, 2], [1, 2]), ("quantization", None, "8bit"), ("revision", "abc", "def")],
)
def test_shards_of_another_encoder_are_not_taken_over(tmp_path, name, ours, theirs):
    about = {"layer": [0, 2], "quantization": None, "revision": None, name: ours}

    def write():
        encoder = types.SimpleNamespace(
            config=LlamaConfig(), content_hash=lambda: "same", max_positions=None, hidden_size=8, **about
        )
        features.write_manifest(tmp_path, encoder, "llm", about["revision"], {})

    write()
    write()
    about[name] = theirs
    message = f"of another encoder ({name}): '{ours}', here it is '{theirs}'"
    with pytest.raises(UserError, match=re.escape(message)):
        write()


def test_a_cache_of_another_version_is_refused(tmp_path):
    (tmp_path / features.MANIFEST).write_text('{"version": 1}')
    with pytest.raises(UserError, match=r"has version 1, this llmslm reads 2: write the features again"):
        features.read_manifest(tmp_path)


def test_the_benchmark_compares_both_ways(recipe, monkeypatch):
    monkeypatch.setattr(feature_cache, "LLM", toy.T5)
    monkeypatch.setattr(feature_cache, "WARMUP", 1)
    found = feature_cache.measure(recipe, [], steps=3, rounds=1, examples=20)
    assert found["same_losses"]
    assert found["ratio"] == found["steps_per_s"]["cached"][0] / found["steps_per_s"]["on_the_fly"][0]
    assert (found["examples"], len(found["losses"]["cached"])) == (28, 3)
    tokens = Path("states/train/00000.safetensors").stat().st_size
    assert 0 < found["bytes_per_example"] < tokens


def test_the_folder_of_a_run_is_known_by_its_weights(tmp_path):
    for name in ("a", "b"):
        tiny.build("llama").save_pretrained(tmp_path / name / "system")
    one, other = (features.fingerprint_of(str(tmp_path / name)) for name in ("a", "b"))
    assert one == features.fingerprint_of(str(tmp_path / "a" / "system")) != other
