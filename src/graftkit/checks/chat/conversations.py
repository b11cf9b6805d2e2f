"""A sample conversation as training renders it: its text, its tokens, and which of them are learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

from graftkit.checks.engine.context import UndecidableError
from graftkit.surveying.sources.local_processor import template_of, tokenizer_of
from graftkit.text import first_line

# Texts that no template contains.
QUESTIONS = ("Which river flows through Vienna?", "And which through Rome?")
ANSWERS = ("The Danube.", "The Tiber.")

# Rows among which conversations are looked for.
_READ = 16

Message = Mapping[str, Any]


def sample() -> list[Message]:
    """Return two questions, each with its answer."""
    turns = zip(QUESTIONS, ANSWERS, strict=True)
    return [message for question, answer in turns for message in (user(question), assistant(answer))]


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: Any) -> Message:
    return {"role": "assistant", "content": content, **fields}


class TemplateRefusalError(Exception):
    """A template, or TRL, refuses to render a conversation; the message says why."""


def conversations_in(rows: Iterable[Mapping[str, Any]]) -> Iterator[Sequence[Message]]:
    """Yield the conversations among the first rows: their messages, or prompts of messages with completions."""
    for row in islice(rows, _READ):
        if "messages" in row:
            yield row["messages"]
        elif not isinstance(row.get("prompt", ""), str):
            yield [*row["prompt"], *row.get("completion", ())]


def render(processor: Any, messages: Sequence[Message]) -> str:
    """Return the conversation as text. Templates that take content in parts get it in parts.

    Raises:
        TemplateRefusalError: the template refuses these messages.
    """
    text, _ = _rendered(processor, messages, template_of(processor))
    return text


def sample_rendering(processor: Any) -> str | None:
    """Return the sample conversation as the chat template renders it; None without one, or where it is refused."""
    if template_of(processor) is None:
        return None
    try:
        return render(processor, sample())
    except TemplateRefusalError:
        return None


def apply_template(processor: Any, messages: Sequence[Message], template: str | None, **options: Any) -> Any:
    """Return what the tokenizer's ``apply_chat_template`` returns: the text, unless the options say otherwise.

    Raises:
        TemplateRefusalError: the template, or the tokenizer, refuses these messages.
    """
    from jinja2 import TemplateError

    options = {"tokenize": False, **options}
    try:
        return tokenizer_of(processor).apply_chat_template(list(messages), chat_template=template, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise TemplateRefusalError(first_line(error)) from error


def _rendered(processor: Any, messages: Sequence[Message], template: str | None) -> tuple[str, Sequence[Message]]:
    """Return the text, and the messages in the form that the template takes."""
    plain = [message["content"] for message in messages if message["content"]]
    refusal: TemplateRefusalError | None = None
    best: tuple[str, Sequence[Message]] | None = None
    for form in (messages, [_in_parts(message) for message in messages]):
        try:
            text: str = apply_template(processor, form, template)
        except TemplateRefusalError as error:
            refusal = refusal or error
            continue
        if all(content in text for content in plain):
            return text, form
        best = best or (text, form)
    if best is not None:
        return best
    assert refusal is not None
    raise refusal


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


@dataclass(frozen=True)
class Rendered:
    """A conversation as training sees it.

    Attributes:
        text: the rendered text.
        spans: each token's start and end in ``text``.
        learned: for each token, whether it counts in the loss.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    learned: tuple[bool, ...]

    @property
    def learned_text(self) -> str:
        """The text of the learned tokens, runs of them separated by " … "."""
        tokens = zip(self.spans, self.learned, strict=True)
        runs = (run for learned, run in groupby(tokens, key=itemgetter(1)) if learned)
        return " … ".join("".join(self.text[start:end] for (start, end), _ in run) for run in runs)

    def share(self, start: int, end: int) -> float:
        """Return the share of the tokens from ``start`` to ``end`` that is learned, 0 where there are none."""
        tokens = zip(self.spans, self.learned, strict=True)
        inside = [learned for (left, right), learned in tokens if left < end and right > start]
        return sum(inside) / len(inside) if inside else 0.0

    def span_of(self, content: str) -> tuple[int, int]:
        """Return the start and end of a text that occurs once.

        Raises:
            UndecidableError: the template drops or rewrites it.
        """
        start = self.text.find(content)
        if start < 0:
            raise UndecidableError(f"the template does not render {content!r} as it is written (see GK208)")
        return start, start + len(content)

    def share_of(self, content: str) -> float:
        """Return :meth:`share` for a text that occurs once. Raises as :meth:`span_of`."""
        return self.share(*self.span_of(content))


def everything_learned(processor: Any) -> Rendered:
    """Return the sample with every token learned, as TRL trains on conversations by default."""
    text = render(processor, sample())
    spans = _spans(tokenizer_of(processor), text)
    return Rendered(text, spans, (True,) * len(spans))


def answers_learned(processor: Any, template: str) -> Rendered:
    """Return the sample with those tokens learned that the template marks as the assistant's.

    Raises:
        TemplateRefusalError: the template refuses the sample.
    """
    text, form = _rendered(processor, sample(), template)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = apply_template(processor, form, template, **options)
    mask = tuple(bool(flag) for flag in encoded["assistant_masks"])
    return Rendered(text, _spans(tokenizer_of(processor), text), mask)


def _spans(tokenizer: Any, text: str) -> tuple[tuple[int, int], ...]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return tuple((start, end) for start, end in encoded["offset_mapping"])
