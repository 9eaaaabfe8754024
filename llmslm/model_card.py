"""The text of a model card: what an exported system is, how it is used, where it comes from, how it scored."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmslm.models.source import PACKAGE

_NAMES = {
    "bleu": "BLEU",
    "smoothed_bleu": "smoothed BLEU",
    "chrf": "chrF",
    "chrf_plus_plus": "chrF++",
    "ter": "TER",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "rouge_lsum": "ROUGE-Lsum",
}
_TYPES = {"chrf_plus_plus": "chrf", "rouge1": "rouge", "rouge2": "rouge", "rouge_l": "rouge", "rouge_lsum": "rouge"}
_NOT_STATED = "not stated"
_USE = {
    "llm_to_slm": """import llmslm
from transformers import pipeline

answer = pipeline("llm-to-slm", model="PATH_OR_NAME")
print(answer("your prompt"))
""",
    "other": """from llmslm.system import System

system = System.load("PATH")
print(system.generate(["your prompt"], max_new_tokens=64)[0].text)
""",
}


@dataclass(frozen=True)
class Part:
    """A model that a system needs, or was made from."""

    role: str
    """"encoder", or "base" of adapters."""
    source: str
    content: str | None
    """Content hash of its weights."""
    license: str | None
    is_local: bool
    """Whether it lies where only this machine finds it."""
    is_merged: bool
    """Whether the exported weights contain it."""

    @property
    def is_on_hub(self) -> bool:
        """Whether its source is a name on the hub."""
        return not self.is_local and not self.source.startswith((PACKAGE, "/", ".")) and self.source.count("/") <= 1


def results(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of one `EvalResult` for each score of an evaluation record."""
    task = record["task"]
    for name, score in record["scores"].items():
        if score["value"] is not None:
            yield {
                "task_type": "text-generation",
                "dataset_type": task["name"],
                "dataset_name": task["name"],
                "dataset_split": task["split"],
                "dataset_revision": task["data"],
                "metric_type": _TYPES.get(name, name),
                "metric_name": _NAMES.get(name, name),
                "metric_value": round(score["value"], 4),
            }


def body(
    name: str, card: dict[str, Any], parts: list[Part], records: list[dict[str, Any]], license_: str | None
) -> str:
    """Return the card's Markdown below its metadata."""
    sections = [f"# {name}", _what(card), "## Use", f"```python\n{_USE.get(card['system'], _USE['other'])}```"]
    sections += ["## Parts and licences", _parts(parts, license_), "## Training", _training(card)]
    if records:
        sections += ["## Scores", *(scores(record) for record in records)]
    return "\n\n".join(sections) + "\n"


def _what(card: dict[str, Any]) -> str:
    if card["system"] == "llm_to_slm":
        return (
            "A frozen large language model reads the prompt once; a projector hands its states to a small language "
            "model, which writes the answer (LLM-to-SLM, arXiv 2402.16844). The large model is not in this folder: it "
            "is fetched from its source, and refused if its content is another."
        )
    return f"A language model, trained as the `{card['system']}` system of an LLM-to-SLM comparison (arXiv 2402.16844)."


def _parts(parts: list[Part], license_: str | None) -> str:
    lines = ["| part | source | content | licence |", "| --- | --- | --- | --- |"]
    lines.append(f"| trained weights | this folder | | {license_ or _NOT_STATED} |")
    for part in parts:
        place = f"`{part.source}`" + (", merged into this folder's weights" if part.is_merged else "")
        lines.append(f"| {part.role} | {place} | `{part.content}` | {part.license or _NOT_STATED} |")
    return "\n".join(lines)


def _training(card: dict[str, Any]) -> str:
    commit = card.get("commit")
    state = " with changes that were not committed" if card.get("dirty") else ""
    known = {
        "recipe": card.get("recipe"),
        "data (content hash)": card.get("data"),
        "commit": None if commit is None else f"{commit}{state}",
        "seed": card.get("seed"),
        "steps": card.get("steps"),
        "trained parameters": card.get("trained_parameters"),
        "prompt template": repr(card["text_format"]["prompt_template"]),
        "versions": ", ".join(f"{library} {version}" for library, version in card.get("versions", {}).items()),
    }
    return "\n".join(f"- {key}: {value}" for key, value in known.items() if value not in (None, ""))


def scores(record: dict[str, Any]) -> str:
    """Return an evaluation record as Markdown: what was measured, and a table."""
    task, device = record["task"], record["settings"]["device"]
    about = (
        f"{task['name']} (version {task['version']}), {task['split']} split, "
        f"{record['examples']['effective']} examples; "
        f"data {task['data']}; commit {record['provenance']['commit']}; `{record['provenance']['command']}`; "
        f"{record['settings']['dtype']} on {device}."
    )
    lines = [about, "", "| score | value | 95 % interval | settings |", "| --- | --- | --- | --- |"]
    for name, score in record["scores"].items():
        if score["value"] is not None:
            interval = "" if score["low"] is None else f"{score['low']:.4g} to {score['high']:.4g}"
            settings = score["signature"].replace("|", "\\|")
            lines.append(f"| {_NAMES.get(name, name)} | {score['value']:.4g} | {interval} | `{settings}` |")
    return "\n".join(lines)
