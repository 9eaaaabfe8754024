"""The codec: what stands where in a batch, and what is refused."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmslm.data.codec import IGNORED, Codec, TextFormat
from llmslm.errors import UserError


def byte_tokenizer(bos=True):
    """One token a byte: <pad>=0, <s>=1, </s>=2, then the bytes."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {symbol: 3 + i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make(**kwargs):
    limits = {k: kwargs.pop(k) for k in list(kwargs) if k in TextFormat.__dataclass_fields__}
    return Codec(byte_tokenizer(), text_format=TextFormat(**limits), **({"is_encoder_decoder": False} | kwargs))


def test_decoder_only_labels_mask_exactly_the_prompt():
    codec = make()
    batch = codec.collate(codec.encode(["ab", "abcd"], ["xyz", "x"]))
    for row, (prompt, target) in enumerate([(4, 4), (6, 2)]):
        labels = batch["labels"][row]
        assert (labels[:prompt] == IGNORED).all()
        assert torch.equal(labels[prompt : prompt + target], batch["input_ids"][row, prompt : prompt + target])
        assert (labels[prompt + target :] == IGNORED).all()
        assert batch["attention_mask"][row].sum() == prompt + target
        assert labels[prompt + target - 1] == 2


def test_generation_sees_the_prompt_that_training_saw():
    codec = make()
    rows = codec.encode(["ab", "abcd"], ["xyz", "x"])
    trained, generated = codec.collate(rows), codec.collate_prompts(rows)
    for row, prompt in enumerate([4, 6]):
        assert torch.equal(generated["input_ids"][row, -prompt:], trained["input_ids"][row, :prompt])
        assert generated["attention_mask"][row].sum() == prompt


def test_encoder_decoder_targets_do_not_repeat_the_start_token():
    codec = make(is_encoder_decoder=True, decoder_start_token_id=1)
    batch = codec.collate(codec.encode(["ab"], ["x"]))
    assert batch["input_ids"].shape == (1, 4)
    assert batch["labels"].shape == (1, 2)
    assert batch["labels"][0, -1] == 2


def test_a_padding_id_that_is_the_end_of_sequence_is_not_masked():
    codec = make()
    codec.slm_tokenizer.pad_token = "</s>"
    codec = Codec(codec.slm_tokenizer, text_format=TextFormat(), is_encoder_decoder=False)
    batch = codec.collate(codec.encode(["ab", "abcd"], ["x", "x"]))
    assert batch["attention_mask"][0].tolist() == [1] * 6 + [0] * 2
    assert batch["labels"][0, 5] == 2


def test_the_encoder_side_and_placeholders():
    codec = make(has_encoder=True, prompt_layout="placeholders")
    batch = codec.collate(codec.encode(["ab"], ["x"]))
    assert batch["prompt_ids"].shape == (1, 4)
    assert batch["input_ids"][0, :4].tolist() == [0] * 4
    assert batch["attention_mask"][0].sum() == 6


def test_texts_come_back():
    codec = make()
    ids = codec.encode(["x"], ["Straße, 東京 🙂"])[0]["target_ids"]
    assert codec.decode([ids]) == ["Straße, 東京 🙂"]


def test_a_long_prompt_is_refused_or_cut_where_the_recipe_says():
    with pytest.raises(UserError, match=r"a prompt has 12 tokens, the limit is 6 .*data.truncate_prompt"):
        make(max_prompt_tokens=6).encode(["abcdefghij"])
    for side, kept in (("right", "abcd"), ("left", "ghij")):
        codec = make(max_prompt_tokens=6, truncate_prompt=side)
        row = codec.encode(["abcdefghij"])[0]
        assert codec.decode([row["input_prompt_ids"]]) == [kept]
        assert row["cut_prompt_tokens"] == [6]


def test_signatures_do_not_depend_on_what_was_encoded_last():
    codec = make(max_prompt_tokens=6, truncate_prompt="right")
    before = codec.signature(), codec.prompt_signature()
    codec.encode(["0123456789"])
    assert (codec.signature(), codec.prompt_signature()) == before


def test_mistakes_in_the_recipe_are_named():
    with pytest.raises(UserError, match=r"has no \{prompt\} in it"):
        make(prompt_template="translate:")
    with pytest.raises(UserError, match="different tokenizers, but the alignment is SameTokenizer"):
        Codec(byte_tokenizer(), byte_tokenizer(), text_format=TextFormat(), is_encoder_decoder=False)
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(
        UserError, match=r"has no end-of-sequence token.*encoder-only model can be model\.encoder\.source"
    ):
        Codec(endless, text_format=TextFormat(), is_encoder_decoder=False)
