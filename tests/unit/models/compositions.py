"""Tiny compositions, and batches for them."""

import torch

from llmslm.models.alignment import HIDES_PROMPT, SameTokenizer
from llmslm.models.encoder import Encoder
from llmslm.models.fusion import Add
from llmslm.models.modeling import LlmToSlm
from llmslm.models.projector import MlpProjector
from tests import tiny

NEW = {"max_new_tokens": 8, "do_sample": False}


def parts_for(encoder_width, slm_width):
    widths = (encoder_width, slm_width)
    return {"projector": MlpProjector(*widths), "alignment": SameTokenizer(*widths), "fusion": Add(*widths)}


def compose(encoder_family, slm_family, tmp_path, fusion=Add, alignment=SameTokenizer, projector=MlpProjector):
    source = tiny.folder(encoder_family, tmp_path)
    return LlmToSlm.compose(
        Encoder.from_source(source),
        tiny.build(slm_family),
        projector=projector(32, 32),
        alignment=alignment(32, 32),
        fusion=fusion(32, 32),
        encoder_source=source,
    ).eval()


def open_gates(model):
    """Gates and the output maps of new layers start at zero, where states do not count yet."""
    for name, parameter in model.fusion.named_parameters():
        if name.startswith("gate"):
            torch.nn.init.constant_(parameter, 0.8)
        elif name.endswith("out.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def left(values, mask):
    return torch.stack([row.roll(len(row) - int(n)) for row, n in zip(values, mask.sum(1), strict=True)])


def new_tokens(model, ids, prompt_len):
    return ids[:, 1:] if model.config.is_encoder_decoder else ids[:, prompt_len:]


def generate(model, ids, mask, **kwargs):
    """New tokens from right-padded prompts, padded on the side that the slm's family generates with."""
    if not model.config.is_encoder_decoder:
        ids, mask = left(ids, mask), left(mask, mask)
    out = model.generate(prompt_ids=ids, prompt_attention_mask=mask, **NEW, **kwargs)
    return new_tokens(model, out, 1 if model.prompt_layout in HIDES_PROMPT else ids.shape[1])


def until_end(row):
    tokens = row.tolist()
    return tokens[: tokens.index(2) + 1] if 2 in tokens else tokens


def training_batch(model, ids, mask):
    """A prompt and five target tokens a row."""
    targets = torch.randint(3, tiny.VOCABULARY, (len(ids), 5))
    sides = {"prompt_ids": ids, "prompt_attention_mask": mask}
    if model.prompt_layout in HIDES_PROMPT:
        ids = torch.ones(len(ids), 1, dtype=torch.long)
        mask = torch.ones_like(ids)
    if model.config.is_encoder_decoder:
        return sides | {"input_ids": ids, "attention_mask": mask, "labels": targets}
    inputs = torch.zeros(len(ids), ids.shape[1] + 5, dtype=torch.long)
    attended, labels = torch.zeros_like(inputs), torch.full_like(inputs, -100)
    for row, length in enumerate(mask.sum(1).tolist()):
        inputs[row, :length], inputs[row, length : length + 5] = ids[row, :length], targets[row]
        attended[row, : length + 5] = 1
        labels[row, length : length + 5] = targets[row]
    return sides | {"input_ids": inputs, "attention_mask": attended, "labels": labels}


def bare(model, batch):
    """What the slm alone reads of a training batch."""
    own = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    if not model.config.is_encoder_decoder:
        own["position_ids"] = (own["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return own
