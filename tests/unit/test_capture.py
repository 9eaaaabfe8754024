"""What is captured as a CUDA graph asks the host for nothing: the step of a fit, and that of a plan."""

import pytest
import torch

from llmslm import training
from llmslm.cli import main
from llmslm.module import SystemModule
from llmslm.planning.command import measure
from llmslm.planning.costs import DEVICES
from llmslm.planning.job import Job, World
from tests.host import asked, watch_graphs
from tests.unit import toy

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
CONFIGS = {"llama": toy.LLAMA, "gpt2": GPT2, "t5": toy.T5}


ASKING = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool((x > 0).all()),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "chosen": lambda x: x[x > 0],
    "written": lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
    "masked": lambda x: x.masked_select(x > 0),
    "repeated": lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.long)),
    "numbers": lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
    "number": lambda x: torch.as_tensor(2.0, device=x.device),
    "indices": lambda x: x[[0, 1]],
    "cpu": lambda x: x.cpu(),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
}
STILL = {
    "index": lambda x: x[torch.arange(2)],
    "where": lambda x: torch.where(x > 0, x, 0),
    "filled": lambda x: x.masked_fill(x > 0, 0),
    "made": lambda x: x.new_zeros(()) + torch.full((2,), 3.0),
    "slice": lambda x: x[:1] * 2,
    "assigned": lambda x: x.clone().__setitem__(slice(1), 3),
}


@pytest.mark.parametrize("name", ASKING)
def test_what_asks_the_host_is_seen(name):
    found = []
    with asked(found):
        ASKING[name](torch.ones(2))
    assert found


@pytest.mark.parametrize("name", STILL)
def test_what_does_not_is_not(name):
    found = []
    with asked(found):
        STILL[name](torch.ones(2))
    assert not found


def test_a_backward_is_seen():
    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * gradient.sum().item()

    found = []
    with asked(found):
        Asks.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert found == ["aten._local_scalar_dense.default"]


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Fit a system with packed rows, as where it is captured; returns what its graphs asked of the host."""
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    recipe = toy.write_recipe(tmp_path)

    def run(system, *args, graphed=True):
        root = f"--trainer.default_root_dir={tmp_path}/{system}"
        packed = ["--data.pack_tokens=48", "--data.micro_batch_size=2", f"--model.system={system}", root]
        with monkeypatch.context() as patch:
            patch.setattr(SystemModule, "_may_be_graphed", graphed)
            found, losses = watch_graphs(patch)
            training.run(["fit", "--config", recipe, *packed, *args])
        assert bool(losses) == graphed
        return found

    return run


def config_of(key, config):
    """Arguments that replace a model's config, which would be merged with the recipe's."""
    return [f"--model.{key}={{'config': {config}}}"]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("system", ["slm", "llm"])
def test_a_language_models_fit_asks_nothing(fit, system, family):
    assert fit(system, *config_of(system, CONFIGS[family]), "--model.label_smoothing=0.1") == []


@pytest.mark.parametrize("slm", CONFIGS)
@pytest.mark.parametrize("llm", CONFIGS)
def test_a_compositions_fit_asks_nothing(fit, tmp_path, llm, slm):
    models = [*config_of("llm", CONFIGS[llm]), *config_of("slm", CONFIGS[slm])]
    fit("llm", *models, graphed=False)
    assert fit("llm_to_slm", *models) == []
    if llm == slm:
        recipe = ["--config", str(tmp_path / "toy.yaml"), *models, f"--trainer.default_root_dir={tmp_path}/llm_to_slm"]
        main(["features", *recipe, "--out", "states"])
        assert fit("llm_to_slm", *models, "--model.encoder.features=states") == []


@pytest.mark.parametrize("pack_tokens", [24, 96])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("system", ["slm", "llm", "llm_to_slm", "stored"])
def test_a_plans_measurement_asks_nothing(monkeypatch, system, family, pack_tokens):
    encoder = {"features": "folder"} if system == "stored" else {}
    models = {"llm": {"config": CONFIGS[family]}, "slm": {"config": CONFIGS[family]}, "encoder": encoder}
    data = {"tokenizer": {"vocab_size": 300}, "micro_batch_size": 2, "max_prompt_tokens": 16, "max_target_tokens": 8}
    model = models | {"system": "llm_to_slm" if system == "stored" else system}
    job = Job.of({"model": model, "data": data | {"pack_tokens": pack_tokens}, "trainer": {}})
    monkeypatch.setattr(Job, "is_graphed", lambda *_: True)
    found, losses = watch_graphs(monkeypatch)
    measure(job, World(DEVICES["h200"], 1, 8, 1), steps=1, warmups=2)
    assert losses[-1] > 0
    assert found == []
