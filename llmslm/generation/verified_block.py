"""One block of verified decoding, all on the device: draft, verify in one pass, keep what holds; then read on."""

import torch
from torch import Tensor

from llmslm.generation.acceptance import LONGEST, Verdict
from llmslm.generation.choice import Choice
from llmslm.generation.side import Side


class VerifiedBlock:
    """The tokens of a batch, and the work that adds to them. On CUDA nothing of it depends on the host.

    Token 0 of each row is its start, the new ones count from 1. Rows that have ended stay as they are.

    Args:
        llm: verifies.
        draft: proposes.
        choice: of tokens.
    """

    def __init__(self, llm: Side, draft: Side, choice: Choice) -> None:
        self.llm, self.draft, self.choice = llm, draft, choice
        self.batch, self.device = llm.state.batch, llm.base.device
        size = (self.batch, places(choice.max_new))
        self.tokens = torch.zeros(size, dtype=torch.long, device=self.device)
        self._counters = torch.zeros(3, self.batch, dtype=torch.long, device=self.device)
        self.produced, self.ended, self.told = self._counters
        """Of each row: tokens so far, 1 if it has ended, and blocks of the call that the device has told of."""
        self.report = torch.zeros(4, self.batch, dtype=torch.long, device=self.device)
        """Of the last block: tokens so far, whether the row goes on, drafted tokens that were right, tokens taken."""
        for side in (llm, draft):
            side.state.min_new.fill_(choice.min_new)

    def start(self) -> None:
        """Forget the last call's tokens; the sides have their prompts."""
        self._counters.zero_()

    @property
    def begins_with_start(self) -> bool:
        """Whether the draft has yet to read an id for its first token: its prompt's pass gave no logits."""
        return self.draft.first_index == 0

    def read_start(self) -> None:
        """Let the draft read that id."""
        self.draft.next_logits.copy_(self.draft.read(self.tokens[:, :1], self.produced[:, None], 0)[:, 0])

    @property
    def begins_with_token(self) -> bool:
        """Whether the LLM's pass over the prompt gave the logits of the first token."""
        return self.choice.start_token is None

    def run(self, size: int, largest: int | None = None) -> None:
        """Give each open row one to size + 1 new tokens; `read_on` must follow before the next block.

        Args:
            size: number of tokens to draft.
            largest: number of tokens that any row will have at most before the last one, where the host knows it.
        """
        odds = self._propose(size, largest)
        index = self.produced[:, None] + torch.arange(size + 1, device=self.device)
        block = self.tokens.gather(1, index)
        logits = self.llm.read(block, index, largest)
        verdict = self.choice.judge(logits, index, block[:, 1:], odds)
        self._keep(verdict, index + 1)

    def take_first(self) -> None:
        """Give each row the token that follows the LLM's prompt, whose pass gave the logits; `read_on` must follow."""
        index = self.produced[:, None]
        verdict = self.choice.judge(self.llm.next_logits[:, None], index, self.tokens[:, :0], None)
        self._keep(verdict, index + 1)

    def _propose(self, size: int, largest: int | None) -> Tensor | None:
        """Write drafted tokens behind those of each row; the odds (batch, size, vocabulary) that they had if drawn."""
        begin, logits = self.produced[:, None], self.draft.next_logits
        odds: list[Tensor] = []
        for drafted in range(size):
            if drafted:
                index = begin + drafted
                logits = self.draft.read(self.tokens.gather(1, index), index, largest)[:, -1]
            so_far = self.tokens.gather(1, begin + 1 + torch.arange(drafted, device=self.device))
            token, chances = self.choice.propose(logits, self.produced + drafted, so_far)
            self.tokens.scatter_(1, begin + drafted + 1, token[:, None])
            if chances is not None:
                odds.append(chances)
        return torch.cat(odds, dim=1) if odds else None

    def _keep(self, verdict: Verdict, index: Tensor) -> None:
        """Take what was accepted, the LLM's next token, and no more than a row may have."""
        max_new, eos = self.choice.max_new, self.choice.rules.eos
        after = self.produced + verdict.accepted + 1
        self.tokens.scatter_(1, after[:, None], verdict.next_token[:, None])
        block = self.tokens.gather(1, index)
        ends = (block[..., None] == eos).any(dim=-1) & (index <= after[:, None])
        count = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, verdict.accepted + 1)
        count = torch.minimum(count, max_new - self.produced) * (1 - self.ended)
        self.choice.note(block, index <= (self.produced + count)[:, None])
        self.produced += count
        self.ended |= ends.any(dim=1) | (self.produced >= max_new)
        torch.stack([self.produced, 1 - self.ended, verdict.accepted, count], out=self.report)

    def read_on(self, size: int | None = None, largest: int | None = None) -> None:
        """Let the draft read the last token of each row, and the one before it, which it drafted last if all was kept.

        Where one row's tokens 0 have no id, it reads the last token and the one behind it, which comes later again.

        Args:
            size: number of tokens that were drafted, where the host may look at what became of them.
            largest: as for `run`.
        """
        new = 2 if size is None else 1 + bool((self.report[2] == size).any())
        first = (self.produced - new + 1).clamp(min=self.draft.first_index)
        index = first[:, None] + torch.arange(new, device=self.device)
        logits = self.draft.read(self.tokens.gather(1, index), index, largest)
        if new == 1:
            self.draft.next_logits.copy_(logits[:, 0])
        else:
            torch.where((self.produced > first)[:, None], logits[:, 1], logits[:, 0], out=self.draft.next_logits)


def places(max_new: int) -> int:
    """Tokens of a row at most, with its start and what blocks past its end write: also their positions."""
    return max_new + LONGEST + 2
