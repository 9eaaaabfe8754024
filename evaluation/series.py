"""A series of experiments: stages that train, label, compare and report, each run once and gone on with after a stop.

A series is a YAML file in `evaluation/series/`. A stage has a kind, arguments of that kind's command and the stages
that it needs; its folder is `runs/<series>/<stage>/`, with `stage.json` (what was run, how long it took, whether it is
complete) and `log.txt`. A stage is run again, from nothing, when its arguments, its recipes or a stage beneath changed.

A rehearsal is a series, too: `like: NAME` takes the stages of another one, `more` gives them further arguments, and all
of it is in `runs/<rehearsal>`, where the other series' folders are made a second time.
"""

import fcntl
import fnmatch
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from evaluation.requirements import requirements, unmet
from llmslm import provenance
from llmslm.errors import UserError
from llmslm.recipe import find_recipe
from llmslm.writing import write_text

FOLDER = Path(__file__).with_name("series")
RUNS = Path("runs")
STATE, LOG = "stage.json", "log.txt"
BEFORE = ".before"
"""Ending of the folder in which the result of a changed stage is kept, until the stage is run."""
TICK_S = 10.0
"""How often the seconds of a running stage are written down: a killed series has no later moment to do so."""
USAGE = 2
"""Status of a command that was given wrong arguments."""
KINDS: Mapping[str, tuple[str, ...]] = {
    "data": ("evaluation.headline_data", "--out={folder}"),
    "prompts": ("evaluation.headline_prompts", "--out={folder}"),
    "cut": ("evaluation.cut", "--out={folder}"),
    "fit": (
        *("llmslm", "fit", "--trainer.default_root_dir={folder}", "--save_system.recipe={label}"),
        *("--ckpt_path=last", "--trainer.enable_progress_bar=false"),
    ),
    "label": ("llmslm", "label", "--out={folder}"),
    "logits": ("llmslm", "logits", "--out={folder}"),
    "compare": ("evaluation", "compare", "--out={folder}", "--reuse={series}"),
    "speed": ("evaluation", "compare", "--out={folder}", "--reuse={series}"),
}
"""By kind: the module that is run, and its arguments before those of the stage."""
ALONE = ("speed",)
"""Kinds that nothing else runs beside."""


class UsageError(UserError):
    """A stage's arguments are wrong, and so are probably those of others."""


@dataclass(frozen=True)
class Stage:
    """One step of a series."""

    name: str
    """Also its folder, for example en_it/slm."""
    kind: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    folder: Path

    def command(self) -> list[str]:
        """Return the arguments of Python."""
        label = re.sub(r"_\d+$", "", self.name).replace("/", "-")  # seeds of one stage are one row of a leaderboard
        places = {"folder": self.folder, "series": self.folder.parents[self.name.count("/")], "label": label}
        start = [part.format(**places) for part in KINDS[self.kind]]
        return ["-m", *start, *self.arguments]

    def stamp(self, beneath: Iterable[str]) -> str:
        """Hash what decides about the stage: its command, its recipes, the stamps of the stages that it needs."""
        flags = zip(self.arguments, self.arguments[1:], strict=False)
        recipes = [find_recipe(name).read_text(encoding="utf-8") for flag, name in flags if flag == "--config"]
        text = "\0".join([*self.command(), *recipes, *beneath])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_series(name: str, overrides: Sequence[str] = ()) -> dict[str, Stage]:
    """Read a series: its stages by name, in the order of the file.

    Args:
        name: of a file in `evaluation/series/`, without its ending.
        overrides: further arguments of each `fit`; {folder} in them is the stage's.

    Raises:
        UserError: if there is no such series, or a stage of it is none.
    """
    values = _read(name)
    further = [*values.get("more", {}).items(), ("fit *", shlex.join(overrides))]
    stages: dict[str, Stage] = {}
    for label, text in expand(values["stages"], values.get("for", {})):
        kinds = [kind for kind in KINDS if kind in text]
        needs = tuple(text.get("needs", "").split())
        if len(kinds) != 1 or not stages.keys() >= set(needs):
            known = ", ".join(KINDS)
            raise UserError(f"series {name}: stage {label!r} needs one of {known}, and stages above it in `needs`")
        folder, kind = RUNS / values.get("like", name) / label, kinds[0]
        more = [text for pattern, text in further if fnmatch.fnmatchcase(f"{kind} {label}", pattern)]
        arguments = shlex.split(text[kind]) + [_fill(part, {"folder": folder}) for part in shlex.split(" ".join(more))]
        stages[label] = Stage(label, kind, tuple(arguments), needs, folder)
    return stages


