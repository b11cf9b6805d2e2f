"""The prompts whose answers an adapter's record keeps: a handful of fixed, public texts, and the user's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from graftkit.adapters.fingerprints.tokenizer import renders_dates
from graftkit.checks.chat.conversations import TemplateRefusalError, apply_template
from graftkit.surveying.sources.local_processor import template_of, tokenizer_of

# Nothing of the training data: the record is published with the adapter.
TEXTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def add(a, b):\n    return",
    "1, 2, 3, 4,",
    "Question: Which colour is the sky?\nAnswer:",
)
QUESTIONS = ("Which river flows through Vienna?", "Write one sentence about rain.")
# For models without a tokenizer: ids that nearly every vocabulary has.
_BARE_IDS = ((5, 17, 3, 29), (11, 2, 23), (7, 7, 19, 13, 4))


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids, with what they were made from.

    Attributes:
        text: None where there is no tokenizer.
        question: the user's turn, where the text is a conversation as the chat template renders it.
    """

    ids: tuple[int, ...]
    text: str | None = None
    question: str | None = None


def prompts_for(processor: Any, texts: Iterable[str], vocabulary: int) -> tuple[Prompt, ...]:
    """Return the fixed prompts and the given ones, as a processor's or tokenizer's ids.

    Args:
        processor: None for a model without one.
        texts: further texts.
        vocabulary: number of tokens that the model knows.
    """
    if processor is None:
        return tuple(Prompt(tuple(token % vocabulary for token in ids)) for ids in _BARE_IDS)
    tokenizer = tokenizer_of(processor)
    plain = [Prompt(_ids(tokenizer, text), text) for text in (*TEXTS, *texts)]
    found = [*plain, *_conversations(processor)]
    return tuple(p for p in found if p.ids and max(p.ids) < vocabulary)


def rendered_question(processor: Any, question: str) -> str | None:
    """Return a question as the chat template renders it for an answer; None where it cannot be rendered."""
    template = template_of(processor)
    if template is None:
        return None
    message = {"role": "user", "content": question}
    try:
        text: str = apply_template(processor, [message], template, add_generation_prompt=True)
    except TemplateRefusalError:
        return None
    return text if question in text else None


def _conversations(processor: Any) -> Iterable[Prompt]:
    """Yield the questions as the template renders them, unless it writes the date, which changes the ids."""
    template = template_of(processor)
    if template is None or renders_dates(template):
        return
    for question in QUESTIONS:
        text = rendered_question(processor, question)
        if text is not None:
            yield Prompt(_ids(tokenizer_of(processor), text, add_special_tokens=False), text, question)


def _ids(tokenizer: Any, text: str, **options: Any) -> tuple[int, ...]:
    return tuple(int(token) for token in tokenizer(text, **options)["input_ids"])
