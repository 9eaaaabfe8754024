"""Length-bucketed batches, dealt out over ranks: equally many batches a rank, each example in one of them."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of examples of similar length.

    Training (shuffle): examples are shuffled, sorted by length within windows of `WINDOW` batches, and the batches
    shuffled again; the last incomplete round of batches is dropped, so all ranks take equally many, full batches.
    Evaluation: all examples, longest first (memory runs out at once or never), in equally many batches a rank; each
    example is in exactly one of them.

    Args:
        lengths: tokens of each example.
        batch_size: examples a batch and rank.
        shuffle: training or evaluation.
        seed: of the shuffle; the order depends on seed and epoch alone.
        rank: this process.
        world_size: number of processes.
    """

    WINDOW = 64

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = (0, 0)
        """(epoch, batches): in that epoch, begin after so many batches, which an interrupted run has done."""
        # Lightning sets the epoch on `sampler` and on `batch_sampler.sampler`, never on the batch sampler itself.
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Shuffle differently from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        per_round = self.batch_size * self.world_size
        if not self.shuffle:
            return -(-len(self.lengths) // per_round)
        return max(1, len(self.lengths) // per_round) if len(self.lengths) else 0

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._training_batches() if self.shuffle else self._evaluation_batches()
        mine = batches[self.rank :: self.world_size]
        epoch, done = self.start
        yield from mine[done if self.shuffle and epoch == self.epoch else 0 :]

    def _training_batches(self) -> list[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))
        window = self.batch_size * self.world_size * self.WINDOW
        batches = []
        for begin in range(0, len(order), window):
            chunk = order[begin : begin + window]
            chunk = chunk[np.argsort(self.lengths[chunk], kind="stable")]
            batches += [chunk[i : i + self.batch_size].tolist() for i in range(0, len(chunk), self.batch_size)]
        if len(order) >= self.batch_size * self.world_size:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        batches = batches[: len(self) * self.world_size]
        while len(batches) < len(self) * self.world_size:  # fewer examples than one round: every rank repeats some
            batches += batches[: len(self) * self.world_size - len(batches)]
        return [batches[i] for i in generator.permutation(len(batches))]

    def _evaluation_batches(self) -> list[list[int]]:
        order = np.argsort(-self.lengths, kind="stable")
        return [part.tolist() for part in np.array_split(order, len(self) * self.world_size)]
