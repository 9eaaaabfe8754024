"""The LLM over a recipe's data: what the commands `label` and `logits` share."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmslm.checkpoint import find_system
from llmslm.data.features import fingerprint_of
from llmslm.data.sources import Source
from llmslm.errors import UserError
from llmslm.load_llm import load_llm
from llmslm.recipe import build_data, read_recipe
from llmslm.system import System
from llmslm.writing import write_text

_HASHED = {
    "llm": "another LLM (--checkpoint)",
    "codec": "another tokenizer, prompt template or limit of lengths (--checkpoint, data.*)",
    "data": "other data (data.source)",
    "vocabulary": "another vocabulary (data.tokenizer)",
    "targets": "other target tokens (data.tokenizer, data.max_target_tokens)",
}
"""What a folder is of, where the values that differ are hashes and say nothing."""


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that share the work; each has its own shards, and nobody waits."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls) -> "Ranks":
        """Read what torchrun tells its processes."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    def mine(self, shard: int) -> bool:
        """Whether a shard is this rank's."""
        return shard % self.size == self.rank


@dataclass(frozen=True)
class Job:
    """A system, the data that it runs over, and what decides about its results."""

    system: System
    checkpoint: str
    """Where the system came from: its folder, or the name of a bare model."""
    is_own_llm: bool
    """Whether it is the llm that the recipe trains, and then reads with."""
    source: Source
    max_target_tokens: int
    """Longest target of the recipe."""
    identity: dict[str, Any]
    """Content of weights, tokens and data, in plain types."""
    ranks: Ranks


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the arguments that both commands take."""
    parser.add_argument("--config", action="append", required=True, metavar="RECIPE", help="whose data is read")
    parser.add_argument(
        "--checkpoint", required=True, metavar="LLM", help="run or system folder; or a hub name or folder of a model"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help=out)
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights; default: bfloat16 on a GPU, else float32"
    )


def load_job(options: argparse.Namespace, overrides: Sequence[str]) -> Job:
    """Load the system and the data that the arguments name.

    Raises:
        UserError: for mistakes in them.
    """
    recipe = read_recipe(options.config, overrides)
    data = build_data(recipe)
    device = options.device or _default_device()
    dtype = options.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    key = "the LLM (--checkpoint): model"
    system = load_llm(options.checkpoint, data.text_format, key, device=device, dtype=getattr(torch, dtype))
    checkpoint = _place(options.checkpoint)
    data.source.prepare()
    identity = {
        "llm": fingerprint_of(checkpoint),
        "codec": system.codec.signature(),
        "dtype": dtype,
        "data": data.source.fingerprint(),
    }
    name = Path(options.config[0]).stem
    is_own = _trains_its_llm(recipe) and (system.name, system.card.get("recipe")) == ("llm", name)
    limit = data.text_format.max_target_tokens
    return Job(system, checkpoint, is_own, data.source, limit, identity, Ranks.of_environment())


def claim(manifest: Path, about: dict[str, Any]) -> None:
    """Write down what a folder belongs to, before anything else is in it; what is there must say the same.

    Args:
        manifest: its file.
        about: plain values.

    Raises:
        UserError: if the folder belongs to something else.
    """
    about = json.loads(json.dumps(about))
    if not manifest.is_file():
        write_text(manifest, json.dumps(about, indent=1) + "\n")
        return
    stored = json.loads(manifest.read_text(encoding="utf-8"))
    for name in stored | about:
        if stored.get(name) != about.get(name):
            values = f"{str(stored.get(name))[:80]!r}, here it is {str(about.get(name))[:80]!r}"
            what = _HASHED.get(name, f"another {name}: {values}")
            raise UserError(f"{manifest.parent} is of {what}; give another folder (--out)")


def _place(checkpoint: str) -> str:
    try:
        return str(find_system(checkpoint))
    except UserError:
        return checkpoint


def _trains_its_llm(recipe: dict[str, Any]) -> bool:
    model = recipe.get("model", {})
    return not model.get("llm", {}).get("source") and not model.get("encoder", {}).get("source")


def _default_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
