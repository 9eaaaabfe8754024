"""Operations, energy and the floor: known answers on a tiny model, nulls where nothing can be told."""

import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from test_systems import composed, system

from evaluation import cost
from evaluation.compare import Settings, compare
from evaluation.cost import NOT_MEASURED, measure_cost, token_floor_s, token_flops, token_joules
from evaluation.floor import floor_s
from evaluation.record import read_record
from evaluation.systems import Arm


def test_operations_are_two_for_each_weight_that_is_read():
    llm = system("llm", "llama")
    found = token_flops(llm, "a prompt")
    matrices = [p for name, p in llm.model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    weights = 2 * sum(p.numel() for p in matrices)
    assert weights < found["token_flops"] < 1.2 * weights  # attention comes on top
    assert found["first_token_flops"] > 5 * found["token_flops"]
    assert llm.decoder == "engine"


def test_the_encoder_counts_once():
    llm = system("llm", "llama")
    ours = token_flops(composed(llm), "a prompt")
    alone = token_flops(llm, "a prompt")
    assert ours["first_token_flops"] > 1.4 * alone["first_token_flops"]
    assert ours["token_flops"] == pytest.approx(alone["token_flops"], rel=0.01)


def test_work_that_the_counter_does_not_see_is_none():
    llm = system("llm", "llama")
    llm.model.generate = Mock(return_value=torch.zeros(1, 40, dtype=torch.long))
    assert token_flops(llm, "a prompt") == {"first_token_flops": None, "token_flops": None}


def test_a_system_that_makes_no_token_of_one_is_not_counted(monkeypatch):
    llm = system("llm", "llama")
    whole = llm.model.generate
    monkeypatch.setattr(
        llm.model,
        "generate",
        lambda *args, generation_config, **rest: (
            torch.zeros(1, 0, dtype=torch.long)
            if generation_config.max_new_tokens == 1
            else whole(*args, generation_config=generation_config, **rest)
        ),
    )
    assert token_flops(llm, "a prompt") == {"first_token_flops": None, "token_flops": None}


def test_energy_by_the_driver(dummy, monkeypatch):
    readings = iter([0, 7_000, 10_000])  # millijoules: a trial, before, after
    driver = SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-abc": "handle"}.get,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings),
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr(cost, "_ENERGY_S", 0.05)
    system = dummy()
    system.device = torch.device("cuda")
    found = token_joules(system, ["a b"], 4)
    assert found == pytest.approx(3 / (4 * system.calls))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert token_joules(system, ["a b"], 4) is None
    system.device = torch.device("cpu")
    assert token_joules(system, ["a b"], 4) is None


def test_floors_stand_in_the_record(examples, tmp_path, monkeypatch, dummy):
    monkeypatch.setattr(cost, "_bandwidth", lambda device: 1e9)
    llm = system("llm", "llama")
    settings = Settings(out=tmp_path, max_new_tokens=4, warmups=0, runs=1, resamples=10, speed_batch_sizes=(2,))
    short = type(examples)("short", "test", "0", 4, ["a", "b", "c", "d"], ["one", "two", "six", "ten"], ["x"] * 4)
    record, other = (read_record(path) for path in compare([Arm(llm), Arm(dummy("slm"))], short, settings))
    natural, fixed = record["speed"]
    assert fixed["floor_s"] == pytest.approx(floor_s(llm.engine, 2, 5, 4, 1e9))
    assert "floor_s" not in natural
    assert record["cost"]["token_flops"] > 0
    assert record["cost"]["copy_bandwidth_bytes_per_s"] == 1e9
    assert other["cost"] == NOT_MEASURED
    assert other["speed"][1]["floor_s"] is None


def test_no_floor_where_tokens_are_not_decoded_one_by_one():
    llm = system("llm", "llama")
    llm.decoder = "generate"
    assert token_floor_s(llm, [["a"]], 4) is None


def test_the_floor_is_that_of_the_prompts_that_are_timed(monkeypatch):
    monkeypatch.setattr(cost, "_bandwidth", lambda device: 1e9)
    llm = system("llm", "llama")
    short, long = (token_floor_s(llm, [[prompt]], 4) for prompt in ("a", "a longer prompt than that, a, a, a"))
    assert short < long
    assert token_floor_s(llm, [["a"], ["a longer prompt than that, a, a, a"]], 4) == pytest.approx((short + long) / 2)


def test_nothing_is_made_up_for_other_programs(dummy):
    assert measure_cost(dummy(), ["a"], 4) == NOT_MEASURED
