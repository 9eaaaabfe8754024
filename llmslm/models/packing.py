"""Several examples in one row: whether a model keeps them apart."""

import torch
from transformers import PreTrainedModel

from llmslm.errors import UserError

_LENGTH = 4


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Run a decoder-only model on an example alone and behind another one: its logits must agree.

    transformers builds the mask from positions that start again at 0; a model that ignores them lets examples mix.

    Raises:
        UserError: if they do not agree.
    """
    was_training = model.training
    model.eval()
    first, second = torch.arange(1, 1 + 2 * _LENGTH, device=model.device).view(2, 1, _LENGTH)
    positions = torch.arange(_LENGTH, device=model.device).unsqueeze(0)
    alone = model(input_ids=second, position_ids=positions, use_cache=False).logits
    row = {"input_ids": torch.cat([first, second], 1), "position_ids": torch.cat([positions, positions], 1)}
    packed = model(**row, use_cache=False).logits[:, _LENGTH:]
    model.train(was_training)
    error = (packed - alone).norm() / alone.norm()
    if not error < 0.02:  # rounding alone stays below, also in bf16; another example's tokens do not
        raise UserError(
            f"{model.config.model_type} does not keep packed examples apart (relative error {error:.2g}); "
            "leave data.pack_tokens out"
        )
