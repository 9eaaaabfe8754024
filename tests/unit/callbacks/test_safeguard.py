"""Warnings of a batch system outside of training: the exit code that asks to be queued again, whatever comes after."""

import os
import signal

import pytest

from llmslm.callbacks.safeguard import REQUEUE, WARNINGS, requeued_when_warned


@pytest.fixture
def _handlers():
    before = [(warning, signal.getsignal(warning)) for warning in WARNINGS]
    yield
    for warning, handler in before:
        signal.signal(warning, handler)


@requeued_when_warned()
def run(warning):
    """Be warned, and again on the way out."""
    try:
        os.kill(os.getpid(), warning)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("warning", WARNINGS)
def test_a_warning_ends_with_the_code_that_requeues_and_a_second_one_changes_nothing(warning):
    with pytest.raises(SystemExit) as stopped:
        run(warning)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == REQUEUE


@pytest.mark.usefixtures("_handlers")
def test_signals_are_given_back():
    before = [signal.getsignal(warning) for warning in WARNINGS]
    with requeued_when_warned():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(warning) for warning in WARNINGS] == before
