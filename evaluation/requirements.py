"""Which packages are missing here, or of a release that is not supported: known before a stage fails at its end."""

import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

PACKAGE = "llmslm"
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def requirements() -> list[str]:
    """Return what this package requires, without extras: by pyproject.toml beside it, or else as it was installed."""
    if PYPROJECT.is_file():
        return list(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"])
    try:
        return metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []


def unmet(required: Iterable[str]) -> list[str]:
    """Say of each requirement that is not met what is here in its place.

    Args:
        required: requirements as pip reads them; those of extras are left out.
    """
    lines = []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            lines.append(f"{requirement.name} is not installed; {requirement.specifier or 'any release'} is needed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            lines.append(f"{requirement.name} is {version}; {requirement.specifier} is needed")
    return lines
