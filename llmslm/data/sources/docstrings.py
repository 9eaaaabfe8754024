"""Code to text from the installed packages: a function without its docstring is the prompt, its first paragraph the target."""

import ast
import hashlib
import inspect
import re
import textwrap
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llmslm.data.sources.base import BuiltSource, Example, Split, drop_seen, split_by_group, take

_WORDS = re.compile(r"[A-Za-z]{2,}")
_NOT_PROSE = re.compile(r"^(:|>>>|@|todo|fixme|args?:|parameters?\b|returns?:|see |deprecated|\.\. )", re.IGNORECASE)
_VERSION = 1  # raise it when the extraction changes: cached data is then built again


class _Package(NamedTuple):
    name: str
    files: list[str]


class Docstrings(BuiltSource):
    """Functions of the packages installed in this environment, read with `ast` alone (nothing is imported).

    The splits are made by package, so no package is on two sides, and nothing of validation or test occurs in train.

    Args:
        max_prompt_chars: longer functions are left out.
        max_target_chars: longer first paragraphs are left out.
        max_train: at most so many training examples, chosen by hash.
        max_eval: the same for validation and for test.
        cache_dir: see `BuiltSource`.
    """

    name = "docstrings"

    def __init__(
        self,
        max_prompt_chars: int = 1200,
        max_target_chars: int = 200,
        max_train: int | None = None,
        max_eval: int | None = 2000,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(cache_dir)
        self.max_prompt_chars = max_prompt_chars
        self.max_target_chars = max_target_chars
        self.max_train = max_train
        self.max_eval = max_eval

    def key(self) -> dict[str, Any]:
        """Limits and installed versions."""
        installed = sorted(f"{package.name}" for package in _packages(with_files=False))
        return {
            "version": _VERSION,
            "max_prompt_chars": self.max_prompt_chars,
            "max_target_chars": self.max_target_chars,
            "max_train": self.max_train,
            "max_eval": self.max_eval,
            "packages": hashlib.sha256("\n".join(installed).encode()).hexdigest(),
        }

    def build(self) -> dict[Split, list[Example]]:
        """Read every function of every package."""
        packages = _packages(with_files=True)
        splits: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
        seen: set[tuple[str, str]] = set()
        limits = (self.max_prompt_chars, self.max_target_chars)
        jobs = [(package.name, file, *limits) for package in packages for file in package.files]
        with ProcessPoolExecutor(max_workers=2) as pool:
            found = pool.map(_read_file, jobs, chunksize=64)
            for job, pairs in zip(jobs, tqdm(found, "reading packages", len(jobs), unit="file"), strict=True):
                for prompt, target in pairs:
                    if (prompt, target) not in seen:
                        seen.add((prompt, target))
                        name = hashlib.sha256(f"{prompt}\0{target}".encode()).hexdigest()[:16]
                        split = split_by_group(job[0].partition(" ")[0])
                        splits[split].append({"id": name, "prompt": prompt, "target": target})
        splits["train"] = take(splits["train"], self.max_train)
        for split in ("validation", "test"):
            splits[split] = take(drop_seen(splits[split], splits["train"]), self.max_eval)
        return splits


def _packages(with_files: bool) -> list[_Package]:
    """List installed distributions as "name version", in the order of their names, once each; this project is left out."""
    packages: dict[str, _Package] = {}
    for distribution in metadata.distributions():
        name = f"{distribution.name} {distribution.version}"
        if distribution.name == "llmslm" or name in packages:
            continue
        files = [str(file.locate()) for file in distribution.files or [] if _wanted(file)] if with_files else []
        packages[name] = _Package(name, sorted(files))
    return [packages[name] for name in sorted(packages)]


def _wanted(file: Any) -> bool:
    parts = file.parts
    is_test = any(part in ("tests", "test", "testing") or part.startswith("test_") for part in parts)
    return str(file).endswith(".py") and not is_test and ".." not in parts


def _read_file(job: tuple[str, str, int, int]) -> list[tuple[str, str]]:
    """Return the (prompt, target) pairs of a file; one that cannot be read or parsed has none."""
    _, path, max_prompt_chars, max_target_chars = job
    try:
        source = Path(path).read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foreign code: its invalid escapes are not ours to report
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    lines = source.splitlines()
    pairs = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            target = first_paragraph(ast.get_docstring(node, clean=False))
            if target and len(target) <= max_target_chars:
                prompt = code_without_docstring(node, lines)
                if prompt and len(prompt) <= max_prompt_chars:
                    pairs.append((prompt, target))
    return pairs


def first_paragraph(docstring: str | None) -> str | None:
    """Collapse a docstring's first paragraph to one line; None where it is no sentence about the function."""
    if not docstring:
        return None
    text = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    if len(_WORDS.findall(text)) < 3 or _NOT_PROSE.match(text) or not text.isascii():
        return None
    return text


def code_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    """Return a function's own lines, dedented, without its docstring; None for stubs, which have nothing to describe."""
    docstring, *rest = node.body
    if all(isinstance(s, ast.Pass) or _is_ellipsis(s) or _raises_not_implemented(s) for s in rest):
        return None
    if docstring.lineno == node.lineno or docstring.end_lineno == rest[0].lineno:
        return None  # one-liners: the docstring shares a line with code
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    kept = lines[first : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip() or None


def _is_ellipsis(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _raises_not_implemented(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Raise) and "NotImplemented" in ast.dump(statement)


