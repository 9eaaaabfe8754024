"""Loaders of training batches that go on in the middle: of an epoch, or of a stream.

Lightning saves and restores the state of a training loader that has `state_dict` and `load_state_dict`. The position is
counted in batches that were trained, which the trainer knows: workers fetch ahead, and Lightning's number of the epoch
is not the same after every kind of resumption.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from datasets import IterableDataset
from torch.utils.data import DataLoader

from llmslm.data.sampler import LengthBatchSampler
from llmslm.errors import UserError


class BatchLoader(DataLoader):
    """Loads the batches of a `LengthBatchSampler`; a resumed run goes on with the next batch of the epoch.

    Args:
        dataset: rows of ids.
        sampler: which rows make a batch.
        trained: tells how many batches this rank has trained so far, in all epochs.
        kwargs: see torch's DataLoader.
    """

    def __init__(self, dataset: Any, sampler: LengthBatchSampler, trained: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(dataset, batch_sampler=sampler, **kwargs)
        self._sampler = sampler
        self._trained = trained
        self._base = {"epoch": 0, "examples": 0, "trained": 0}

    def __iter__(self) -> Any:
        """Go on after what was trained."""
        self._sampler.epoch, self._sampler.done = self._position()
        return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Return the position, the same on all ranks; Lightning asks when it writes a checkpoint."""
        epoch, done = self._position()
        return {"epoch": epoch, "examples": done * self._sampler.batch_size, "trained": self._trained()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position; Lightning calls it before the first batch."""
        self._base = state

    def _position(self) -> tuple[int, int]:
        """Return the epoch, and the batches over all ranks that are done in it."""
        sampler, base = self._sampler, self._base
        done = base["examples"] // sampler.batch_size + (self._trained() - base["trained"]) * sampler.world_size
        epochs, done = divmod(done, len(sampler) * sampler.world_size)
        return base["epoch"] + epochs, done


class StreamLoader(DataLoader):
    """Loads the batches of a streamed dataset without end, each pass shuffled differently.

    It has no end because ranks and workers may have uneven parts of a stream: nobody waits for a rank that is through.
    A resumed run reads the stream from its beginning up to the next batch, which also gives the shuffle buffer back.

    Args:
        dataset: this rank's part of the stream.
        trained: tells how many batches this rank has trained so far.
        kwargs: see torch's DataLoader.
    """

    def __init__(self, dataset: IterableDataset, trained: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self._trained = trained
        self._skip = 0
        self._running: Iterator[Any] | None = None

    def __iter__(self) -> Any:
        """Go on, whoever asks: a new epoch of the trainer is no new pass."""
        if self._running is None:
            self._running = self._passes()
        return self._running

    def state_dict(self) -> dict[str, int]:
        """Return the position, the same on all ranks; Lightning asks when it writes a checkpoint."""
        return {"trained": self._trained()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position; Lightning calls it before the first batch."""
        self._skip = state["trained"]

    def _passes(self) -> Iterator[Any]:
        for number in itertools.count():
            self.dataset.set_epoch(number)  # type: ignore[attr-defined]
            batches = 0
            for batches, batch in enumerate(super().__iter__(), start=1):  # noqa: B007 (counts)
                if self._skip:
                    self._skip -= 1
                else:
                    yield batch
            if not batches:
                raise UserError("a process has no rows of the stream; use fewer processes, or data without streaming")
