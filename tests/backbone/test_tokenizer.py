"""The rebuilt tokenizer against sentencepiece."""

import random

import pytest
import sentencepiece
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mrilib.backbone.tokenizer import VOCAB_SIZE, load_tokenizer, mistral_tokenizer, sentencepiece_model

TEXTS = [
    "", " ", "  ", "hello", " hello", "  hello  world ", "a\nb\n\n c\t d", "▁x", "日本語テキスト", "🧠🩻 lesion",
    "naïve café", "\u200b\x00\x07", "<s> hi </s>", "<unk>", "<0x0A>", "x" * 300, "   \n   ",
    "T2-FLAIR: 5 mm, left frontal lobe.", "123456.789e-10", "مرحبا", "é", "e\u0301", "ﬁ", "\r\n", "…—“”",
    "a  b   c    d", " " * 50 + "x", "\u00a0", "½ × 3²",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return mistral_tokenizer()


@pytest.fixture(scope="module")
def reference():
    return sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model()))


def test_size_and_special_tokens(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == VOCAB_SIZE == 32000
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.unk_token_id == 0
    assert tokenizer.decode([1, 22557, 2], skip_special_tokens=True) == "Hello"


def test_vocabulary_equals_sentencepiece(tokenizer, reference):
    vocabulary = tokenizer.get_vocab()
    assert all(vocabulary[reference.id_to_piece(i)] == i for i in range(VOCAB_SIZE))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_equal_sentencepiece(tokenizer, reference, text):
    ids = tokenizer(text).input_ids
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids)


def test_random_texts(tokenizer, reference):
    pieces = ["a", "aa", " ", "  ", "\n", "\t", "é", "日", "🧠", "<s>", "=", "==", "--", "lesion", "00", "▁", "\u00a0",
              "#", " the", "ing", "(", "...", "\x00", "ss"]  # fmt: skip
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 40)))
        assert tokenizer(text).input_ids == reference.encode(text), repr(text)


@pytest.mark.parametrize("file", ["", "tokenizer.json"])
def test_save_and_load(tokenizer, tmp_path, file):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path / file, vocab_size=32000)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (1, 2, 2, 32000)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert loaded(text).input_ids == ids and loaded.decode(ids) == tokenizer.decode(ids), repr(text)


def test_vocabulary_beyond_the_embeddings_is_refused():
    assert len(load_tokenizer("", vocab_size=32000)) == 32000
    with pytest.raises(ValueError, match=r"ids up to 31999.*512 embeddings.*tokenizer_path"):
        load_tokenizer("", vocab_size=512)


def test_bad_paths_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_end_of_sequence_is_refused(tmp_path):
    words = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="end-of-sequence"):
        load_tokenizer(tmp_path)
