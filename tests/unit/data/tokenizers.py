"""Small tokenizers of the kinds that models use, trained on a few lines of mixed scripts."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps",
    "def add(a, b):\n    return a + b",
    "Straße, naïve café, Ångström, ﬁnal",
    "東京は日本の首都です。你好，世界",
    "🙂🙃👩‍👩‍👧 emoji 🇮🇹 flags",
    "привет мир, как дела",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def _finish(tokenizer, trainer, template):
    tokenizer.train_from_iterator(LINES * 3, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def bytes_of(size=330, template=None, trim=True):
    """Byte-level BPE, as GPT-2's and Llama 3's; tokens may hold a part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made = _finish(tokenizer, trainer, template)
    if trim and not template:
        made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def words(template="<s> $A </s>"):
    """WordPiece, as BERT's: lower case, no accents, no spaces; unknown words are one token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _finish(
        tokenizer, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False), template
    )


def pieces(template="$A </s>"):
    """Unigram over NFKC, as T5's: spaces are part of the pieces, runs of them become one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return _finish(tokenizer, trainer, template)
