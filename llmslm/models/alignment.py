"""Alignments: which encoder positions feed which slm positions.

Every alignment states the layout of the slm's prompt (what the codec writes into `input_ids` on prompt positions) and
places the projected states on those positions. Ranks are counted on attended positions only, so the side and the
amount of padding change nothing.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmslm.errors import UserError
from llmslm.models.components import Component
from llmslm.models.prompt import AlignedPrompt, ProjectedPrompt

PromptLayout = Literal["tokens", "own", "offsets", "placeholders", "start", "states"]
"""What the codec writes on the slm's prompt positions.

"tokens": the prompt in the tokenizer that both sides share. "own": the prompt in the slm's tokenizer, whatever the
encoder's. "offsets": the same, and the batch says which encoder tokens each of them overlaps. "placeholders": one
padding id for every encoder token. "start": one start token alone; the slm does not read the prompt. "states": the
same, and nobody reads that token either.
"""
HIDES_PROMPT: tuple[PromptLayout, ...] = ("start", "states")
"""Layouts whose slm sees of the prompt what the encoder's states say of it."""


def place_by_rank(states: Tensor, states_mask: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Put the k-th attended state of each row on the k-th attended position of that row.

    Args:
        states: (batch, prompt_len, width), right-padded.
        states_mask: (batch, prompt_len), 1 = a real state.
        attention_mask: (batch, input_len), 1 = attend; padded on either side.

    Returns:
        The placed states (batch, input_len, width), zero where there is none, and a boolean mask (batch, input_len, 1).
    """
    index, on_prompt = ranked(states_mask, attention_mask)
    return torch.where(on_prompt, gathered(states, index), states.new_zeros(())), on_prompt


def ranked(states_mask: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return which state each position takes, (batch, input_len), and whether it takes one, (batch, input_len, 1).

    Arguments as for `place_by_rank`. In few operations: of a short prompt each takes as long as one of a layer.
    """
    attended = attention_mask.long()
    index = attended.cumsum(1) - attended  # the attended ones before it
    count = states_mask.shape[1]
    if missing := max(attended.shape[1] - count, 0):  # else no index is beyond the states
        states_mask = F.pad(states_mask, (0, missing))
    on_prompt = torch.logical_and(attended, states_mask.gather(1, index)).unsqueeze(-1)
    return index.clamp(max=count - 1) if missing else index, on_prompt


def gathered(states: Tensor, index: Tensor) -> Tensor:
    """Return states (batch, prompt_len, width) in another order, by index (batch, input_len)."""
    return states.gather(1, index.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


class Alignment(Component):
    """Places projected states on the slm's prompt positions."""

    prompt_layout: ClassVar[PromptLayout] = "tokens"
    needs_token_embeds: ClassVar[bool] = False
    can_pack: ClassVar[bool] = False
    """Whether it places the states of several prompts that stand in one row."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, projected: ProjectedPrompt) -> AlignedPrompt:
        """Align projected states with inputs_embeds (batch, input_len, slm_hidden_size)."""
        raise NotImplementedError


class SameTokenizer(Alignment):
    """Both sides read the same tokens: state k belongs to token k."""

    can_pack: ClassVar[bool] = True

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, projected: ProjectedPrompt) -> AlignedPrompt:
        """Place state k on the k-th token of the prompt."""
        placed, on_prompt = place_by_rank(projected.prompt_embeds, projected.mask, attention_mask)
        return AlignedPrompt(inputs_embeds, placed, on_prompt)


class EncoderTokenizer(Alignment):
    """Two tokenizers, the paper's way (arXiv 2402.16844, section 3).

    The slm reads the prompt in the encoder's tokens: the encoder's (frozen) embedding matrix followed by a trained
    linear layer stands in for the slm's own prompt embeddings, so the two lengths match one to one.
    """

    prompt_layout: ClassVar[PromptLayout] = "placeholders"
    needs_token_embeds: ClassVar[bool] = True
    can_pack: ClassVar[bool] = True

    def __init__(self, encoder_hidden_size: int, slm_hidden_size: int) -> None:
        super().__init__(encoder_hidden_size, slm_hidden_size)
        self.linear = nn.Linear(encoder_hidden_size, slm_hidden_size, bias=False)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, projected: ProjectedPrompt) -> AlignedPrompt:
        """Write the mapped encoder embeddings over the placeholders and place state k on the k-th of them."""
        if projected.token_embeds is None:
            raise ValueError("EncoderTokenizer needs the encoder's token embeddings: token_embeds was None")
        index, on_prompt = ranked(projected.mask, attention_mask)
        states = projected.prompt_embeds
        placed = torch.where(on_prompt, gathered(states, index), states.new_zeros(()))
        own = gathered(self.linear(projected.token_embeds), index).to(inputs_embeds.dtype)
        return AlignedPrompt(torch.where(on_prompt, own, inputs_embeds), placed, on_prompt)


class Offsets(Alignment):
    """Two tokenizers, each side in its own tokens, joined by the characters that they stand for.

    Each slm token receives the mean of the states of the encoder tokens that overlap it in the text. The codec finds
    them (`llmslm.data.overlap`), so both tokenizers must be fast ones, which know their characters.
    """

    prompt_layout: ClassVar[PromptLayout] = "offsets"

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, projected: ProjectedPrompt) -> AlignedPrompt:
        """Place the mean of states [start, stop) on the token whose span that is."""
        if projected.spans is None:
            raise UserError("the Offsets alignment needs prompt_spans, which the codec makes: give them to the model")
        states = projected.prompt_embeds
        start, stop = projected.spans.unsqueeze(2).unbind(-1)
        index = torch.arange(states.shape[1], device=states.device)
        weights = ((index >= start) & (index < stop)).to(states.dtype) / (stop - start).clamp(min=1).to(states.dtype)
        means = weights @ states.masked_fill(~projected.mask.bool().unsqueeze(-1), 0)
        placed, on_prompt = place_by_rank(means, (stop > start).squeeze(-1), attention_mask)
        return AlignedPrompt(inputs_embeds, placed, on_prompt)
