"""The dummy system and examples for it."""

import os

import pytest
from dummy import DummySystem

from evaluation.examples import Examples


@pytest.fixture(scope="session", autouse=True)
def no_commit():
    """A commit made while a test runs is other code, whose predictions are others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_DIR", os.devnull)
        yield


@pytest.fixture(scope="session")
def dummy():
    return DummySystem


@pytest.fixture(scope="session")
def examples():
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "seven",
        "cats",
        "watch",
    ]
    texts = [" ".join(words[start : start + length]) for start in range(5) for length in (5, 6, 7, 8)]
    ids = [f"example-{index}" for index in range(len(texts))]
    return Examples("copying", "test", "0" * 16, len(texts), ids, texts, texts)
