"""Alignments: which encoder positions feed which slm positions.

Every alignment states the layout of the slm's prompt (what the codec writes into `input_ids` on prompt positions) and
places the projected states on those positions. Ranks are counted on attended positions only, so the side and the
amount of padding change nothing.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from llmslm.models.components import Component

PromptLayout = Literal["tokens", "placeholders"]


class AlignedPrompt(NamedTuple):
    """What the slm's prompt positions receive.

    inputs_embeds: (batch, input_len, slm_hidden_size), the slm's own view of all positions.
    prompt_embeds: (batch, input_len, slm_hidden_size), projected states on prompt positions, zero elsewhere.
    on_prompt: (batch, input_len, 1), True on prompt positions.
    """

    inputs_embeds: Tensor
    prompt_embeds: Tensor
    on_prompt: Tensor


def place_by_rank(states: Tensor, states_mask: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Put the k-th attended state of each row on the k-th attended position of that row.

    Args:
        states: (batch, prompt_len, width), right-padded.
        states_mask: (batch, prompt_len), 1 = a real state.
        attention_mask: (batch, input_len), 1 = attend; padded on either side.

    Returns:
        The placed states (batch, input_len, width), zero where there is none, and a boolean mask (batch, input_len, 1).
    """
    rank = attention_mask.cumsum(1) - 1
    on_prompt = (attention_mask.bool() & (rank < states_mask.sum(1, keepdim=True))).unsqueeze(-1)
    index = rank.clamp(0, states.shape[1] - 1).unsqueeze(-1).expand(-1, -1, states.shape[-1])
    return torch.where(on_prompt, states.gather(1, index), states.new_zeros(())), on_prompt


class Alignment(Component):
    """Places projected states on the slm's prompt positions.

    `prompt_layout` says what the codec writes there: "tokens", the prompt in the tokenizer that both sides share, or
    "placeholders", one padding id for every encoder token.
    """

    prompt_layout: ClassVar[PromptLayout] = "tokens"

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        prompt_embeds: Tensor,
        prompt_attention_mask: Tensor,
        token_embeds: Tensor | None,
    ) -> AlignedPrompt:
        """Align prompt_embeds (batch, prompt_len, slm width) with inputs_embeds (batch, input_len, slm width).

        `token_embeds` (batch, prompt_len, encoder_hidden_size) are the encoder's own token embeddings; only
        alignments with `needs_token_embeds` receive them.
        """
        raise NotImplementedError

    needs_token_embeds: ClassVar[bool] = False


class SameTokenizer(Alignment):
    """Both sides read the same tokens: state k belongs to token k."""

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        prompt_embeds: Tensor,
        prompt_attention_mask: Tensor,
        token_embeds: Tensor | None = None,
    ) -> AlignedPrompt:
        """Place state k on the k-th token of the prompt."""
        placed, on_prompt = place_by_rank(prompt_embeds, prompt_attention_mask, attention_mask)
        return AlignedPrompt(inputs_embeds, placed, on_prompt)


class EncoderTokenizer(Alignment):
    """Two tokenizers, the paper's way (arXiv 2402.16844, section 3).

    The slm reads the prompt in the encoder's tokens: the encoder's (frozen) embedding matrix followed by a trained
    linear layer stands in for the slm's own prompt embeddings, so the two lengths match one to one.
    """

    prompt_layout: ClassVar[PromptLayout] = "placeholders"
    needs_token_embeds: ClassVar[bool] = True

    def __init__(self, encoder_hidden_size: int, slm_hidden_size: int) -> None:
        super().__init__(encoder_hidden_size, slm_hidden_size)
        self.linear = nn.Linear(encoder_hidden_size, slm_hidden_size, bias=False)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        prompt_embeds: Tensor,
        prompt_attention_mask: Tensor,
        token_embeds: Tensor | None,
    ) -> AlignedPrompt:
        """Write the mapped encoder embeddings over the placeholders and place state k on the k-th of them."""
        if token_embeds is None:
            raise ValueError("EncoderTokenizer needs the encoder's token embeddings: token_embeds was None")
        own, on_prompt = place_by_rank(self.linear(token_embeds), prompt_attention_mask, attention_mask)
        placed, _ = place_by_rank(prompt_embeds, prompt_attention_mask, attention_mask)
        return AlignedPrompt(torch.where(on_prompt, own.to(inputs_embeds.dtype), inputs_embeds), placed, on_prompt)
