"""The data module under a real Trainer: what is trained, in which order, and how a run goes on."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from llmslm.data.codec import Codec
from llmslm.data.datamodule import TextDataModule
from llmslm.data.sources import HubDataset, TextFiles
from llmslm.data.tokenizer import TrainedBpe
from llmslm.errors import UserError

BATCH, ROWS = 4, 22  # 5 full batches an epoch


class Recorder(L.LightningModule):
    """Notes the texts that it is given."""

    features = logits = None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.trained, self.validated, self.predicted = [], [], []

    def tokenizer_sources(self):
        return None, None

    def make_codec(self, data):
        return Codec(
            data.slm_tokenizer, text_format=data.text_format, is_encoder_decoder=True, decoder_start_token_id=0
        )

    def training_step(self, batch):
        assert "examples" not in batch
        codec = self.trainer.datamodule.codec
        self.trained.append(sorted(codec.decode(batch["input_ids"])))
        return self.weight.sum()

    def validation_step(self, batch):
        assert len(batch["examples"]) == len(batch["labels"])
        self.validated += [example["id"] for example in batch["examples"]]

    def predict_step(self, batch):
        return batch["examples"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A dataset in the hub's format: prompts of 1 to 7 words, in four training shards."""
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    path = tmp_path / "pairs"
    path.mkdir()
    for name, rows in (("train", range(ROWS)), ("validation", range(30, 39)), ("test", range(40, 45))):
        lines = [json.dumps({"prompt": f"{i}" + " word" * (i % 7), "target": f"t{i}"}) for i in rows]
        shards = 4 if name == "train" else 1
        for shard in range(shards):
            (path / f"{name}-{shard:05d}-of-{shards:05d}.jsonl").write_text("\n".join(lines[shard::shards]))
    return path


def data(folder, streaming=True, **kwargs):
    source = HubDataset(str(folder), "prompt", "target", streaming=streaming)
    return TextDataModule(source, TrainedBpe(vocab_size=270), **({"micro_batch_size": BATCH} | kwargs))


def fit(folder, datamodule, steps, ckpt_path=None, after_validation=False, **kwargs):
    """Train and return the module; the checkpoints of all steps are kept in `ckpt`."""
    module = Recorder()
    when = {} if after_validation else {"every_n_train_steps": 1}
    checkpoint = ModelCheckpoint(folder / "ckpt", "{step}", save_top_k=-1, **when)
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    settings |= {"limit_val_batches": 0, "use_distributed_sampler": False, "callbacks": [checkpoint]} | kwargs
    L.Trainer(max_steps=steps, default_root_dir=folder, **settings).fit(module, datamodule, ckpt_path=ckpt_path)
    return module


def test_an_epoch_holds_each_example_once_in_a_new_order(folder):
    batches = fit(folder, data(folder, streaming=False), 10).trained
    for epoch in (batches[:5], batches[5:]):
        assert len({text for batch in epoch for text in batch}) == 5 * BATCH
    assert batches[:5] != batches[5:]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_next_batch(folder, workers):
    L.seed_everything(1)
    whole = fit(folder, data(folder, streaming=False, num_workers=workers), 12).trained
    for step in (3, 5, 8, 10) if workers else range(1, 12):
        L.seed_everything(step + 10)  # the order is that of the checkpoint
        ckpt = folder / "ckpt" / f"step={step}.ckpt"
        rest = fit(folder, data(folder, streaming=False, num_workers=workers), 12, ckpt).trained
        assert rest == whole[step:], step


@pytest.mark.parametrize("interval", [1.0, 3])
def test_so_does_one_that_was_saved_after_validation(folder, interval):
    L.seed_everything(1)
    kwargs = {
        "after_validation": True,
        "val_check_interval": interval,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
    }
    whole = fit(folder, data(folder, streaming=False), 12, **kwargs).trained
    checkpoints = sorted((folder / "ckpt").glob("*.ckpt"))
    assert len(checkpoints) >= 2
    for path in checkpoints:
        step = int(path.stem.partition("=")[2])
        assert fit(folder, data(folder, streaming=False), 12, path, **kwargs).trained == whole[step:], step


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_shuffled_anew_in_each_pass_and_resumed(folder, workers):
    L.seed_everything(1)
    whole = fit(folder, data(folder, num_workers=workers), 18).trained
    passes = [whole[i : i + 6] for i in range(0, 18, 6)]
    for rows in passes:
        assert sorted(text for batch in rows for text in batch) == sorted(
            f"{i}" + " word" * (i % 7) for i in range(ROWS)
        )
    assert passes[0] != passes[1] != passes[2]
    for step in (2, 6, 9):
        ckpt = folder / "ckpt" / f"step={step}.ckpt"
        assert fit(folder, data(folder, num_workers=workers), 14, ckpt).trained == whole[step:14], step


