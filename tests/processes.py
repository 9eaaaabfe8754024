"""Whole runs of the command line in processes of their own; a server that has imported everything forks them."""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import closing
from pathlib import Path

from tests.unit import toy

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preload"])
SLM = toy.LLAMA | {"attention_dropout": 0.1}  # random numbers count


class Run:
    """`main(args)` in a process that can be killed; its output goes to a file."""

    def __init__(self, args: list[str], folder: Path, environment: dict[str, str] | None = None, name: str = "run"):
        self.folder, self.output = Path(folder), Path(folder) / f"{name}.log"
        self.process = SERVER.Process(target=_run, args=(args, str(folder), str(self.output), environment or {}))
        self.process.start()

    @property
    def text(self) -> str:
        """What the run has written so far."""
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, seconds: float = 120) -> int:
        """Wait for the end; return the exit code, negative for a signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise AssertionError(f"still running after {seconds} s:\n{self.stop()}")
        return self.process.exitcode

    def stop(self) -> str:
        """End it, and return its output with the stacks of its threads."""
        if self.process.is_alive():
            self.send(signal.SIGUSR2)
            time.sleep(0.5)
            self.process.kill()
        return self.text

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)


def _run(args: list[str], folder: str, output: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.register(signal.SIGUSR2, sys.stderr)
    import torch

    from llmslm.cli import main

    torch.set_num_threads(1)
    code = 0
    try:
        main(args)
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def until(condition, seconds: float = 90, every: float = 0.02):
    """Wait until the condition holds and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)
    return value


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
