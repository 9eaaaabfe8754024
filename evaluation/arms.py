"""Loads the arms of a comparison: systems from folders, peers made of them, and systems of your own."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evaluation.peers import GenerateSystem, PretrainedSystem, assisted, prompt_lookup, verified
from evaluation.systems import LLM, LLM_TO_SLM, SLM, Arm, EvaluatedSystem
from llmslm.checkpoint import find_system
from llmslm.data.codec import TextFormat
from llmslm.errors import UserError
from llmslm.provenance import folder_hash
from llmslm.system import System


class Peer(NamedTuple):
    """A system that is made of those of the comparison."""

    parts: tuple[str, ...]
    """Names of what it is made of."""
    make: Callable[..., System]
    """From these systems."""


PEERS: Mapping[str, Peer] = {
    "generate": Peer((LLM,), partial(GenerateSystem, "llm_generate")),
    "static_cache": Peer((LLM,), partial(GenerateSystem, "llm_static_cache", cache_implementation="static")),
    "assisted": Peer((LLM, SLM), assisted),
    "prompt_lookup": Peer((LLM,), prompt_lookup),
    "verified": Peer((LLM, LLM_TO_SLM), verified),
}
"""The llm by transformers' generate() as it comes, with a static compiled cache, with drafts of the slm, with drafts
from its own text, and with drafts of llm_to_slm."""


def load_arms(
    folders: Mapping[str, str], device: str, dtype: str, peers: Sequence[str] = (), specs: Sequence[str] = ()
) -> list[Arm]:
    """Load all arms but the controls.

    Args:
        folders: by system name, run folders or the system folders in them.
        device: torch device.
        dtype: float32 or bfloat16, for all.
        peers: names of PEERS.
        specs: YAML files with class_path and init_args of a system, or hub names or folders of models.

    Raises:
        UserError: if one cannot be loaded, or two have one name.
    """
    for name in peers:
        _check_peer(name, folders)
    check_device(device)
    arms = {name: load_arm(name, folder, device, dtype) for name, folder in folders.items()}
    made = [_peer_arm(name, arms) for name in peers]
    formats = [arm.system.codec.text_format for arm in arms.values() if isinstance(arm.system, System)]
    own = [_own_arm(spec, device, dtype, next(iter(formats), None)) for spec in specs]
    every = [*arms.values(), *made, *own]
    names = [arm.system.name for arm in every]
    if slashed := [name for name in names if "/" in name]:
        raise UserError(
            f"a system is named {slashed[0]!r}; a slash stands before what a control lacks (init_args.name)"
        )
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two systems are named {min(twice)!r}; give one of them another name (init_args.name)")
    return every


def load_arm(name: str, folder: str, device: str, dtype: str) -> Arm:
    """Load one system.

    Raises:
        UserError: if the folder holds none, or a system of another kind than `name` says.
    """
    path = find_system(folder)
    system = System.load(path, device=device, dtype=getattr(torch, dtype))
    if system.name != name:
        raise UserError(f"{folder} holds a {system.name} system; expected {name} (--{name.replace('_', '-')})")
    return replace(_arm(system, dtype), checkpoint=folder_hash(path), folder=str(path))


def _arm(system: EvaluatedSystem, dtype: str) -> Arm:
    """Describe a system as far as it says itself what it is."""
    codec = getattr(system, "codec", None)
    return Arm(
        system,
        card=getattr(system, "card", {}),
        device=torch.device(getattr(system, "device", "cpu")).type,
        dtype=dtype if isinstance(system, System) else getattr(system, "dtype", None),
        target_limit=codec.text_format.max_target_tokens if codec is not None else None,
    )


def check_device(device: str) -> None:
    """Refuse a device that is not here.

    Raises:
        UserError: that names it.
    """
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device {device!r} was asked for; expected cpu, cuda or cuda:N (--device)") from error
    gpus = torch.cuda.device_count()
    if asked.type == "cuda" and (asked.index or 0) >= gpus:
        raise UserError(f"device {device} was asked for, but PyTorch sees {gpus or 'no'} GPUs here (--device)")


def _check_peer(name: str, folders: Mapping[str, str]) -> None:
    if name not in PEERS:
        raise UserError(f"unknown peer {name!r}; expected one of {', '.join(PEERS)} (--peers)")
    parts = PEERS[name].parts
    if missing := [part for part in parts if part not in folders]:
        raise UserError(f"peer {name} is made of {' and '.join(parts)}; give --{missing[0].replace('_', '-')} DIR")


def _peer_arm(name: str, arms: Mapping[str, Arm]) -> Arm:
    peer = PEERS[name]
    parts = [arms[part] for part in peer.parts]
    key = _hash(name, *(str(part.checkpoint) for part in parts))
    return replace(parts[0], system=peer.make(*(part.system for part in parts)), checkpoint=key, folder=None)


def _own_arm(spec: str, device: str, dtype: str, text_format: TextFormat | None) -> Arm:
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    if spec.endswith((".yaml", ".yml")):
        system, said = load_system(spec, place), Path(spec).read_text(encoding="utf-8")
    else:
        system, said = PretrainedSystem(spec, text_format=text_format, **place), repr(text_format)
    card = getattr(system, "card", {})
    folder = card.get("source") if Path(card.get("source") or "").is_dir() else None
    weights = folder_hash(Path(folder)) if folder else card.get("revision")
    return replace(_arm(system, dtype), checkpoint=weights and _hash(weights, said), folder=folder)


def _hash(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def load_system(path: str, defaults: Mapping[str, Any]) -> EvaluatedSystem:
    """Make the system that a YAML file describes by class_path and init_args.

    Classes beside the file are found too.

    Args:
        path: the file.
        defaults: arguments that are given to a class that has them, unless the file sets them.

    Raises:
        UserError: if there is no such file or class, an argument is wrong, or a method of the protocol is missing.
    """
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    try:
        text = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        given, place = dict(text.get("init_args") or {}), str(text["class_path"])
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} describes no system; expected YAML with class_path and init_args ({error})") from error
    chosen = _class(place, Path(path).parent)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(chosen, "system", fail_untyped=False)
    known = inspect.signature(chosen).parameters
    try:
        parsed = parser.parse_object({"system": {k: v for k, v in defaults.items() if k in known} | given})
    except ArgumentError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from error
    system: Any = parser.instantiate_classes(parsed).system
    for method in ("generate", "log_likelihood", "parameters", "name"):
        if not hasattr(system, method):
            raise UserError(f"{path}: {place} has no {method}; expected a class as docs/evaluation.md shows")
    made: EvaluatedSystem = system
    return made


def _class(place: str, beside: Path) -> Any:
    module, _, name = place.rpartition(".")
    sys.path.insert(0, str(beside.resolve()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"there is no class {place}: {error} (class_path)") from error
    finally:
        sys.path.pop(0)
