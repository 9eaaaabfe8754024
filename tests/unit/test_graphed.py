"""A step by a graph is the step without one."""

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from llmslm import training
from llmslm.data.codec import IGNORED, targets_of
from llmslm.graphed import GraphedLoss
from llmslm.module import SystemModule
from llmslm.target_logits import cross_entropy
from tests.unit import toy

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
compiled = pytest.mark.filterwarnings(
    "ignore:The .grad attribute",  # torch's compiler looks at it and hides the warning
    "ignore:TensorFloat32 tensor cores",  # its advice, for float32 on CUDA
)
DROPOUT = {"slm": "--model.dropout=0.1", "llm": "--model.llm.config.dropout_rate=0.1"}  # a T5 has its own


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def squares(model):
    return lambda batch: (model(batch["x"]) ** 2).mean()


def gradients(model, loss):
    model.zero_grad()
    (2 * loss).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
def test_gradients_are_those_without(model, device):
    unused = nn.Parameter(torch.ones(2, device=device))
    loss_of = squares(model.to(device))
    graphed = GraphedLoss(loss_of, [*model.parameters(), unused])
    for rows in (3, 3, 3, 5, 3, 5, 5, 3):
        batch = {"x": torch.randn(rows, 4, device=device)}
        expected = gradients(model, loss_of(batch))
        torch.testing.assert_close(gradients(model, graphed(batch)), expected)
    assert unused.grad is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
def test_gradients_add_up(model, device):
    graphed = GraphedLoss(squares(model.to(device)), model.parameters())
    batches = [{"x": torch.randn(3, 4, device=device)} for _ in range(3)]
    graphed(batches[0])
    expected = gradients(model, sum(squares(model)(batch) for batch in batches))
    model.zero_grad()
    for batch in batches:
        (2 * graphed(batch)).backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


def test_a_shape_that_comes_again_has_a_graph(model):
    runs = []

    def counted(batch):
        runs.append(batch["x"])
        return squares(model)(batch)

    graphed = GraphedLoss(counted, model.parameters())
    batches = [{"x": torch.randn(rows, 4)} for rows in (3, 3, 5, 3, 5)]
    for batch in batches:
        graphed(batch)
    buffers = [any(run is batch["x"] for batch in batches) for run in runs]
    assert buffers == [True, False, True, False, False]
    assert runs[1] is runs[3]


@on_cuda
def test_each_step_drops_others(model):
    dropping = nn.Sequential(model, nn.Dropout(0.5)).cuda()
    graphed = GraphedLoss(squares(dropping), dropping.parameters())
    batch = {"x": torch.randn(64, 4, device="cuda")}
    losses = [graphed(batch).item() for _ in range(4)]
    assert len(set(losses)) == 4
    torch.manual_seed(1)
    once = graphed(batch).item()
    torch.manual_seed(1)
    assert graphed(batch).item() == once


@on_cuda
def test_what_cannot_be_captured_is_computed_as_ever(model):
    model = nn.Sequential(model, nn.Dropout(0.5)).cuda()

    def asks(batch):
        loss = squares(model)(batch)
        assert loss.item() > 0  # the host waits for a value
        return loss

    graphed = GraphedLoss(asks, model.parameters())
    batch = {"x": torch.randn(64, 4, device="cuda")}
    graphed(batch)
    with pytest.warns(UserWarning, match="launched kernel by kernel"):
        first = graphed(batch)
    assert first.item() > 0
    del first
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graphed(batch).backward()
    assert graphed(batch).item() != graphed(batch).item()
    assert torch.cuda.memory_reserved() <= before + 2 * 2**20
    assert GraphedLoss(squares(model), model.parameters())(batch).item() > 0


def test_targets_have_room_left_over():
    labels = torch.tensor([[IGNORED, 5, 6], [IGNORED, IGNORED, 7]])
    exact, roomy = targets_of(labels), targets_of(labels, 5)
    assert exact["target_ids"].tolist() == [5, 6, 7]
    assert exact["target_positions"].tolist() == [[0, 0, 1], [1, 2, 2]]
    assert roomy["target_ids"].tolist() == [5, 6, 7, IGNORED, IGNORED]
    assert roomy["target_positions"][:, :3].tolist() == exact["target_positions"].tolist()
    assert len(targets_of(labels, 2)["target_ids"]) == 4
    logits = torch.randn(5, 9)
    for smoothing in (0.0, 0.1):
        expected = cross_entropy(logits[:3], exact["target_ids"], smoothing)
        torch.testing.assert_close(cross_entropy(logits, roomy["target_ids"], smoothing), expected)


class Losses(Callback):
    """Keeps the loss of each step, and the shapes of what was trained on."""

    def __init__(self):
        self.losses, self.targets = [], set()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.targets.add(len(batch["target_ids"]))


def losses(folder, *args, run="run", **trainer):
    recipe = toy.write_recipe(folder, max_steps=8, val_check_interval=4, **trainer)
    packed = ["--data.pack_tokens=48", "--data.micro_batch_size=2"]
    watch = Losses()
    root = f"--trainer.default_root_dir={folder}/{run}"
    training.run(["fit", "--config", recipe, *packed, root, *args], callbacks=[watch])
    return watch


@pytest.mark.parametrize("system", ["slm", "llm"])
def test_packed_batches_have_one_number_of_targets(system, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    assert len(losses(tmp_path, f"--model.system={system}").targets) == 1


@on_cuda
@compiled
@pytest.mark.filterwarnings("error:training steps are launched")
@pytest.mark.parametrize("system", DROPOUT)
def test_what_recipes_ask_for_is_captured(system, tmp_path, monkeypatch):
    """Mixed precision, FlashAttention, dropout, a fused optimizer, workers, rows of two lengths."""
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    fused = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3", "--model.optimizer.fused=true"]
    args = [f"--model.system={system}", "--model.compile=true", DROPOUT[system], *fused]
    args += ["--data.pack_tokens=256", "--data.num_workers=2", "--model.label_smoothing=0.1"]
    replays = []
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph, own=torch.cuda.CUDAGraph.replay: replays.append(own(graph))
    )
    watch = losses(tmp_path, *args, accelerator="gpu", devices=1, precision="bf16-mixed", gradient_clip_val=1.0)
    assert len(replays) >= len(watch.losses) - 2
    assert all(loss > 0 for loss in watch.losses)


@on_cuda
def test_the_first_replay_draws_what_a_step_without_a_graph_would(model):
    dropping = nn.Sequential(model, nn.Dropout(0.5)).cuda()
    graphed = GraphedLoss(squares(dropping), dropping.parameters())
    batch, found = {"x": torch.randn(64, 4, device="cuda")}, []
    for _ in range(3):
        torch.manual_seed(1)
        found.append(graphed(batch).item())
    assert found[0] == found[1] == found[2]


@compiled
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("system", ["slm", "llm", "llm_to_slm"])
@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=on_cuda)])
def test_a_run_by_graphs_is_the_run_without(accelerator, system, accumulated, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    args = [f"--model.system={system}", f"--model.compile={str(accelerator == 'gpu').lower()}"]
    trainer = {"accelerator": accelerator, "devices": 1, "accumulate_grad_batches": accumulated}
    if system == "llm_to_slm":
        losses(tmp_path, "--model.system=llm", run="llm", **trainer)  # beside it, where the composition looks for it
    found = []
    for graphs in (False, True):
        monkeypatch.setattr(SystemModule, "_may_be_graphed", graphs)
        found.append(losses(tmp_path, *args, **trainer).losses)
    assert found[1] == pytest.approx(found[0], rel=1e-5 if accelerator == "cpu" else 1e-3)
