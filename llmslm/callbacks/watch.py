"""A rank that dies or hangs must not keep the others waiting: they say so and stop."""

import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from llmslm.errors import UserError

LOST = 76
"""Exit code of a rank that stops because another one is gone."""


class WatchRanks(Callback):
    """Ends this process when another rank has given no sign of life for a while.

    A collective operation waits for a lost rank until the process group's own timeout, half an hour by default. Here a
    thread of each rank counts up in a small store and looks whether the next rank's counter goes up; who misses its
    neighbour tells all. A rank that computes for long is alive: its thread counts on. Restarting is up to torchrun or
    the batch system.

    Args:
        lost_after_s: seconds without a sign of life after which a rank counts as lost.
    """

    def __init__(self, lost_after_s: float = 40.0) -> None:
        if lost_after_s <= 0:
            raise UserError(f"watch.lost_after_s is {lost_after_s}; expected seconds above 0")
        self.lost_after_s = lost_after_s
        self._heart: _Heart | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start to watch, as soon as the ranks know each other."""
        if self._heart is None and trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            self._heart = _Heart(trainer.global_rank, trainer.world_size, self.lost_after_s)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave without alarm."""
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the others know that this rank stops, unless all were asked to."""
        asked = isinstance(exception, SystemExit | KeyboardInterrupt)
        self._leave("" if asked else f"rank {trainer.global_rank} has stopped ({type(exception).__name__})")

    def _leave(self, message: str = "") -> None:
        if self._heart is not None:
            self._heart.leave(message)
            self._heart = None


class _Heart:
    """Two threads: one tells the store that this rank lives and looks after the next one, one watches the store."""

    def __init__(self, rank: int, world_size: int, lost_after_s: float) -> None:
        self.rank, self.world_size, self.lost_after_s = rank, world_size, lost_after_s
        self.every_s = lost_after_s / 8
        self._answered = time.monotonic()
        self._done = threading.Event()
        port = [0]
        if rank == 0:
            self._store = self._connect(0)
            port = [self._store.port]
        dist.broadcast_object_list(port)
        if rank != 0:
            self._store = self._connect(port[0])
        for work in (self._beat, self._guard):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def leave(self, message: str) -> None:
        """Stop watching; with a message, the others stop too. The store's host waits until they have read it."""
        try:
            if message:
                self._raise_alarm(message)
            self._done.set()
            self._store.add(f"left{self.rank}", 1)
            left = self._store.add("left", 1)
            # After an error, long enough for the others to read why, and shorter than a launcher waits before it kills.
            end = time.monotonic() + (1.5 * self.every_s if message else self.lost_after_s)
            while self.rank == 0 and left < self.world_size and time.monotonic() < end:
                time.sleep(min(0.05, self.every_s))
                left = self._store.add("left", 0)
        except RuntimeError:  # the store is gone: so is rank 0, and nobody is left to be told
            self._done.set()

    def _connect(self, port: int) -> Any:
        host = os.environ["MASTER_ADDR"]
        timeout = timedelta(seconds=self.lost_after_s)
        store: Any = dist.TCPStore  # type: ignore[attr-defined]
        return store(host, port, is_master=self.rank == 0, wait_for_workers=False, timeout=timeout)

    def _beat(self) -> None:
        neighbour = (self.rank + 1) % self.world_size
        seen, since = -1, time.monotonic()
        while not self._done.wait(self.every_s):
            try:
                self._store.add(f"beat{self.rank}", 1)
                beat = self._store.add(f"beat{neighbour}", 0)
                now = self._answered = time.monotonic()
                if beat != seen or self._store.add(f"left{neighbour}", 0):
                    seen, since = beat, now
                if now - since > self.lost_after_s:
                    self._raise_alarm(f"rank {neighbour} is lost: no sign of life for {self.lost_after_s:g} s")
                if self._store.add("alarm", 0):
                    self._stop(self._store.get("message").decode())
            except RuntimeError:
                self._stop("rank 0 is lost: it does not answer any more")

    def _guard(self) -> None:
        while not self._done.wait(self.every_s):
            if time.monotonic() - self._answered > self.lost_after_s:
                self._stop(f"rank 0 is lost: no answer for {self.lost_after_s:g} s")

    def _raise_alarm(self, message: str) -> None:
        self._store.set("message", message)
        self._store.add("alarm", 1)

    def _stop(self, message: str) -> None:
        """End the process, after a moment in which it may still end by an error of its own."""
        if self._done.wait(self.every_s):
            return
        text = f"{message}; rank {self.rank} stops too: start all again with --ckpt_path last"
        sys.stderr.write(f"llmslm: error: {text}\n")
        sys.stderr.flush()
        os._exit(LOST)


def is_lost_rank(error: BaseException) -> bool:
    """Recognise the error of a collective operation whose other end is gone."""
    text = str(error)
    return any(
        sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    )
