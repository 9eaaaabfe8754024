"""The LightningModule under a real Trainer, where it differs from Lightning's defaults."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from llmslm.errors import UserError
from llmslm.models.blocks import blocks, compile_blocks
from llmslm.module import SANITY_TOKENS, SystemModule
from llmslm.training import run
from tests import tiny
from tests.unit import toy
from tests.unit.models.compositions import compose


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    return toy.write_recipe(tmp_path, default_root_dir=str(tmp_path / "run"), max_steps=2, gradient_clip_val=1.0)


def test_fused_optimizers_clip_in_mixed_precision(recipe):
    fused = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3", "--model.optimizer.fused=true"]
    run(["fit", "--config", recipe, "--model.system=slm", *fused, "--trainer.precision=bf16-mixed"])


def test_all_systems_train_on_packed_rows(recipe, tmp_path):
    for system in ("llm", "slm", "llm_to_slm"):
        root = f"--trainer.default_root_dir={tmp_path / system}"
        run(["fit", "--config", recipe, f"--model.system={system}", "--data.pack_tokens=48", root])


def test_a_system_that_cannot_pack_says_so(recipe, tmp_path):
    root = f"--trainer.default_root_dir={tmp_path}"
    run(["fit", "--config", recipe, "--model.system=llm", root])
    fusion = "--model.fusion=llmslm.models.fusion.PrefixOnly"
    source = f"--model.encoder.source={tmp_path}/system"
    with pytest.warns(
        UserWarning, match=r"data.pack_tokens has no effect: this system cannot pack; a batch has 8 exam"
    ):
        run(["fit", "--config", recipe, "--data.pack_tokens=48", fusion, source, f"{root}/composed"])


def test_each_block_is_compiled_in_place():
    model = tiny.build("llama")
    names = list(model.state_dict())
    assert compile_blocks(model) == 3
    assert all(block._compiled_call_impl is not None for block in blocks(model))
    assert list(model.state_dict()) == names


@pytest.mark.parametrize(("family", "count"), [("llama", 3), ("gpt2", 3), ("qwen2", 3), ("t5", 6), ("bart", 4)])
def test_blocks_are_found_in_each_family(family, count):
    assert len(blocks(tiny.build(family))) == count


def test_blocks_of_a_composition_are_those_of_both_models(tmp_path):
    model = compose("t5", "llama", tmp_path)
    assert len(blocks(model)) == compile_blocks(model) == 3 + 3
    assert model.projector._compiled_call_impl is not None


def test_label_smoothing_and_dropout_change_training_not_validation(recipe, tmp_path):
    losses = {}
    for name, options in {"plain": [], "smooth": ["--model.label_smoothing=0.2", "--model.dropout=0.3"]}.items():
        seen = Losses()
        once = [
            "--trainer.max_steps=1",
            "--trainer.val_check_interval=1",
            "--model.optimizer.lr=0.0",
            f"--trainer.default_root_dir={tmp_path / name}",
        ]
        optimizer = "--model.optimizer=torch.optim.SGD"
        run(["fit", "--config", recipe, "--model.system=slm", optimizer, *once, *options], callbacks=[seen])
        losses[name] = seen.values
    assert losses["plain"]["val/loss"] == losses["smooth"]["val/loss"]
    assert losses["plain"]["train/loss"] != losses["smooth"]["train/loss"]


def test_a_checkpoint_holds_an_llms_own_encoder_and_of_adapters_no_base(recipe, tmp_path):
    """The frozen encoder of a composition is left out by its name, which T5's own encoder has too."""
    run(["fit", "--config", recipe, "--model.system=llm", f"--trainer.default_root_dir={tmp_path / 'llm'}"])
    names = {name.split(".")[1] for name in checkpoint(tmp_path / "llm")["state_dict"]}
    assert names == {"encoder", "decoder", "shared", "lm_head"}
    source = [f"--model.slm.source={tmp_path / 'llm' / 'system'}", "--model.slm.config=null"]
    lora = ["--model.system=slm", *source, "--model.slm.train.rank=2", "--model.slm.train.dropout=0.1"]
    root = f"--trainer.default_root_dir={tmp_path / 'slm'}"
    run(["fit", "--config", recipe, *lora, root])
    assert all(".lora_" in name for name in checkpoint(tmp_path / "slm")["state_dict"])
    run(["fit", "--config", recipe, *lora, root, "--ckpt_path=last", "--trainer.max_steps=4"])
    assert checkpoint(tmp_path / "slm")["global_step"] == 4
    with pytest.raises(UserError, match=r"its train is \{'rank': 2.*the recipe's is \{'rank': 3"):
        run(["fit", "--config", recipe, *lora, root, "--ckpt_path=last", "--model.slm.train.rank=3"])


