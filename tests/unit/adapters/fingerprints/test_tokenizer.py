"""Two tokenizers have one hash only where they have the same tokens with the same ids."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graftkit.adapters.fingerprints.tokenizer import renders_dates, sample_ids, template_hash, vocabulary_hash

WORDS = ("<unk>", "Hello", "world", "12345", "67")


def tokenizer(*words: str, split: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace() if split else pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_equal_tokenizers() -> None:
    assert vocabulary_hash(tokenizer(*WORDS)) == vocabulary_hash(tokenizer(*WORDS))
    assert sample_ids(tokenizer(*WORDS)) == sample_ids(tokenizer(*WORDS))


@pytest.mark.parametrize("words", [(*WORDS, "more"), ("<unk>", "world", "Hello", "12345", "67"), WORDS[:-1]])
def test_another_vocabulary(words: tuple[str, ...]) -> None:
    assert vocabulary_hash(tokenizer(*WORDS)) != vocabulary_hash(tokenizer(*words))


def test_the_sample_tells_how_a_text_is_cut() -> None:
    assert vocabulary_hash(tokenizer(*WORDS)) == vocabulary_hash(tokenizer(*WORDS, split=False))
    assert sample_ids(tokenizer(*WORDS)) != sample_ids(tokenizer(*WORDS, split=False))


def test_templates() -> None:
    one, other = tokenizer(*WORDS), tokenizer(*WORDS)
    assert template_hash(one) is None
    one.chat_template = other.chat_template = "{{ messages }}"
    assert template_hash(one) == template_hash(other)
    other.chat_template += " "
    assert template_hash(one) != template_hash(other)


def test_dates() -> None:
    assert renders_dates("{% set d = strftime_now('%d') %}")
    assert not renders_dates("{{ messages[0]['content'] }}")
