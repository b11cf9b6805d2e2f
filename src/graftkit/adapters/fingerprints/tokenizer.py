"""What tells a tokenizer and a chat template from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from graftkit.surveying.sources.local_processor import template_of, tokenizer_of

# Scripts, runs of spaces, digits, a sign outside the basic plane: where tokenizers of one vocabulary differ.
SAMPLE_TEXT = "Hello  world!\n\tIt's 12345.67 – für 日本 🙂"


def vocabulary_hash(processor: Any) -> str:
    """Return a hash of every token of a tokenizer, or of a processor's, and its id."""
    return entries_hash(tokenizer_of(processor).get_vocab())


def entries_hash(entries: Mapping[str, int]) -> str:
    """Return a hash of tokens and their ids."""
    text = json.dumps(sorted(entries.items()), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sample_ids(processor: Any) -> tuple[int, ...]:
    """Return the token ids of ``SAMPLE_TEXT``, with the tokens that are added to every text."""
    return tuple(int(token) for token in tokenizer_of(processor)(SAMPLE_TEXT)["input_ids"])


def template_hash(processor: Any) -> str | None:
    """Return a hash of the chat template's text, or None without a template."""
    template = template_of(processor)
    return None if template is None else hashlib.sha256(template.encode("utf-8", "replace")).hexdigest()


def renders_dates(template: str) -> bool:
    """Check whether the template may put today's date into what it renders.

    Source: transformers gives templates ``strftime_now`` (``transformers.utils.chat_template_utils``).
    """
    return "strftime_now" in template
