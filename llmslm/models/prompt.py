"""What passes between the parts of a composition: a prompt as projected, as aligned, and as the slm reads it."""

from typing import NamedTuple

from torch import Tensor


class ProjectedPrompt(NamedTuple):
    """What the encoder's side hands over.

    prompt_embeds: (batch, states, slm_hidden_size), projected states, right-padded.
    mask: (batch, states), 1 = a real state.
    token_embeds: (batch, prompt_len, encoder_hidden_size), the encoder's own token embeddings, right-padded; only
        alignments with `needs_token_embeds` receive them.
    spans: (batch, input_prompt_len, 2), for each token of the slm's prompt the states [start, stop) that overlap it;
        only where the codec writes the "offsets" layout.
    documents: (batch, states), the example of each state in packed rows, -1 = padding; None where a row is a prompt.
    """

    prompt_embeds: Tensor
    mask: Tensor
    token_embeds: Tensor | None = None
    spans: Tensor | None = None
    documents: Tensor | None = None


class AlignedPrompt(NamedTuple):
    """What the slm's prompt positions receive.

    inputs_embeds: (batch, input_len, slm_hidden_size), the slm's own view of all positions.
    prompt_embeds: (batch, input_len, slm_hidden_size), projected states on prompt positions, zero elsewhere.
    on_prompt: (batch, input_len, 1), True on prompt positions.
    """

    inputs_embeds: Tensor
    prompt_embeds: Tensor
    on_prompt: Tensor


class SlmPrompt(NamedTuple):
    """What the slm reads.

    inputs_embeds: (batch, len, slm_hidden_size); `len` is input_len, or more where a fusion puts states in front.
    attention_mask: (batch, len), 1 = attend.
    is_encoded: True where inputs_embeds take the place of the output of the slm's own encoder.
    documents: (batch, len), the example of each position in packed rows, -1 = padding; None where a row is an example.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    is_encoded: bool = False
    documents: Tensor | None = None
