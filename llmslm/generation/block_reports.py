"""What the host learns of the blocks of verified decoding: it looks where that is free, else the device tells it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from llmslm.generation.verified_block import VerifiedBlock
from llmslm.generation.words import BlockWords, RowReport


class BlockReports(ABC):
    """Of a block that is run again and again.

    Args:
        block: whose buffers hold what it gave.
    """

    def __init__(self, block: VerifiedBlock) -> None:
        self.block, self.pad = block, block.choice.rules.pad

    def begin(self) -> None:
        """Begin a call, when the sides have their prompts, and after all captures."""
        self.block.start()

    @abstractmethod
    def tell(self) -> None:
        """Let the host know what the block gave; this is the last of its work on the device."""

    @abstractmethod
    def rows(self, number: int) -> list[RowReport]:
        """Say what the call's block of this number, counted from 0, gave; the next one may only be launched then."""

    def tokens(self, start: int, stop: int, produced: Sequence[int]) -> Tensor:
        """New tokens (batch, stop - start) on the CPU, filled with the pad token behind those of each row.

        Args:
            start: number of the first one, counted from 0.
            stop: number of the one behind the last one.
            produced: tokens of each row, by its last report.
        """
        tokens = self._copied(start, stop, produced)
        for row, count in enumerate(produced):
            if count < stop:
                tokens[row, max(count - start, 0) :] = self.pad
        return tokens

    @abstractmethod
    def _copied(self, start: int, stop: int, produced: Sequence[int]) -> Tensor:
        """The same; what stands behind those of a row has no meaning."""


class SeenReports(BlockReports):
    """Where the block lies in the host's memory."""

    def tell(self) -> None:
        """See `BlockReports.tell`."""

    def rows(self, number: int) -> list[RowReport]:
        """See `BlockReports.rows`."""
        return [RowReport(*row) for row in self.block.report.T.tolist()]

    def _copied(self, start: int, stop: int, produced: Sequence[int]) -> Tensor:
        return self.block.tokens[:, start + 1 : stop + 1].clone()


class ToldReports(BlockReports):
    """Where the device writes words into the host's memory; `tell` does."""

    def __init__(self, block: VerifiedBlock) -> None:
        super().__init__(block)
        self.words = BlockWords(block.batch, block.choice.max_new, block.device)

    def begin(self) -> None:
        """See `BlockReports.begin`."""
        super().begin()
        self.words.begin()

    def rows(self, number: int) -> list[RowReport]:
        """See `BlockReports.rows`."""
        return self.words.reports(number)

    def _copied(self, start: int, stop: int, produced: Sequence[int]) -> Tensor:
        return self.words.tokens(start, stop, produced)
