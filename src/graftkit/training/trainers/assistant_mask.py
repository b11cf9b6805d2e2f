"""The chat template of a loss on the assistant's turns alone, chosen for the data that is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TrainerCallback

from graftkit.checks.chat.conversations import TemplateRefusalError, conversations_in
from graftkit.checks.chat.templates import found_template
from graftkit.errors import TrainingError
from graftkit.surveying.sources.local_processor import template_of


def check_template(processor: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    """Check that a chat template can turn the rows' messages into text.

    Raises:
        TrainingError: ``no-chat-template``.
    """
    if template_of(processor) is None and any(conversations_in(rows)):
        raise TrainingError(
            "the data holds messages, and the tokenizer has no chat template",
            help="args: {chat_template_path: FILE.jinja}, or prompt and completion columns of plain text",
            code="no-chat-template",
        )


def template_for(processor: Any, rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a template with generation marks that renders these rows as the processor's own does.

    Raises:
        TrainingError: ``no-chat-template``: there is no template, or none with marks.
    """
    if template_of(processor) is None:
        raise _no_template("the tokenizer has no chat template")
    try:
        return found_template(processor, conversations_in(rows))
    except TemplateRefusalError as refusal:
        raise _no_template(f"{refusal}, nor one that renders alike") from refusal


class RestoreChatTemplate(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Restores a processor's own template before anything is saved.

    The last of the callbacks: those before it see the template that the run trains with.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._own = processor.chat_template

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._processor.chat_template = self._own


def _no_template(why: str) -> TrainingError:
    return TrainingError(
        "the loss cannot be limited to what the assistant says",
        why=why,
        help=(
            "args: {chat_template_path: FILE.jinja} with {% generation %} around the assistant's turns; "
            "or prompt and completion columns, and no assistant_only_loss"
        ),
        code="no-chat-template",
    )
