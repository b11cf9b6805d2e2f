"""The chat template that a loss on the assistant's turns is made with: it marks what the assistant says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from graftkit.checks.chat.conversations import Message, TemplateRefusalError, template_of
from graftkit.checks.chat.templates import found_template
from graftkit.errors import TrainingError

# Conversations of the data that a template is tried on.
_TRIED = 16


def check_template(processor: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    """Refuse rows of messages where nothing says how they become text.

    Raises:
        TrainingError: ``no-chat-template``.
    """
    if template_of(processor) is None and any(_conversations(rows)):
        raise TrainingError(
            "the data holds messages, and the tokenizer has no chat template",
            help="args: {chat_template_path: FILE.jinja}, or prompt and completion columns of plain text",
            code="no-chat-template",
        )


def marked_template(processor: Any, rows: Iterable[Mapping[str, Any]]) -> str:
    """A template with generation marks for a processor whose own has none, perhaps.

    See :func:`graftkit.checks.chat.templates.found_template`.

    Args:
        processor: a processor or tokenizer.
        rows: of the data; the first few are tried.

    Raises:
        TrainingError: ``no-chat-template``: there is none, or none with marks.
    """
    if template_of(processor) is None:
        raise _no_template("the tokenizer has no chat template")
    try:
        return found_template(processor, _conversations(rows))
    except TemplateRefusalError as refusal:
        raise _no_template(f"{refusal}, nor one that renders alike") from refusal


class OwnTemplate(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Gives a processor its own template back before anything is saved.

    The last of the callbacks: those before it see the template that the run trains with.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._own = processor.chat_template

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._processor.chat_template = self._own


def _no_template(why: str) -> TrainingError:
    return TrainingError(
        "what the assistant says cannot be told from the rest",
        why=why,
        help=(
            "args: {chat_template_path: FILE.jinja} with {% generation %} around the assistant's turns; "
            "or prompt and completion columns, and no assistant_only_loss"
        ),
        code="no-chat-template",
    )


def _conversations(rows: Iterable[Mapping[str, Any]]) -> Iterable[Sequence[Message]]:
    for _, row in zip(range(_TRIED), rows, strict=False):
        if "messages" in row:
            yield row["messages"]
        elif not isinstance(row.get("prompt", ""), str):
            yield [*row["prompt"], *row.get("completion", ())]
