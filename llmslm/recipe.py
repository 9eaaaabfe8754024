"""Recipes by name: a YAML file of the user, or one that comes with the package."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmslm.errors import UserError

if TYPE_CHECKING:
    from llmslm.data.sources import Source


def recipe_folder() -> Path:
    """Return the folder of the recipes that come with the package."""
    spec = importlib.util.find_spec("recipes")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the recipes folder is not installed beside llmslm; install the wheel, or give a path (--config)"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def recipe_names() -> list[str]:
    """List the shipped recipes, overlays as folder/name."""
    root = recipe_folder()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """Resolve a path to a YAML file or the name of a shipped recipe.

    Raises:
        UserError: if there is neither.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    shipped = recipe_folder() / f"{name_or_path.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    raise UserError(f"no recipe {name_or_path!r}: neither a file nor one of {', '.join(recipe_names())} (--config)")


def load_source(name_or_path: str) -> "Source":
    """Build the data source of a recipe, and nothing else of it.

    Raises:
        UserError: if the recipe does not exist or names no valid source.
    """
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    from llmslm.data.sources import Source

    path = find_recipe(name_or_path)
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Source, "source")
    try:
        parsed = parser.parse_object({"source": values["data"]["source"]})
    except (ArgumentError, KeyError) as error:
        raise UserError(f"{path} has no valid data.source: {' '.join(str(error).split())[:300]}") from error
    source: Source = parser.instantiate_classes(parsed).source
    return source
