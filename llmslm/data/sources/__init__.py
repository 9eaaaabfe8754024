"""Where examples come from: one class a source, picked by `class_path` in a recipe."""

from llmslm.data.sources.base import Example, Source, Split
from llmslm.data.sources.debian import DebianSummary, DebianTranslation
from llmslm.data.sources.docstrings import Docstrings
from llmslm.data.sources.files import TextFiles
from llmslm.data.sources.huggingface import HubDataset

__all__ = [
    "DebianSummary",
    "DebianTranslation",
    "Docstrings",
    "Example",
    "HubDataset",
    "Source",
    "Split",
    "TextFiles",
]
