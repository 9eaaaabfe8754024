"""Recipes that name Lightning's FSDPStrategy (FSDP1): the same division of the same weights by `llmslm.parallel.Fsdp`.

FSDP1 itself would train, but neither clip by norm, nor generate in a validation, nor save or resume without the frozen
encoder: its weights are whole only within the forward of the LightningModule. PyTorch deprecates it.
"""

from collections.abc import Mapping
from typing import Any

from llmslm.errors import UserError

FSDP2 = "llmslm.parallel.Fsdp"
NAMES = ("fsdp", "FSDPStrategy")
_PREFIX = "trainer.strategy.init_args"
_KEEPS_GATHERED = ("SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2")
_HYBRID = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
_KINDS = ("FULL_SHARD", *_KEEPS_GATHERED, "HYBRID_SHARD")
_REFUSED = {
    "cpu_offload": f"leave it out; the frozen encoder alone can lie with the hosts ({FSDP2} with encoder: offloaded)",
    "mixed_precision": "leave it out and set trainer.precision, for example to bf16-mixed",
}


def translated(strategy: Any, devices_per_node: Any) -> Any:
    """Turn FSDP1 into FSDP2, as a recipe writes it; return any other strategy as it is.

    The blocks of the models are the units, whatever auto_wrap_policy says; each checkpoint is a folder that any kind of
    run reads, whatever state_dict_type says.

    Args:
        strategy: a name, or class_path and init_args.
        devices_per_node: the recipe's trainer.devices, which hybrid sharding takes for its shards.

    Raises:
        UserError: if FSDP2 does not do here what the recipe asks for.
    """
    if isinstance(strategy, str) and strategy.startswith("fsdp"):
        given: Mapping[str, Any] = {"cpu_offload": True} if strategy == "fsdp_cpu_offload" else {}
    elif isinstance(strategy, Mapping) and strategy["class_path"].rpartition(".")[2] in NAMES:
        given = strategy.get("init_args") or {}
    else:
        return strategy
    for key, advice in _REFUSED.items():
        if given.get(key):
            raise UserError(f"{_PREFIX}.{key} is {given[key]!r}, which is not done here; {advice}")
    kind = str(given.get("sharding_strategy") or "FULL_SHARD").rpartition(".")[2]
    if kind not in _KINDS:
        raise UserError(
            f"{_PREFIX}.sharding_strategy is {kind}; expected one of {', '.join(_KINDS)}, or trainer.strategy: ddp"
        )
    again = given.get("activation_checkpointing") or given.get("activation_checkpointing_policy")
    options: dict[str, Any] = {"activation_checkpointing": True} if again else {}
    if kind in _KEEPS_GATHERED:
        options["reshard_after_forward"] = False
    if kind in _HYBRID:
        options["shard_size"] = _shard_size(given.get("device_mesh"), devices_per_node)
    return {"class_path": FSDP2, "init_args": options}


def _shard_size(mesh: Any, devices_per_node: Any) -> int:
    """Return how many devices share a copy: a row of the mesh, or a node."""
    size = mesh[1] if mesh else devices_per_node
    if isinstance(size, str) and size.isdigit():  # as the command line has it
        size = int(size)
    if not isinstance(size, int) or size < 1:
        raise UserError(
            f"hybrid sharding shares a copy of the weights in a node, and trainer.devices is {size!r}; set it to the "
            f"number of devices of a node, or use {FSDP2} with shard_size"
        )
    return size
