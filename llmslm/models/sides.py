"""The two sides of a prompt, slm's and encoder's: each can often be made from the other."""

import torch
from torch import Tensor

from llmslm.errors import UserError
from llmslm.models.alignment import HIDES_PROMPT, PromptLayout
from llmslm.models.configuration import LlmToSlmConfig


def complete_sides(
    config: LlmToSlmConfig,
    layout: PromptLayout,
    input_ids: Tensor | None,
    mask: Tensor | None,
    prompt_ids: Tensor | None,
    prompt_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill in the side of a batch of prompts that was left out: with one tokenizer the two hold the same ids.

    Args:
        config: of the composition.
        layout: what the slm reads on its prompt positions.
        input_ids: (batch, input_len), the slm's side.
        mask: (batch, input_len), 1 = attend; all ones where None.
        prompt_ids: (batch, prompt_len), the encoder's side.
        prompt_mask: (batch, prompt_len), 1 = a real token; all ones where None.

    Raises:
        UserError: if both sides are missing, or the tokenizers differ, so that one cannot be made from the other.
    """
    if input_ids is None and prompt_ids is None:
        raise UserError("generate needs a prompt: give prompt_ids (encoder side) or input_ids (slm side)")
    if prompt_ids is None:
        if layout == "placeholders" or not _shares_tokens(config, layout):
            raise UserError("the two sides have different tokenizers: give prompt_ids in the encoder's")
        prompt_ids, prompt_mask = input_ids, mask
        if layout in HIDES_PROMPT:
            input_ids = mask = None
    assert prompt_ids is not None
    prompt_mask = torch.ones_like(prompt_ids) if prompt_mask is None else prompt_mask
    if input_ids is None:
        input_ids, mask = _slm_side(config, layout, prompt_ids, prompt_mask)
    mask = torch.ones_like(input_ids) if mask is None else mask
    return input_ids, mask, prompt_ids, prompt_mask


def pad_id(config: LlmToSlmConfig) -> int:
    """Return an id to pad the slm's side with."""
    return config.pad_token_id if isinstance(config.pad_token_id, int) else 0


def _slm_side(
    config: LlmToSlmConfig, layout: PromptLayout, prompt_ids: Tensor, prompt_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Make the slm's side, ids and mask, from the encoder's."""
    if layout == "placeholders":
        return torch.full_like(prompt_ids, pad_id(config)), prompt_mask
    if layout in HIDES_PROMPT:
        start = next((i for i in (config.bos_token_id, config.eos_token_id) if isinstance(i, int)), pad_id(config))
        ids = prompt_ids.new_full((prompt_ids.shape[0], 1), start)
        return ids, torch.ones_like(ids)
    if not _shares_tokens(config, layout):
        raise UserError("the two sides have different tokenizers: give input_ids in the slm's, beside prompt_ids")
    return prompt_ids, prompt_mask


def _shares_tokens(config: LlmToSlmConfig, layout: PromptLayout) -> bool:
    """Whether one side's ids may serve as the other's, as far as the configs tell."""
    sizes = {config.encoder_config.get_text_config().vocab_size, config.slm_config.vocab_size}
    return layout in ("tokens", *HIDES_PROMPT) or (layout == "own" and len(sizes) == 1)
