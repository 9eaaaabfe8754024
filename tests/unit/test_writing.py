"""What is written may be read by those who may read other files."""

import torch
from safetensors.torch import save_file

from llmslm.checkpoint import written_aside
from llmslm.writing import file_aside

WEIGHTS = {"weight": torch.zeros(2)}


def mode_of_a_new_file(folder):
    path = folder / "new"
    path.touch()
    return path.stat().st_mode


def test_weights_have_the_permissions_of_a_new_file(tmp_path):
    with file_aside(tmp_path / "shard.safetensors") as aside:
        save_file(WEIGHTS, aside)
    with written_aside(tmp_path / "system") as aside:
        save_file(WEIGHTS, aside / "model.safetensors")
    for path in ("shard.safetensors", "system/model.safetensors"):
        assert (tmp_path / path).stat().st_mode == mode_of_a_new_file(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "shard.safetensors", "system"}
    assert {path.name for path in (tmp_path / "system").iterdir()} == {"model.safetensors"}
