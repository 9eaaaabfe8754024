"""Code to text from the installed packages: a function is the prompt, its docstring's first paragraph the target."""

import ast
import gc
import hashlib
import inspect
import multiprocessing
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from llmslm.data.sources.base import BuiltSource, Example, Split, drop_seen, split_by_group, take

_WORDS = re.compile(r"[A-Za-z]{2,}")
_NOT_PROSE = re.compile(
    r"^(:|>>>|@|todo|fixme|args?:|parameters?\b|returns?:|see |deprecated|\.\. |\W*\w+\W* \([^)]*\)\s*:)", re.IGNORECASE
)
_FIELD = re.compile(
    r"^\s*(:\w+[^:]*:|@\w+|>>>|\.\. |(args|arguments|parameters|returns?|raises)\s*:?\s*$)", re.IGNORECASE
)
_TESTS = re.compile(r"(tests?|testing|test_.*|.*_tests?\.py|conftest\.py)")
_VERSION = 2  # raise it when the extraction changes: cached data is then built again
_WORKERS = 2
_WORTH_WORKERS = 1000  # files; below, starting processes takes longer than it saves


class _Job(NamedTuple):
    package: str
    path: str
    max_prompt_chars: int
    max_target_chars: int


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
        """Limits, installed versions, and the version of Python, whose grammar decides what can be read."""
        installed = "\n".join(sorted({f"{d.name} {d.version}" for d in _distributions()}))
        return {
            "version": _VERSION,
            "python": list(sys.version_info[:2]),
            "max_prompt_chars": self.max_prompt_chars,
            "max_target_chars": self.max_target_chars,
            "max_train": self.max_train,
            "max_eval": self.max_eval,
            "packages": hashlib.sha256(installed.encode()).hexdigest(),
        }

    def build(self) -> dict[Split, list[Example]]:
        """Read every function of every package."""
        splits: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
        seen: set[str] = set()
        jobs = [_Job(package, path, self.max_prompt_chars, self.max_target_chars) for package, path in _files()]
        for job, pairs in zip(jobs, _read_files(jobs), strict=True):
            for prompt, target in pairs:
                name = hashlib.sha256(f"{prompt}\0{target}".encode()).hexdigest()[:16]
                if name not in seen:
                    seen.add(name)
                    splits[split_by_group(job.package)].append({"id": name, "prompt": prompt, "target": target})
        for split in ("validation", "test"):
            splits[split] = take(drop_seen(splits[split], splits["train"]), self.max_eval)
        splits["train"] = take(splits["train"], self.max_train)
        return splits


def _distributions() -> list[metadata.Distribution]:
    """List what is installed, this project left out."""
    return [d for d in metadata.distributions() if d.name != "llmslm"]


def _files() -> list[tuple[str, str]]:
    """List (top-level package, path) of all Python files, in their order, each once.

    Distributions may share a top-level package, and then share its side of the split too.
    """
    found = {
        str(file.locate()): file.parts[0]
        for distribution in _distributions()
        for file in distribution.files or []
        if file.suffix == ".py" and ".." not in file.parts and not any(map(_TESTS.fullmatch, file.parts))
    }
    return sorted((package.removesuffix(".py"), path) for path, package in found.items())


def _read_files(jobs: list[_Job]) -> Iterator[list[tuple[str, str]]]:
    """Read files in their order, in several processes where that pays."""
    if len(jobs) < _WORTH_WORKERS:
        yield from map(_read_file, jobs)
        return
    # New processes, not forks: the one that calls us may have threads. Without the garbage collector, which finds
    # nothing in syntax trees, parsing takes half the time.
    context = multiprocessing.get_context("spawn")
    with tqdm(desc="reading packages", total=len(jobs), unit=" files", mininterval=1.0) as progress:
        try:
            with ProcessPoolExecutor(_WORKERS, mp_context=context, initializer=gc.disable) as pool:
                for pairs in pool.map(_read_file, jobs, chunksize=32):
                    progress.update()
                    yield pairs
        except BrokenProcessPool:  # new processes import the caller's script: one from standard input, or unguarded
            progress.write("no processes could be started to read packages (see above): this one reads alone")
            for job in jobs[int(progress.n) :]:
                progress.update()
                yield _read_file(job)


def _read_file(job: _Job) -> list[tuple[str, str]]:
    """Return the (prompt, target) pairs of a file; one that cannot be read or parsed has none."""
    try:
        source = Path(job.path).read_text(encoding="utf-8")
        if '"""' not in source and "'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foreign code: its invalid escapes are not ours to report
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    lines = source.split("\n")  # as the parser counts; splitlines() would also split at form feeds
    pairs = []
    for node in _functions(tree.body):
        target = first_paragraph(ast.get_docstring(node, clean=False))
        if target and len(target) <= job.max_target_chars:
            prompt = code_without_docstring(node, lines)
            if prompt and len(prompt) <= job.max_prompt_chars:
                pairs.append((prompt, target))
    return pairs


def _functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield functions at any depth, in their order. Only statements hold functions: expressions are not visited."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            yield from _functions(getattr(node, block, ()))  # type: ignore[arg-type]


def first_paragraph(docstring: str | None) -> str | None:
    """Collapse a docstring's first paragraph to one line; None where it is no sentence about the function."""
    if not docstring:
        return None
    lines: list[str] = []
    for line in inspect.cleandoc(docstring).split("\n"):
        if not line.strip() or _FIELD.match(line):
            break
        lines.append(line)
    text = " ".join(" ".join(lines).split())
    if len(_WORDS.findall(text)) < 3 or _NOT_PROSE.match(text) or not text.isascii():
        return None
    return text


def code_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    """Return a function's own lines, dedented, without its docstring; None for stubs, which do nothing."""
    docstring, *rest = node.body
    if all(isinstance(s, ast.Pass) or _is_ellipsis(s) or _raises_not_implemented(s) for s in rest):
        return None
    if lines[docstring.lineno - 1][: docstring.col_offset].strip() or docstring.end_lineno == rest[0].lineno:
        return None  # the docstring shares a line with code
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    kept = lines[first : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip() or None


def _is_ellipsis(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _raises_not_implemented(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Raise) and "NotImplemented" in ast.dump(statement)
