"""Finding a chat template whose generation marks show which tokens are the assistant's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from graftkit.checks.chat.conversations import (
    Message,
    TemplateRefusalError,
    assistant,
    sample,
    template_of,
    tokenizer_of,
    user,
)

if TYPE_CHECKING:
    from graftkit.checks.engine.context import CheckContext


def marked_template(processor: Any) -> str:
    """Return the template with which TRL masks all but the assistant's tokens: the model's own if it has marks.

    Source: ``trl.trainer.sft_trainer.SFTTrainer.__init__``.

    Raises:
        TemplateRefusalError: there are no marks, and TRL has no training template for it.
        ImportError: TRL is not installed.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    own = template_of(processor)
    assert own is not None
    if has_generation_markers(own):
        return own
    try:
        return get_training_chat_template(processor) or own
    except ValueError as error:
        message = "the template has no generation marks, and TRL has no training template for it"
        raise TemplateRefusalError(message) from error


def found_template(processor: Any, conversations: Iterable[Sequence[Message]] = ()) -> str:
    """Return :func:`marked_template`, or else a template of TRL's that renders the same text, to train with.

    This covers revisions of a template that TRL knows, and templates that two models share. (TRL 1.16 has no
    training template for Gemma 4's five; the one for DiffusionGemma renders the same text.)

    Args:
        processor: a processor or tokenizer with a chat template.
        conversations: texts that both templates must render alike, beside the samples.

    Raises:
        TemplateRefusalError: there is no such template, or it refuses the samples.
        ImportError: TRL is not installed.
    """
    try:
        return marked_template(processor)
    except TemplateRefusalError:
        template = _equivalent(processor, [*_samples(), *conversations])
        if template is None:
            raise
        return template


def trained_template(context: CheckContext) -> str:
    """Return the template that training will use: with a recipe the one that graftkit finds, else TRL's.

    Raises:
        TemplateRefusalError, ImportError: as :func:`found_template`.
    """
    find = marked_template if context.given.recipe is None else found_template
    return find(context.processor)


def _equivalent(processor: Any, conversations: Sequence[Sequence[Message]]) -> str | None:
    """Return a training template of TRL's that renders the conversations as the processor's own does, or None."""
    own = template_of(processor)
    rendered = [_rendered(processor, own, conversation) for conversation in conversations]
    for template in _training_templates() if rendered[0] is not None else ():
        if all(_rendered(processor, template, t) == r for t, r in zip(conversations, rendered, strict=True)):
            return template
    return None


def _training_templates() -> tuple[str, ...]:
    """Return TRL's training templates, which are strings in trl.chat_template_utils."""
    from trl import chat_template_utils

    texts = (value for value in vars(chat_template_utils).values() if isinstance(value, str))
    return tuple(text for text in texts if chat_template_utils.has_generation_markers(text))


def _samples() -> Iterable[Sequence[Message]]:
    plain = sample()
    yield plain
    yield [{"role": "system", "content": "Be brief."}, *plain]
    yield [user("  spaces \n"), assistant("  and\n\nlines ")]


def _rendered(processor: Any, template: str | None, conversation: Sequence[Message]) -> str | None:
    """Return the text, or None if the template refuses the conversation."""
    from jinja2 import TemplateError

    try:
        text: str = tokenizer_of(processor).apply_chat_template(
            list(conversation), chat_template=template, tokenize=False
        )
    except (TemplateError, TypeError, ValueError):
        return None
    return text
