"""What a decoding device tells the host without being asked: words that its kernels write into the host's memory."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_NEW = 2**18 - 1
"""Tokens of a row that a report of verified decoding has room for."""
_NUMBERS = 2**30 - 1  # of calls, then they begin again: a word has room for no more
_PAYLOAD = 2**33 - 1
_TOKEN = 2**32 - 1
_SPIN = 4000  # looks, a millisecond or so: from then on other threads get a chance before each, which may take 50 us
_CHECK = 1000  # looks before the device is asked whether it is still at work


class Words:
    """Words of 64 bits, one for each row at each index: (number of the call << 33) | payload.

    A word is stored as a whole, so its parts belong together. The host takes it for this call's by its number: words of
    earlier calls stay where they are, and the last kernels of the call before may still write theirs.

    Args:
        batch: rows.
        capacity: indices of a call at most.
        device: whose kernels write.
    """

    @torch.inference_mode(False)  # later calls may come from outside of it
    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.device, self._number = device, 0
        self.batch = batch
        self.buffer = torch.zeros(capacity, batch, dtype=torch.long, pin_memory=device.type == "cuda")
        """(capacity, batch), in memory of the host that the device writes to."""
        self.number = torch.zeros((), dtype=torch.long, device=device)
        """Of the call, on the device."""
        self._stream: torch.cuda.Stream | None = None
        self._view = self.buffer.view(-1).numpy().data  # looks cost a tenth of what they cost by numpy

    def begin(self) -> None:
        """Begin a call, after all captures for it: they run its kernels, too.

        The host sets the number, in turn with the kernels that it launches; the device would count captures, and calls
        that broke off, as calls.
        """
        if self.device.type == "cuda" and (stream := torch.cuda.current_stream(self.device)) != self._stream:
            # torch learns by a copy that this stream uses the memory: given up, it goes to nobody before the kernels
            # that are launched by then have ended.
            self.number.copy_(self.buffer[0, 0], non_blocking=True)
            self._stream = stream
        self._number = self._number % _NUMBERS + 1
        self.number.fill_(self._number)

    def _wait_for(self, index: int) -> None:
        """Wait for the words of all rows at an index; raises RuntimeError if the device is idle without them."""
        self._wait_until(functools.partial(self._has_come, index), index)

    def _wait_until(self, come: Callable[[], bool], index: int) -> None:
        """Wait for words of which the first is at `index`."""
        looks = 0
        while not come():
            looks += 1
            if looks > _SPIN:
                time.sleep(0)
            if looks % _CHECK == 0:
                idle = torch.cuda.current_stream(self.device).query()  # raises if a kernel has failed
                if idle and not come():
                    raise RuntimeError(
                        f"the device is idle, but word {index} of call {self._number} has not come; the kernel that "
                        "tells of it has not run or has failed: CUDA_LAUNCH_BLOCKING=1 shows which one fails"
                    )

    def _has_come(self, index: int) -> bool:
        return self._are_this_calls(self._of(index))

    def _are_this_calls(self, words: list[int]) -> bool:
        return min(words) >> 33 == self._number == max(words) >> 33

    def _payloads(self, index: int) -> list[int]:
        """Of words that have come, row by row."""
        return [word & _PAYLOAD for word in self._of(index)]

    def _of(self, index: int) -> list[int]:
        return self._view[index * self.batch : (index + 1) * self.batch].tolist()


class StepWords(Words):
    """A word at each step, with the payload (row has ended << 32) | token."""

    def wait(self, seen: int, launched: int) -> tuple[int, bool]:
        """Wait for the words of a step.

        Args:
            seen: number of steps whose words have come; those of the next one are waited for.
            launched: number of steps that have been launched, more than were seen.

        Returns:
            Number of steps whose words have come now, and whether all rows have ended with the last of these.

        Raises:
            RuntimeError: if the device is idle and the words have not come.
        """
        self._wait_for(seen)
        while not self._all_ended(seen) and seen + 1 < launched and self._has_come(seen + 1):
            seen += 1
        return seen + 1, self._all_ended(seen)

    def tokens(self, start: int, stop: int) -> Tensor:
        """Copy the tokens of steps whose words have come: (batch, stop - start), on the CPU."""
        return (self.buffer[start:stop] & _TOKEN).T.contiguous()

    def _all_ended(self, step: int) -> bool:
        """Whether all rows have ended with this step, whose words have come."""
        return all(word >> 32 & 1 for word in self._of(step))


class RowReport(NamedTuple):
    """What a block gave a row."""

    produced: int
    """Tokens so far."""
    is_open: int
    """1 if the row goes on."""
    accepted: int
    """Drafted tokens that were right, also behind what the row took."""
    taken: int
    """Tokens that the block added; 0 for a row that had ended."""


class BlockWords(Words):
    """A word for each token of a row at its number, counted from 0, and behind them one for each block.

    A block's payload is a `RowReport`: produced << 15 | is_open << 14 | accepted << 7 | taken. No order of the device's
    stores is counted on: the tokens that a report speaks of may come after it.

    Args:
        batch: rows.
        max_new: tokens of a row at most; a block gives one or more to each row that is open.
        device: whose kernels write.
    """

    def __init__(self, batch: int, max_new: int, device: torch.device) -> None:
        self.max_new = max_new
        self.blocks = max_new + 1
        """Blocks that there are words for: the last ones are of runs outside of a call, however many these are."""
        super().__init__(batch, max_new + self.blocks, device)

    def reports(self, block: int) -> list[RowReport]:
        """Wait for what the call's block of this number, counted from 0, gave the rows; raises as `StepWords.wait`."""
        index = self.max_new + block
        self._wait_for(index)
        return [RowReport(p >> 15, p >> 14 & 1, p >> 7 & 127, p & 127) for p in self._payloads(index)]

    def tokens(self, start: int, stop: int, produced: Sequence[int]) -> Tensor:
        """Wait for tokens and copy them: (batch, stop - start), on the CPU.

        Args:
            start: number of the first one.
            stop: number of the one behind the last one.
            produced: tokens of each row by its report; what stands for those behind them has no meaning.
        """
        stops = [min(count, stop) for count in produced]
        self._wait_until(functools.partial(self._have_come, start, stops), start)
        return (self.buffer[start:stop] & _TOKEN).T.contiguous()

    def _have_come(self, start: int, stops: list[int]) -> bool:
        """Whether the tokens of each row from `start` to its own stop have."""
        batch = self.batch
        parts = [self._view[start * batch + row : stop * batch : batch].tolist() for row, stop in enumerate(stops)]
        return all(self._are_this_calls(words) for words in parts if words)