def _read(name: str) -> dict[str, Any]:
    """Read a series' file; what one leaves open that is like another is the other's."""
    import yaml

    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise UserError(f"no series {name!r}; expected one of {known} (--series)")
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "like" not in values:
        return values
    other = _read(values["like"])
    return other | values | {"stages": other["stages"] | values.get("stages", {})}


@contextmanager
def _place_of(name: str) -> Iterator[None]:
    """A series that is like another runs in a folder of its own: the other's paths, in it, are not the other's."""
    if "like" not in _read(name):
        yield
        return
    (RUNS / name).mkdir(parents=True, exist_ok=True)
    with chdir(RUNS / name):
        yield


def expand(
    stages: Mapping[str, Mapping[str, str]], variables: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Write a stage for each combination of the variables that its name holds, in braces."""
    for label, text in stages.items():
        used = {name: values for name, values in variables.items() if f"{{{name}}}" in label}
        for combination in itertools.product(*used.values()):
            chosen = dict(zip(used, combination, strict=True))
            yield _fill(label, chosen), {key: _fill(value, chosen) for key, value in text.items()}


def _fill(text: str, chosen: Mapping[str, Any]) -> str:
    for name, value in chosen.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def choose(stages: dict[str, Stage], only: Sequence[str]) -> list[Stage]:
    """Return the stages that match one of the patterns, and all that they need; all stages without patterns.

    Raises:
        UserError: if a pattern matches none.
    """
    wanted: set[str] = set()
    for pattern in only or ["*"]:
        matching = fnmatch.filter(stages, pattern)
        if not matching:
            raise UserError(f"no stage {pattern!r}; expected one of {', '.join(stages)} (--only)")
        wanted.update(matching)
    for name in reversed(stages):  # what a stage needs stands above it
        if name in wanted:
            wanted.update(stages[name].needs)
    return [stage for name, stage in stages.items() if name in wanted]


def list_stages(name: str, only: Sequence[str] = (), overrides: Sequence[str] = ()) -> str:
    """Return a line for each stage: its name, its state, the seconds that it took so far.

    Arguments are those of `run`, which would begin the stages that are not complete, from nothing where they changed.
    """
    with _place_of(name):
        return "\n".join(_lines(choose(load_series(name, overrides), only)))


def _lines(stages: Iterable[Stage]) -> Iterator[str]:
    stamps: dict[str, str] = {}
    for stage in stages:
        stamps[stage.name] = stage.stamp(stamps[need] for need in stage.needs)
        state = read_state(stage.folder)
        if not state:
            word = "not begun"
        elif state["stamp"] != stamps[stage.name]:
            word = "changed"
        else:
            word = "complete" if state["complete"] else "begun"
        yield f"{stage.name:32} {word:9} {state['seconds']:7.0f} s" if state else f"{stage.name:32} {word}"


def run(name: str, only: Sequence[str] = (), jobs: int = 1, overrides: Sequence[str] = ()) -> None:
    """Run what is not complete yet.

    Args:
        name: of the series.
        only: patterns of stages (`en_it/*`); what they need is run too. All where empty.
        jobs: stages that run at a time; each has a GPU of its own as far as there are several.
        overrides: further arguments of each `fit`.

    Raises:
        UserError: if stages fail; whatever does not need them is run all the same, unless arguments are wrong.
    """
    for line in unmet(requirements()):
        _say(f"beware: {line}")
    with _place_of(name):
        _run(choose(load_series(name, overrides), only), jobs)


def _run(stages: Iterable[Stage], jobs: int) -> None:
    left = {stage.name: stage for stage in stages}
    stamps: dict[str, str] = {}
    running: dict[Future[None], Stage] = {}
    failed: list[str] = []
    places = _places(jobs)
    with _children() as children, ThreadPoolExecutor(jobs) as pool, _stopped(children):
        while True:
            while stage := _next(left.values(), stamps, list(running.values()), jobs):
                stamp = stage.stamp(stamps[need] for need in stage.needs)
                running[pool.submit(perform, stage, stamp, children, places)] = left.pop(stage.name)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                try:
                    future.result()
                except UsageError as error:
                    _say(f"{stage.name}: wrong arguments")
                    raise UserError(f"{error}; nothing further was begun") from error
                except UserError as error:
                    failed.append(str(error))
                    _say(f"{stage.name}: failed")
                else:
                    stamps[stage.name] = read_state(stage.folder)["stamp"]
    if failed:
        raise UserError("; ".join(failed) + (f"; not begun: {', '.join(left)}" if left else ""))


def _places(jobs: int) -> "SimpleQueue[dict[str, str]]":
    """Deal out GPUs, as what the environments of stages that run at a time differ in; a single one is shared."""
    gpus: Sequence[str] = []
    if jobs > 1:
        import torch

        told = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = told.split(",") if told else [str(index) for index in range(torch.cuda.device_count())]
    places: SimpleQueue[dict[str, str]] = SimpleQueue()
    for job in range(jobs):
        places.put({"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if len(gpus) > 1 else {})
    return places


@contextmanager
def _children() -> Iterator[set[subprocess.Popen[bytes]]]:
    """Yield a place for the processes of stages; until they are gone, a signal to stop is heard once only.

    `timeout` sends it twice, to its child and to its group: the second must not end this program while stages save.
    """
    before = signal.getsignal(signal.SIGTERM)

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _stopped(children: Iterable[subprocess.Popen[bytes]]) -> Iterator[None]:
    """When this program is told to stop, tell the stages, too: trainings save."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        for child in list(children):
            child.terminate()
        raise


def _next(left: Iterable[Stage], done: Container[str], running: Sequence[Stage], jobs: int) -> Stage | None:
    """Choose a stage that can begin now: what it needs is done, and nothing that is to be timed is disturbed."""
    ready = [stage for stage in left if all(need in done for need in stage.needs)]
    if len(running) >= jobs or any(stage.kind in ALONE for stage in running):
        return None
    return next((stage for stage in ready if not (running and stage.kind in ALONE)), None)


def perform(
    stage: Stage, stamp: str, children: set[subprocess.Popen[bytes]], places: "SimpleQueue[dict[str, str]]"
) -> None:
    """Run one stage unless it is complete; what another version of it left is then removed.

    Args:
        stage: what to run.
        stamp: what it is complete with.
        children: has its process while that runs.
        places: it takes one, and gives it back.

    Raises:
        UserError: if its command fails; a UsageError if that refuses its arguments: what was there then stays.
    """
    state, before = read_state(stage.folder), stage.folder.with_name(stage.folder.name + BEFORE)
    changed = bool(state) and state["stamp"] != stamp
    if changed:
        shutil.rmtree(before, ignore_errors=True)
        stage.folder.rename(before)
    elif state.get("complete"):
        _say(f"{stage.name}: complete already")
        return
    if changed or not state:
        state = {"stamp": stamp, "stage": stage.name, "command": shlex.join(["python", *stage.command()]), "seconds": 0}
    _say(f"{stage.name}: begins ({stage.folder / LOG})")
    state |= {"complete": False, "commit": provenance.commit()[0]}
    _write(stage.folder, state)
    status, last = _execute(stage, state, children, places)
    _write(stage.folder, state | {"complete": not status})
    if status == USAGE:
        if changed:
            shutil.rmtree(stage.folder)
            before.rename(stage.folder)
        raise UsageError(f"stage {stage.name} was given wrong arguments: {last}")
    shutil.rmtree(before, ignore_errors=True)
    if status:
        raise UserError(f"stage {stage.name} ended with status {status} ({stage.folder / LOG}): {last}")
    _say(f"{stage.name}: complete, {state['seconds']:.0f} s")


def _execute(
    stage: Stage,
    state: dict[str, Any],
    children: set[subprocess.Popen[bytes]],
    places: "SimpleQueue[dict[str, str]]",
) -> tuple[int, str]:
    """Run a stage's command, and count its seconds in its state; return its status and the last line of its log.

    Raises:
        UserError: if an earlier series was killed, and what it ran of the stage runs still.
    """
    place = places.get()
    before, begin = state["seconds"], time.monotonic()
    with (stage.folder / LOG).open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this program and the stage's have closed it
        except BlockingIOError as error:
            places.put(place)
            raise UserError(f"stage {stage.name} is run by another process still; wait for it, or end it") from error
        environment = _environment() | place
        # a group of its own: what stops this program is passed on to a stage once, by this program
        child = subprocess.Popen(
            [sys.executable, *stage.command()], stdout=log, stderr=log, env=environment, process_group=0
        )
        children.add(child)
        while (status := _ended(child)) is None:
            state["seconds"] = round(before + time.monotonic() - begin, 1)
            _write(stage.folder, state)
        children.discard(child)
    places.put(place)
    state["seconds"] = round(before + time.monotonic() - begin, 1)
    lines = (stage.folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return status, lines[-1] if lines else "its log is empty"


def _ended(child: subprocess.Popen[bytes]) -> int | None:
    """Wait a while for a process; return its status, or None if it runs still."""
    try:
        return child.wait(TICK_S)
    except subprocess.TimeoutExpired:
        return None


def read_state(folder: Path) -> dict[str, Any]:
    """Return what `stage.json` says; nothing where the stage was never begun."""
    path = folder / STATE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write(folder: Path, state: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / STATE, json.dumps(state, indent=2) + "\n")


def _environment() -> dict[str, str]:
    """A stage finds the packages of this one, wherever it is started, and tokenises on all cores: workers do not."""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "true"}


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
