"""Tasks: one YAML file each, with everything that decides about a score, under a version."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmslm.data.sources import Source, Split
from llmslm.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """What a system is asked, and how its answers are scored."""

    version: int
    """Raised when a change makes scores incomparable."""
    source: Source
    """Where prompts and references come from."""
    metrics: list[str] = field(default_factory=lambda: ["bleu", "chrf", "rouge", "exact_match"])
    """Names of text metrics; the first is the one that this field reports."""
    max_new_tokens: int = 128
    """Token budget of a prediction."""
    split: Split = "test"


def task_names() -> list[str]:
    """List the tasks that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_task(name_or_path: str) -> tuple[str, Task]:
    """Read a task of the package by its name, or one of your own by its path.

    Returns:
        Its name, and the task.

    Raises:
        UserError: if there is no such task, or it has a key that tasks do not have.
    """
    import yaml
    from jsonargparse import ArgumentError

    path = Path(name_or_path)
    path = path if path.is_file() else FOLDER / f"{name_or_path}.yaml"
    if not path.is_file():
        raise UserError(f"there is no task {name_or_path!r}; expected a YAML file or one of {', '.join(task_names())}")
    parser = _parser()
    try:
        parsed = parser.parse_object({"task": yaml.safe_load(path.read_text(encoding="utf-8"))})
    except (ArgumentError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no valid task: {' '.join(str(error).split())[:300]}") from error
    task: Any = parser.instantiate_classes(parsed).task
    return path.stem, task


def _parser() -> "ArgumentParser":
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Task, "task")
    return parser
