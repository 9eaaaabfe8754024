"""Recipes by name: a YAML file of the user, or one that comes with the package."""

import difflib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmslm.errors import UserError

if TYPE_CHECKING:
    from llmslm.data.datamodule import TextDataModule
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
    names = recipe_names()
    close = difflib.get_close_matches(name_or_path, names, n=1)
    expected = "a shipped recipe" if close else f"one of {', '.join(names)}"
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"no recipe {name_or_path!r}: neither a file nor {expected} (--config){hint}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe as it stands.

    Raises:
        UserError: if it is no YAML, or not keys with values.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())} (--config)") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else repr(values)[:40]
        raise UserError(f"{path} is no recipe: expected keys such as model, data and trainer, found {found} (--config)")
    return values


def resolve_recipes(args: Iterable[str]) -> tuple[list[str], str]:
    """Replace recipe names after --config by paths; return the arguments and the first recipe's name.

    Raises:
        UserError: if there is no such recipe, or it is none.
    """
    resolved: list[str] = []
    names: list[str] = []
    expecting = False
    for arg in args:
        flag, _, value = arg.partition("=")
        if expecting or (flag in ("--config", "-c") and value):
            path = find_recipe(arg if expecting else value)
            read_yaml(path)  # says which of several is broken, where a parser does not
            names.append(path.stem)
            arg = str(path) if expecting else f"{flag}={path}"
            expecting = False
        elif flag in ("--config", "-c"):
            expecting = True
        resolved.append(arg)
    return resolved, names[0] if names else "run"


def read_recipe(names: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Merge recipes in order and apply overrides, `--a.b value` or `--a.b=value`.

    Raises:
        UserError: if an override has no value, or there is no recipe.
    """
    recipe: dict[str, Any] = {}
    for name in names:
        recipe = _merged(recipe, read_yaml(find_recipe(name)))
    words = [word for text in overrides for word in (text.split("=", 1) if text.startswith("--") else [text])]
    if len(words) % 2 or not all(key.startswith("--") and "." in key for key in words[::2]):
        raise UserError(f"cannot read {' '.join(overrides)!r}; expected --key.of.recipe VALUE ...")
    for key, value in zip(words[::2], words[1::2], strict=True):
        nested: Any = _value(value)
        for part in reversed(key[2:].split(".")):
            nested = {part: nested}
        recipe = _merged(recipe, nested)
    return recipe


def _value(text: str) -> Any:
    """Read the value of an override; text with a colon in it, as a prompt's template may be, stays text."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, dict) and not text.lstrip().startswith("{") else value


def build_data(recipe: Mapping[str, Any]) -> "TextDataModule":
    """Build the data module of a recipe, and nothing else of it.

    Raises:
        UserError: if the recipe has no data section, or one that is not valid.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from llmslm.data.datamodule import TextDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextDataModule, "data")
    try:
        parsed = parser.parse_object({"data": recipe["data"]})
    except (ArgumentError, KeyError) as error:
        raise UserError(f"the recipe has no valid data section: {' '.join(str(error).split())[:300]}") from error
    data: TextDataModule = parser.instantiate_classes(parsed).data
    return data


def load_source(name_or_path: str) -> "Source":
    """Build the data source of a recipe, and nothing else of it.

    Raises:
        UserError: if the recipe does not exist or names no valid source.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from llmslm.data.sources import Source

    path = find_recipe(name_or_path)
    values = read_yaml(path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Source, "source")
    try:
        parsed = parser.parse_object({"source": values["data"]["source"]})
    except (ArgumentError, KeyError) as error:
        raise UserError(f"{path} has no valid data.source: {' '.join(str(error).split())[:300]}") from error
    source: Source = parser.instantiate_classes(parsed).source
    return source


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge deeply; another class takes no arguments of the one that it replaces."""
    if over.get("class_path", under.get("class_path")) != under.get("class_path"):
        return dict(over)
    both = dict(under)
    for key, value in over.items():
        old = both.get(key)
        both[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both