def test_a_stream_needs_an_end(folder):
    with pytest.raises(UserError, match=r"pairs is streamed and has no end: set trainer\.max_steps"):
        fit(folder, data(folder), -1, max_epochs=1)


@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_has_all_examples_with_their_texts(folder, streaming):
    datamodule = data(folder, streaming=streaming, eval_batch_size=2)
    module = fit(folder, datamodule, 5, limit_val_batches=1.0, num_sanity_val_steps=0, val_check_interval=5)
    assert len(module.validated) == len(set(module.validated)) == 9
    trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", default_root_dir=folder)
    examples = [example for batch in trainer.predict(module, datamodule) for example in batch]
    assert {(e["prompt"].split()[0], e["target"]) for e in examples} == {(str(i), f"t{i}") for i in range(40, 45)}


def test_a_sample_is_spread_over_the_split(folder):
    datamodule = data(folder, eval_batch_size=2)
    fit(folder, datamodule, 1)
    batches = datamodule.sample("validation", 3)
    assert [[example["target"] for example in batch] for batch in batches] == [["t33", "t30"], ["t36"]]
    assert len([example for batch in datamodule.sample("validation", 99) for example in batch]) == 9


def ranks_of(datamodule, world_size):
    """The training batches that each rank of a finished fit's data module would get."""
    result = []
    for rank in range(world_size):
        trainer = SimpleNamespace(global_rank=rank, world_size=world_size, max_steps=1, datamodule=datamodule)
        datamodule.trainer = SimpleNamespace(
            lightning_module=SimpleNamespace(trainer=trainer, device=torch.device("cpu"), features=None, logits=None)
        )
        result.append(datamodule.train_dataloader())
    return result


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_examples(folder, streaming, world_size):
    datamodule = data(folder, streaming=streaming, micro_batch_size=1)
    fit(folder, datamodule, 1)
    one_pass = [batch for loader in ranks_of(datamodule, world_size) for batch in DataLoader.__iter__(loader)]
    seen = [datamodule.codec.decode(batch["input_ids"])[0] for batch in one_pass]
    assert len(seen) == len(set(seen))
    assert len(seen) == ROWS if streaming else len(seen) == ROWS // world_size * world_size


def test_tokenised_data_is_cached_for_the_codec(folder, monkeypatch):
    files = {}
    for split in ("train", "validation"):
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text('{"prompt": "a b c", "target": "d"}\n' * 5)
    source = TextFiles(**files)
    fit(folder, TextDataModule(source, TrainedBpe(vocab_size=270)), 1)
    monkeypatch.setattr(Codec, "encode", lambda *args: pytest.fail("tokenised twice"))
    fit(folder, TextDataModule(source, TrainedBpe(vocab_size=270), micro_batch_size=2), 1)
    with pytest.raises(pytest.fail.Exception, match="tokenised twice"):
        fit(folder, TextDataModule(source, TrainedBpe(vocab_size=270), prompt_template="say {prompt}"), 1)


def test_rows_that_are_cut_are_counted(folder):
    datamodule = data(folder, streaming=False, max_prompt_tokens=6, truncate_prompt="right")
    with (
        pytest.warns(UserWarning, match=r"train: \d+ of 22 prompts were cut to 6 tokens \(right\)"),
        pytest.warns(UserWarning, match="validation: 5 of 9 prompts"),
    ):
        fit(folder, datamodule, 1, limit_val_batches=0)


def test_mistakes(folder):
    with pytest.raises(UserError, match=r"data\.micro_batch_size is 0"):
        data(folder, micro_batch_size=0)
