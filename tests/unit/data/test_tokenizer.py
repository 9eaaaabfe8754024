"""The trained tokenizer: nothing is lost, nothing is trained twice, and special tokens are never text."""

import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmslm.data.sources.base import Source
from llmslm.data.tokenizer import TrainedBpe, load_tokenizer, same_tokenizer
from llmslm.errors import UserError


class Words(Source):
    """Prompts and targets of two words, all of which are seen only if the whole split is read."""

    name = "words"

    def __init__(self, version="1"):
        self.version = version

    def prepare(self):
        pass

    def load(self, split):
        assert split == "train"
        texts = [f"early text {i % 9}" if i < 500 else f"latecomers always {i % 9}" for i in range(1000)]
        return Dataset.from_dict({"id": texts, "prompt": texts, "target": ["the target"] * 1000})

    def fingerprint(self):
        return self.version


@pytest.fixture(scope="module")
def trained():
    return TrainedBpe(vocab_size=290).train(Words().load("train"))


def test_ids_and_wrapping(trained):
    assert [trained.convert_tokens_to_ids(token) for token in ("<pad>", "<s>", "</s>")] == [0, 1, 2]
    assert (trained.pad_token_id, trained.bos_token_id, trained.eos_token_id) == (0, 1, 2)
    assert len(trained) == 290
    bare = trained("the target", add_special_tokens=False).input_ids
    assert trained("the target").input_ids == [1, *bare, 2]
    assert len(bare) == 2


@settings(max_examples=60, deadline=None)
@example("a </s> b <pad><s>")
@example(" two  spaces , and don 't join\n\t")
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_decoding_restores_every_text(trained, text):
    ids = trained(text).input_ids
    assert trained.decode(ids, skip_special_tokens=True) == text
    assert ids[0] == 1
    assert ids[-1] == 2
    assert not {0, 1, 2} & set(ids[1:-1])


def test_it_is_trained_once_for_one_data_set(tmp_path, monkeypatch, trained):
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path))
    first = TrainedBpe(vocab_size=290).load(Words())
    assert same_tokenizer(first, trained)
    TrainedBpe(vocab_size=290).load(Words("2"))
    TrainedBpe(vocab_size=270).load(Words())
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(TrainedBpe, "train", lambda *args: pytest.fail("trained twice"))
    again = TrainedBpe(vocab_size=290).load(Words())
    text = "early </s> text"
    assert again(text).input_ids == first(text).input_ids == trained(text).input_ids


def test_a_part_of_the_split_is_taken_from_all_of_it():
    whole, part = Words().load("train"), TrainedBpe(vocab_size=290, max_examples=10)
    tokens = part.train(whole).tokenize("latecomers always")
    assert len(tokens) < len("latecomers always") // 2
    texts = next(part._texts(whole))
    assert len(texts) == 20


def test_a_saved_tokenizer_is_the_same_when_loaded_by_anybody(tmp_path, trained):
    trained.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert same_tokenizer(loaded, trained)
        assert loaded("</s>").input_ids == trained("</s>").input_ids
    assert not same_tokenizer(trained, TrainedBpe(vocab_size=270).train(Words().load("train")))


def test_mistakes(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMSLM_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"data\.tokenizer\.vocab_size is 100; expected 259 or more"):
        TrainedBpe(vocab_size=100).load(Words())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no tokenizer at .*/empty'.*expected a hub name or a folder"):
        load_tokenizer(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="no tokenizer at 'no/such-model'"):
        load_tokenizer("no/such-model")
