"""What a verified block keeps of its draft: by equality (greedy) or by the rejection rule of speculative sampling."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SHORTEST, LONGEST = 4, 16
GRAPHED = (2, 4, 7, 12)
"""Sizes of the blocks that are captured: the pass that verifies one has a token more.

Between them the output for a block's time differs little: with a draft's token at a sixth of a pass, by 2 % at most.
"""
_MEMORY = 0.8  # weight of the past at each block


@dataclass(frozen=True)
class Verdict:
    """How much of a block is kept.

    accepted: (batch,) drafted tokens that are kept.
    next_token: (batch,) the verifier's own token after them.
    """

    accepted: Tensor
    next_token: Tensor


def judge_greedy(choice: Tensor, drafted: Tensor) -> Verdict:
    """Keep a draft up to where it differs from the verifier's choice.

    Args:
        choice: (batch, block + 1) most probable tokens by the verifier, at each place of the block and after it.
        drafted: (batch, block) tokens.
    """
    accepted = _leading(drafted == choice[:, :-1])
    return Verdict(accepted, choice.gather(1, accepted[:, None])[:, 0])


def judge_sampled(target: Tensor, proposal: Tensor, drafted: Tensor, generator: torch.Generator) -> Verdict:
    """Keep each drafted token with probability min(1, target / proposal); replace the first one that is not kept.

    What is kept is distributed as draws from the target (Leviathan et al., arXiv 2211.17192, appendix A.1).

    Args:
        target: (batch, block + 1, vocabulary) probabilities by the verifier.
        proposal: (batch, block, vocabulary) probabilities that the draft was drawn from.
        drafted: (batch, block) tokens.
        generator: on the device of the others.
    """
    wanted = target[:, :-1].gather(2, drafted[..., None])[..., 0]
    offered = proposal.gather(2, drafted[..., None])[..., 0]
    chance = torch.empty_like(wanted).uniform_(generator=generator)
    accepted = _leading(chance * offered < wanted)
    at = accepted[:, None, None].expand(-1, 1, target.shape[2])
    kept = target.gather(1, at)[:, 0]
    nothing = torch.zeros_like(target[:, :1])
    rest = (kept - torch.cat([proposal, nothing], dim=1).gather(1, at)[:, 0]).clamp(min=0)
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, kept)  # all rounded away: the two are the same
    return Verdict(accepted, drawn(rest, generator))


def drawn(mass: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token a row from mass (batch, vocabulary), which need not sum to 1, without asking the device."""
    noise = torch.empty_like(mass).exponential_(generator=generator)
    return (mass / noise).argmax(dim=-1)


def _leading(kept: Tensor) -> Tensor:
    """Count the true values before the first false one."""
    return kept.long().cumprod(dim=1).sum(dim=1)


class BlockLength:
    """Chooses how many tokens to draft from how many were kept of late.

    Args:
        times: that blocks take, by the number of tokens drafted, in any unit.
    """

    def __init__(self, times: Mapping[int, float]) -> None:
        self.times = times
        # Nine of ten tokens of a draft that had learned from its LLM's labels were the LLM's (112 test prompts, en_it).
        self._kept, self._judged = 9.0, 10.0

    @property
    def current(self) -> int:
        """Tokens of the next block: what gives the most output for its time, if each is kept at the same odds."""
        odds = min(self._kept / self._judged, 0.99)
        return max(self.times, key=lambda size: (1 - odds ** (size + 1)) / self.times[size])

    def learn(self, kept: int, refused: int) -> None:
        """Take in a block: drafted tokens that were kept, and those that ended the block of their row."""
        self._kept = _MEMORY * self._kept + kept
        self._judged = _MEMORY * self._judged + kept + refused


@dataclass
class Acceptance:
    """Counts of verified decoding."""

    passes: int = 0
    """Passes of the verifier over blocks."""
    blocks: int = 0
    """Blocks of single rows that had not ended."""
    drafted: int = 0
    """Tokens drafted in them."""
    accepted: int = 0
    """Drafted tokens that are in the output."""

    @property
    def per_block(self) -> float:
        """Mean number of drafted tokens accepted per block."""
        return self.accepted / max(self.blocks, 1)

    def add(self, other: "Acceptance") -> None:
        """Count another call's too."""
        self.passes += other.passes
        self.blocks += other.blocks
        self.drafted += other.drafted
        self.accepted += other.accepted
