"""Batches by length, bucketed or packed, dealt out over ranks: equally many a rank, each example in one of them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from llmslm.errors import UserError


class LengthBatchSampler(Sampler[list[int]]):
    """Batches of examples of similar length.

    Training (shuffle): examples are shuffled, sorted by length within windows of `WINDOW` batches, and the batches
    shuffled again and dealt out; what does not fill a round of full batches on all ranks is left out of this epoch.
    Seed and epoch alone decide about the batches and their order, so a run that resumes on another number of ranks
    still sees no example twice. Only a split that is smaller than one round is repeated, so that each rank has a batch.
    Evaluation: all examples, longest first (memory runs out at once or never), in equally many batches a rank; each
    example is in exactly one of them (with a batch size of 1 and several ranks, some batches hold two).

    Args:
        lengths: tokens of each example.
        batch_size: examples a batch and rank.
        shuffle: training or evaluation.
        seed: of the shuffle.
        rank: this process.
        world_size: number of processes.

    Raises:
        UserError: if there are fewer examples to evaluate than processes.
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
        if not shuffle and len(lengths) < world_size:
            raise UserError(
                f"there are {len(lengths)} examples to evaluate on {world_size} processes; "
                "give a larger split (data.source) or fewer processes (trainer.devices)"
            )
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.done = 0
        """Batches of this epoch, over all ranks, that are not given out any more."""

    def __len__(self) -> int:
        rounds = len(self.lengths) / (self.batch_size * self.world_size)
        if self.shuffle:
            return max(1, math.floor(rounds))
        return min(math.ceil(rounds), len(self.lengths) // self.world_size)  # no rank has an empty batch

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._training_batches() if self.shuffle else self._evaluation_batches()
        left = batches[self.done :]
        rounds = len(left) // self.world_size  # whole ones, also after a change of the number of ranks
        yield from left[self.rank : rounds * self.world_size : self.world_size]

    def _training_batches(self) -> list[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))
        if len(order) > self.batch_size:
            # What fills no batch goes before the sorting, or it would always be the longest example.
            order = order[: len(order) // self.batch_size * self.batch_size]
        window = self.batch_size * self.WINDOW
        batches = []
        for begin in range(0, len(order), window):
            chunk = order[begin : begin + window]
            chunk = chunk[np.argsort(self.lengths[chunk], kind="stable")]
            batches += [chunk[i : i + self.batch_size].tolist() for i in range(0, len(chunk), self.batch_size)]
        wanted = len(self) * self.world_size
        batches = [batches[i] for i in generator.permutation(len(batches))]
        while len(batches) < wanted:
            batches += batches[: wanted - len(batches)]
        return batches[:wanted]

    def _evaluation_batches(self) -> list[list[int]]:
        order = np.argsort(-self.lengths, kind="stable")
        return [part.tolist() for part in np.array_split(order, len(self) * self.world_size)]


@dataclass(frozen=True)
class PackedRows:
    """Rows of one length, several examples a row."""

    a_batch: int
    """How many of them make a batch."""
    capacities: tuple[int, ...]
    """Tokens of a row, on each side."""
    rows: list[list[int]]
    """The examples of each row."""

    @property
    def batches(self) -> int:
        """Full batches of these rows, or the one that they do not fill."""
        return max(1, len(self.rows) // self.a_batch)

    def dealt(self, generator: np.random.Generator) -> np.ndarray:
        """Return numbers of rows, (batches, rows of a batch): of the rows sorted by their examples, one of each part.

        What fills no batch is left out, at random.
        """
        order = generator.permutation(len(self.rows))[: self.batches * self.a_batch]
        order = order[np.argsort([len(self.rows[row]) for row in order], kind="stable")]
        parts = order.reshape(-1, self.batches)  # fewer than a_batch, where there are not as many rows
        return generator.permuted(parts, axis=1).T

    def most_of_a_batch(self, counts: np.ndarray) -> int:
        """Return what hardly any batch exceeds of something that example i has counts[i] of."""
        of_rows = np.array([counts[row].sum() for row in self.rows])
        likely = self.a_batch * of_rows.mean() + 5 * self.a_batch**0.5 * of_rows.std()
        return math.ceil(min(likely, self.a_batch * of_rows.max()))


class PackedBatchSampler(LengthBatchSampler):
    """Training batches of examples that fill `batch_size` rows, several examples a row.

    Examples are shuffled and packed once, within windows, best fit first, so a row's examples have similar lengths, and
    batches of any rows would differ more than batches of any examples do. In each epoch the rows are shuffled and dealt
    out so that each batch has rows of few examples and rows of many. A batch lists its examples row by row: `pack_rows`
    finds the same rows, or fewer.

    Args:
        lengths: (examples,) or (examples, sides), tokens of each example, on each side that a row has.
        batch_size: rows a batch and rank.
        capacities: tokens of a row, on each side.
        parts: of a row, in which examples that are short enough are packed, so that fewer of them share a row; a batch
            has rows or parts of rows, about as many tokens of either. What attends by a mask takes time for all pairs
            of positions of a row. Without enough examples for a batch of each, there are whole rows alone.
        seed: of the shuffle.
        rank: this process.
        world_size: number of processes.

    Raises:
        UserError: if an example is longer than a row.
    """

    WINDOW = 4096  # examples; more would not fill the rows better, and take longer

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        capacities: tuple[int, ...],
        *,
        parts: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        sides = np.asarray(lengths).reshape(-1, len(capacities))
        for longest, capacity in zip(sides.max(axis=0, initial=0), capacities, strict=True):
            if longest > capacity:
                raise UserError(
                    f"an example has {longest} tokens, a packed row {capacity}; raise data.pack_tokens, "
                    "or lower data.max_prompt_tokens or data.max_target_tokens"
                )
        super().__init__(sides.sum(axis=1), batch_size, shuffle=True, seed=seed, rank=rank, world_size=world_size)
        order = np.random.default_rng(seed).permutation(len(sides))
        in_parts = self._in_parts(order, sides, capacities, parts) if parts > 1 else []
        self.kinds = in_parts or [PackedRows(batch_size, capacities, self._packed(order, sides, capacities))]
        """Rows of each length, the shortest first; a batch has rows of one."""

    def _in_parts(
        self, order: np.ndarray, sides: np.ndarray, capacities: tuple[int, ...], parts: int
    ) -> list[PackedRows]:
        """Pack short examples apart, if either kind fills a batch: one of few rows would weigh as much as any other."""
        of_part = tuple(_in_eights(capacity / parts) for capacity in capacities)
        fits = (sides[order] <= of_part).all(axis=1)
        short = PackedRows(self.batch_size * parts, of_part, self._packed(order[fits], sides, of_part))
        whole = PackedRows(self.batch_size, capacities, self._packed(order[~fits], sides, capacities))
        kinds = [kind for kind in (short, whole) if kind.rows]
        return kinds if short.rows and all(len(kind.rows) >= kind.a_batch for kind in kinds) else []

    def _packed(self, order: np.ndarray, sides: np.ndarray, capacities: tuple[int, ...]) -> list[list[int]]:
        windows = [order[begin : begin + self.WINDOW] for begin in range(0, len(order), self.WINDOW)]
        return [window[row].tolist() for window in windows for row in best_fit(sides[window], capacities)]

    def __len__(self) -> int:
        return max(1, sum(kind.batches for kind in self.kinds) // self.world_size)

    def _training_batches(self) -> list[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        batches = []
        for kind in self.kinds:
            batches += [[example for row in rows for example in kind.rows[row]] for rows in kind.dealt(generator)]
        batches = [batches[i] for i in generator.permutation(len(batches))]
        # A split that is smaller than one round of batches is repeated.
        wanted = len(self) * self.world_size
        return [batches[i % len(batches)] for i in range(wanted)]


def _in_eights(tokens: float) -> int:
    """Round up to a multiple of 8, as kernels of attention in 16 bits want lengths."""
    return 8 * math.ceil(tokens / 8)


def best_fit(sides: np.ndarray, capacities: tuple[int, ...]) -> list[list[int]]:
    """Pack items, largest first, each into the fullest row that still takes it on all sides; return the rows' indices.

    An item's size, and how full a row is, count each side by its capacity: long prompts with short targets and short
    prompts with long targets share rows.

    Args:
        sides: (items, sides), length of each item on each side.
        capacities: of a row, on each side.
    """
    shares = (sides / capacities).sum(axis=1)
    rows: list[list[int]] = []
    left = np.zeros((len(capacities), len(sides)), dtype=int)  # by side and row
    free = np.zeros(len(sides))  # by row, all sides together
    for index in np.argsort(-shares, kind="stable").tolist():
        count, item = len(rows), sides[index]
        fits = (left[:, :count] >= item[:, None]).all(axis=0)
        row = int(np.where(fits, free[:count], np.inf).argmin()) if fits.any() else count
        if row == count:
            rows.append([])
            left[:, row], free[row] = capacities, len(capacities)
        rows[row].append(index)
        left[:, row] -= item
        free[row] -= shares[index]
    return rows
