"""What all tests share: quiet libraries, a fixed seed, tiny models in the hub's folder format."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where Triton is imported, by whatever test comes first

_LONG = (
    "distributed",
    "unit/evaluation/test_experiment.py",
    *(
        f"faults/test_{name}.py"
        for name in ("killed", "killed_evaluation", "killed_features", "lost_rank", "torchrun", "tracking_server")
    ),
    "unit/evaluation/test_ablation.py",
    *(f"unit/generation/test_{name}.py" for name in ("memory", "verified")),
)
SLOW = {Path(__file__).parent / name for name in _LONG}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes minutes, where the rest takes seconds: whole runs started and killed, many pairs of models."""
    for item in items:
        if SLOW & {item.path, *item.path.parents}:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
