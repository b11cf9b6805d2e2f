"""What takes seconds to find out about a large vocabulary, kept for the next save of the same run."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

from graftkit.adapters.fingerprints.tokenizer import entries_hash
from graftkit.surveying.sources.local_processor import tokenizer_of


class Vocabulary:
    """The tokens of a tokenizer, or of a processor's; each property is computed when it is first asked for."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def is_of(self, processor: Any) -> bool:
        """Check whether this is the processor's, with every token and id that it has now."""
        read = self.__dict__.get("entries")
        return processor is self._processor and (read is None or read == self._now())

    @cached_property
    def entries(self) -> dict[str, int]:
        """Token -> its id."""
        return self._now()

    @cached_property
    def hash(self) -> str:
        """As :func:`vocabulary_hash`."""
        return entries_hash(self.entries)

    @cached_property
    def texts(self) -> dict[int, str]:
        """Token -> its text within a text, of tokens that no other one is written like.

        A decoder drops the space before the first token, so each is decoded after another one.
        """
        tokenizer = tokenizer_of(self._processor)
        before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        start = len(tokenizer.decode(before))
        tokens = range(len(tokenizer))
        texts = [text[start:] for text in tokenizer.batch_decode([[*before, token] for token in tokens])]
        times = Counter(texts)
        pairs = zip(tokens, texts, strict=True)
        return {token: text for token, text in pairs if times[text] == 1 and _is_text(text)}

    def _now(self) -> dict[str, int]:
        return dict(tokenizer_of(self._processor).get_vocab())


def _is_text(text: str) -> bool:
    # What is not a whole character is written as the replacement character.
    return bool(text) and "\N{REPLACEMENT CHARACTER}" not in text
