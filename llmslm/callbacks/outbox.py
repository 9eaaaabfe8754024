"""Metrics on their way to a server that may be gone: sent by a thread, kept in order, on disk as long as they wait."""

import json
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from llmslm.errors import UserError
from llmslm.writing import write_text

Metric = tuple[str, float, int, int]
"""Name, value, milliseconds since 1970, step."""
LARGEST = 1000
"""Metrics in one request: MLflow's limit."""


class Outbox:
    """Sends metrics in the background; whoever puts them in never waits.

    What could not be sent lies in `file` and is tried again, also by the next outbox with the same file. A process that
    is killed loses what it had put in since the last failed attempt.

    Args:
        send: sends some metrics; raises where it cannot.
        file: where the waiting metrics are written, one JSON list a line.
        retry_s: seconds between two attempts.
    """

    def __init__(self, send: Callable[[Sequence[Metric]], None], file: Path, retry_s: float = 5.0) -> None:
        self._send = send
        self.file = file
        self.retry_s = retry_s
        self._waiting = self._read()
        self._failing = self._urgent = False
        self._failures = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def put(self, metrics: Sequence[Metric]) -> None:
        """Take metrics; return at once."""
        with self._changed:
            self._waiting += metrics
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Try at once, and wait until everything is sent, an attempt has failed, or the time is over.

        Returns:
            Whether everything was sent; if not, it lies in the file.
        """
        with self._changed:
            failures = self._failures
            self._urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting or self._failures > failures, timeout_s)
            self._urgent = False
            left = list(self._waiting)
        if left:
            self._write(left)
        return not left

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                batch = self._waiting[:LARGEST]
            error = self._try(batch)
            with self._changed:
                first = error is not None and not self._failing
                self._failing = error is not None
                if error is None:
                    del self._waiting[: len(batch)]
                left = list(self._waiting)
                self._tell(first, error, left)
                self._failures += self._failing
                self._changed.notify_all()
                if self._failing:
                    self._changed.wait_for(lambda: self._urgent, self.retry_s)
                    self._urgent = False

    def _try(self, batch: Sequence[Metric]) -> Exception | None:
        try:
            self._send(batch)
        except Exception as error:
            return error
        return None

    def _tell(self, first: bool, error: Exception | None, left: list[Metric]) -> None:
        if first:
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"metrics cannot be sent and are kept in {self.file}: {reason}", stacklevel=2)
        if error is not None:
            self._write(left)
        elif not left:
            self.file.unlink(missing_ok=True)

    def _write(self, metrics: Sequence[Metric]) -> None:
        try:
            write_text(self.file, "".join(json.dumps(metric) + "\n" for metric in metrics))
        except (OSError, UserError) as error:
            warnings.warn(f"metrics that wait cannot be written to {self.file}: {error}", stacklevel=2)

    def _read(self) -> list[Metric]:
        if not self.file.is_file():
            return []
        return [tuple(json.loads(line)) for line in self.file.read_text(encoding="utf-8").splitlines()]
