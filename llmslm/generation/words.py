"""What a decoding device tells the host without being asked: words that its kernels write into the host's memory."""

import time

import torch
from torch import Tensor

_NUMBERS = 2**30 - 1  # of calls, then they begin again: a word has room for no more
_TOKEN = 2**32 - 1
_SPIN = 4000  # looks, a millisecond or so: from then on other threads get a chance before each, which may take 50 us
_CHECK = 1000  # looks before the device is asked whether it is still at work


class Words:
    """A word of 64 bits for each row and step: (number of the call << 33) | (row has ended << 32) | token.

    A word is stored as a whole, so its parts belong together. The host takes it for this call's by its number: words of
    earlier calls stay where they are, and the last steps of the call before may still write theirs.

    Args:
        batch: rows.
        capacity: steps of a call at most.
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
        # torch learns by a copy that this stream uses the memory: given up, it goes to nobody before the steps that are
        # launched by then have ended.
        self.number.copy_(self.buffer[0, 0], non_blocking=True)
        self._view = self.buffer.view(-1).numpy().data  # looks cost a tenth of what they cost by numpy

    def begin(self) -> None:
        """Begin a call, after all captures for it: they run its kernels, too.

        The host sets the number, in turn with the kernels that it launches; the device would count captures, and calls
        that broke off, as calls.
        """
        self._number = self._number % _NUMBERS + 1
        self.number.fill_(self._number)

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

    def _wait_for(self, step: int) -> None:
        looks = 0
        while not self._has_come(step):
            looks += 1
            if looks > _SPIN:
                time.sleep(0)
            if looks % _CHECK == 0:
                idle = torch.cuda.current_stream(self.device).query()  # raises if a kernel has failed
                if idle and not self._has_come(step):
                    raise RuntimeError(
                        f"the device is idle, but token {step} of call {self._number} has not come; the kernel that "
                        "tells of it has not run or has failed: CUDA_LAUNCH_BLOCKING=1 shows which one fails"
                    )

    def _has_come(self, step: int) -> bool:
        words, number = self._of(step), self._number
        return min(words) >> 33 == number == max(words) >> 33

    def _all_ended(self, step: int) -> bool:
        """Whether all rows have ended with this step, whose words have come."""
        return all(word >> 32 & 1 for word in self._of(step))

    def _of(self, step: int) -> list[int]:
        return self._view[step * self.batch : (step + 1) * self.batch].tolist()
