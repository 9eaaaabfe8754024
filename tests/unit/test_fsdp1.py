"""Recipes that name Lightning's FSDPStrategy: the same sharding by FSDP2, or a line that says why not."""

import pytest

from llmslm.errors import UserError
from llmslm.fsdp1 import FSDP2, translated
from llmslm.parallel import Fsdp

FSDP1 = "lightning.pytorch.strategies.FSDPStrategy"


def options(**given):
    found = translated({"class_path": FSDP1, "init_args": given}, 8)
    assert found["class_path"] == FSDP2
    Fsdp(**found["init_args"])
    return found["init_args"]


def test_each_kind_has_its_equal():
    assert translated("fsdp", 8) == {"class_path": FSDP2, "init_args": {}}
    assert options(auto_wrap_policy="some", state_dict_type="full", cpu_offload=None) == {}
    assert options(sharding_strategy="FULL_SHARD", activation_checkpointing=["a.Block"]) == {
        "activation_checkpointing": True
    }
    assert options(sharding_strategy="SHARD_GRAD_OP") == {"reshard_after_forward": False}
    assert options(sharding_strategy="HYBRID_SHARD") == {"shard_size": 8}
    hybrid = {"class_path": FSDP1, "init_args": {"sharding_strategy": "HYBRID_SHARD"}}
    assert translated(hybrid, "2")["init_args"] == {"shard_size": 2}  # --trainer.devices 2
    assert options(sharding_strategy="HYBRID_SHARD", device_mesh=(4, 2)) == {"shard_size": 2}


@pytest.mark.parametrize("strategy", ["auto", "ddp", {"class_path": FSDP2, "init_args": {"shard_size": 2}}])
def test_other_strategies_stay(strategy):
    assert translated(strategy, 8) is strategy


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("fsdp_cpu_offload", "cpu_offload is True, which is not done here"),
        ({"class_path": FSDP1, "init_args": {"mixed_precision": {"param_dtype": "x"}}}, "set trainer.precision"),
        ({"class_path": FSDP1, "init_args": {"sharding_strategy": "NO_SHARD"}}, "NO_SHARD; expected one of .*: ddp"),
        ({"class_path": FSDP1, "init_args": {"sharding_strategy": "HYBRID_SHARD"}}, "trainer.devices is 'auto'"),
    ],
)
def test_what_fsdp2_does_not_do_is_refused(strategy, message):
    with pytest.raises(UserError, match=message):
        translated(strategy, "auto")
