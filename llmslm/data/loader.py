"""Loaders of training batches that go on in the middle: of an epoch, or of a stream.

Lightning saves and restores the state of a training loader that has `state_dict` and `load_state_dict`. The position is
counted in batches of complete optimizer steps, which the trainer knows: workers fetch ahead, no checkpoint holds the
gradients of a step that is not complete, and Lightning's number of the epoch is not the same after every kind of
resumption.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from datasets import IterableDataset
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from llmslm.data.sampler import LengthBatchSampler
from llmslm.errors import UserError


class BatchLoader(DataLoader):
    """Loads the batches of a `LengthBatchSampler`; a resumed run goes on with the next batch of the epoch.

    Args:
        dataset: rows of ids.
        sampler: which rows make a batch.
        trained: tells how many batches this rank has trained so far, in all epochs; see `batches_of_steps`.
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
        rounds, done = self._trained() - base["trained"], base["examples"] // sampler.batch_size
        # A run that was resumed on more ranks may leave less than a round of the epoch in which it was resumed.
        first = max(0, len(sampler) * sampler.world_size - done) // sampler.world_size
        if rounds < first:
            return base["epoch"], done + rounds * sampler.world_size
        epochs, rounds = divmod(rounds - first, len(sampler))
        return base["epoch"] + 1 + epochs, rounds * sampler.world_size


class StreamLoader(DataLoader):
    """Loads the batches of a streamed dataset without end, each pass shuffled differently.

    It has no end because ranks and workers may have uneven parts of a stream: nobody waits for a rank that is through.
    A resumed run reads the stream from its beginning up to the next batch, which also gives the shuffle buffer back. On
    another number of ranks the stream is dealt out differently: as much of it is passed over as was trained, but not
    the same rows.

    Args:
        dataset: this rank's part of the stream.
        trained: tells how many batches this rank has trained so far.
        kwargs: see torch's DataLoader.
    """

    def __init__(self, dataset: IterableDataset, trained: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self._trained = trained
        self._base = {"batches": 0, "trained": 0}
        self._skip = 0
        self._running: Iterator[Any] | None = None

    def __iter__(self) -> Any:
        """Go on, whoever asks: a new epoch of the trainer is no new pass."""
        if self._running is None:
            self._running = self._passes()
        return self._running

    def state_dict(self) -> dict[str, int]:
        """Return the position, the same on all ranks; Lightning asks when it writes a checkpoint."""
        trained, base = self._trained(), self._base
        return {"batches": base["batches"] + (trained - base["trained"]) * _world_size(), "trained": trained}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position; Lightning calls it before the first batch."""
        self._base = state
        self._skip = state["batches"] // _world_size()

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


def batches_of_steps(trainer: Trainer) -> int:
    """Count the batches that this rank has trained, without those whose optimizer step is still to come."""
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress
    begun = progress.current.processed % trainer.accumulate_grad_batches if loop._should_accumulate() else 0
    # `completed` lags behind where a checkpoint is written at the end of a batch.
    return int(progress.total.processed) - begun


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
