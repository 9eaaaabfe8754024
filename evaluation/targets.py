"""The project's targets: every bar it set itself, with what was measured; targets.json is the list."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from llmslm.errors import UserError
from llmslm.writing import write_text

FILE = Path(__file__).with_name("targets.json")
TOPICS = ("method", "decode", "evaluation", "training", "headline", "scaling")


@dataclass(frozen=True)
class Target:
    """One bar."""

    id: str
    topic: str
    text: str
    """What is measured, how and where."""
    bar: float
    comparison: Literal["<=", ">="]
    """How the measurement must stand to the bar."""
    unit: str
    measured: float | None = None
    command: str | None = None
    """What was run to measure it."""
    commit: str | None = None
    hardware: str | None = None
    date: str | None = None
    met: bool | None = None
    """None until it was measured."""

    def judge(self, measured: float) -> bool:
        """Say whether a measurement meets the bar."""
        return measured <= self.bar if self.comparison == "<=" else measured >= self.bar


def read_targets(path: Path = FILE, topic: str | None = None) -> list[Target]:
    """Read the targets, of one topic or all.

    Raises:
        UserError: if the topic is unknown.
    """
    if topic is not None and topic not in TOPICS:
        raise UserError(f"unknown topic {topic!r}; expected one of {', '.join(TOPICS)} (--topic)")
    targets = [Target(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    return [target for target in targets if topic in (None, target.topic)]


def record_measurement(
    name: str,
    measured: float,
    command: str,
    *,
    hardware: str | None = None,
    commit: str | None = None,
    path: Path = FILE,
) -> Target:
    """Write a measurement into the list, with today's date.

    Args:
        name: id of the target.
        measured: in the target's unit.
        command: what was run to measure it.
        hardware: where; this machine by default.
        commit: of what; this checkout's by default.
        path: the list.

    Raises:
        UserError: if there is no such target.
    """
    from llmslm import provenance

    targets = read_targets(path)
    index = next((index for index, target in enumerate(targets) if target.id == name), None)
    if index is None:
        known = ", ".join(target.id for target in targets)
        raise UserError(f"there is no target {name!r}; expected one of {known} (--measured)")
    targets[index] = replace(
        targets[index],
        measured=measured,
        command=command,
        commit=commit or provenance.commit()[0],
        hardware=hardware or provenance.hardware_name(provenance.hardware()),
        date=datetime.now(UTC).date().isoformat(),
        met=targets[index].judge(measured),
    )
    lines = ",\n".join("  " + json.dumps(asdict(target), ensure_ascii=False) for target in targets)
    write_text(path, f"[\n{lines}\n]\n")
    return targets[index]


def read_origin(paths: Sequence[Path]) -> dict[str, str]:
    """Read where a figure comes from.

    Args:
        paths: the records that it stands in, or is made of.

    Returns:
        Their command, commit and hardware; where records differ, one behind the other.

    Raises:
        UserError: if one is no record.
    """
    found = [_origin(path) for path in paths]
    return {key: ", ".join(dict.fromkeys(each[key] for each in found)) for key in found[0]}


def _origin(path: Path) -> dict[str, str]:
    """Read one record, of whatever command: some say it under `provenance`, some at the top."""
    from llmslm.provenance import hardware_name

    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        about = record.get("provenance", record)
        hardware = about["hardware"]
        origin = {
            "command": record.get("command") or about["command"],
            "commit": about["commit"],
            "hardware": hardware if isinstance(hardware, str) else hardware_name(hardware),
        }
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror} (--record)") from error
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no record: expected JSON with command, commit and hardware (--record)") from error
    if origin["commit"] is None:
        raise UserError(f"{path} names no commit; measure in a checkout, or where LLMSLM_COMMIT names it (--record)")
    return origin


def all_met(targets: Sequence[Target]) -> bool:
    """Say whether every target was measured and is met."""
    return all(target.met for target in targets)


def table(targets: Sequence[Target]) -> str:
    """Write the targets as a Markdown table, with a count below."""
    lines = ["| topic | target | bar | measured | met | what |", "| --- | --- | --- | --- | --- | --- |"]
    for target in targets:
        unit = f" {target.unit}" if target.unit else ""
        sign = {"<=": "≤", ">=": "≥"}[target.comparison]
        measured = "–" if target.measured is None else f"{target.measured:g}{unit}"
        met = {None: "not measured", True: "yes", False: "**no**"}[target.met]
        cells = (target.topic, target.id, f"{sign} {target.bar:g}{unit}", measured, met, target.text)
        lines.append("| " + " | ".join(cells) + " |")
    met_count = sum(target.met is True for target in targets)
    missed = sum(target.met is False for target in targets)
    open_count = len(targets) - met_count - missed
    return "\n".join([*lines, "", f"{met_count} met, {missed} missed, {open_count} not measured"])