def test_a_system_with_nothing_to_train_is_refused(recipe):
    with pytest.raises(UserError, match=r"model\.slm\.train is nothing, so the system slm has nothing to train"):
        run(["fit", "--config", recipe, "--model.system=slm", "--model.slm.train=nothing"])


def checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_bleu_is_of_examples_from_all_of_the_split(recipe, monkeypatch):
    """Not of its longest ones, which come first in evaluation."""
    seen = []

    def predict(module, examples):
        seen.append([example["id"] for example in examples])
        return [example["target"] for example in examples]

    monkeypatch.setattr("llmslm.module.SystemModule.predict", predict)
    run(
        [
            "fit",
            "--config",
            recipe,
            "--model.system=slm",
            "--trainer.num_sanity_val_steps=0",
            "--data.eval_batch_size=3",
        ]
    )
    assert sorted(seen[0] + seen[1]) == ["validation-0", "validation-2", "validation-4", "validation-6"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_examples_of_bleu(world_size):
    """Each is counted once, and all ranks generate equally often: they may share the encoder."""
    batches = [[{"target": f"{batch} {row}"} for row in range(2)] for batch in range(4)]
    counted, calls = [], []
    for rank in range(world_size):
        data = SimpleNamespace(sample=lambda split, count: batches)
        trainer = SimpleNamespace(datamodule=data, sanity_checking=False, world_size=world_size, global_rank=rank)
        generated = []
        module = SimpleNamespace(
            trainer=trainer,
            bleu_examples=8,
            predict=lambda examples, generated=generated: generated.append(1) or [e["target"] for e in examples],
            val_bleu=SimpleNamespace(update=lambda texts, targets: counted.extend(texts)),
        )
        SystemModule._predict_sample(module, "validation")
        calls.append(len(generated))
    assert len(set(calls)) == 1
    assert sorted(counted) == sorted(example["target"] for batch in batches for example in batch)


@pytest.mark.parametrize(("sanity_checking", "tokens"), [(True, SANITY_TOKENS), (False, 64)])
def test_predictions_before_training_are_short(monkeypatch, sanity_checking, tokens):
    """An untrained model writes as long as it may: seconds that say nothing."""
    asked = []
    made = SimpleNamespace(generate=lambda texts, max_new_tokens: asked.append(max_new_tokens) or [])
    monkeypatch.setattr("llmslm.module.System", lambda *_, **__: made)
    monkeypatch.setattr("llmslm.module.gathered", nullcontext)
    codec = SimpleNamespace(text_format=SimpleNamespace(max_target_tokens=64))
    module = SimpleNamespace(
        system="slm",
        trainer=SimpleNamespace(sanity_checking=sanity_checking),
        _built=torch.nn.Linear(1, 1),
        _built_codec=codec,
    )
    SystemModule.predict(module, [{"prompt": "a"}])
    assert asked == [tokens]


class Losses(Callback):
    def on_train_end(self, trainer, pl_module):
        self.values = {name: float(trainer.callback_metrics[name]) for name in ("train/loss", "val/loss")}
