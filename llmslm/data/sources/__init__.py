"""Where examples come from: one class a source, picked by `class_path` in a recipe."""

from llmslm.data.sources.base import Example, Source, Split
from llmslm.data.sources.docstrings import Docstrings

__all__ = ["Docstrings", "Example", "Source", "Split"]
