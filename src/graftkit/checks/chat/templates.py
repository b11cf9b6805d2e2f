"""The chat template that a loss on the assistant's turns is made with: it marks what the assistant says."""

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

_UNKNOWN = "the template has no generation marks, and TRL has no template to train with in its place"


def marked_template(processor: Any) -> str:
    """The template with which TRL masks all but the assistant's tokens: the model's own where it has marks.

    Source: ``trl.trainer.sft_trainer.SFTTrainer.__init__``.

    Raises:
        TemplateRefusalError: there are no marks, and TRL has no template of its own in its place.
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
        raise TemplateRefusalError(_UNKNOWN) from error


def found_template(processor: Any, conversations: Iterable[Sequence[Message]] = ()) -> str:
    """As :func:`marked_template`, else any of TRL's that renders the same text: graftkit trains with that one.

    A revision of a template that TRL knows, or a template that two models share, needs none of its own. (For Gemma
    4's five, TRL 1.16 has no training template; it has one for DiffusionGemma, which speaks alike.)

    Args:
        processor: a processor or tokenizer with a chat template.
        conversations: to be rendered alike, beside the samples.

    Raises:
        TemplateRefusalError: there is none, or the template refuses the samples.
        ImportError: TRL is not installed.
    """
    try:
        return marked_template(processor)
    except TemplateRefusalError:
        if (alike := _alike(processor, [*_samples(), *conversations])) is None:
            raise
        return alike


def trained_template(context: CheckContext) -> str:
    """A recipe is trained with a template that graftkit looks for; everybody else's trainer has TRL's alone.

    Raises:
        TemplateRefusalError, ImportError: as :func:`found_template`.
    """
    find = marked_template if context.given.recipe is None else found_template
    return find(context.processor)


def _alike(processor: Any, conversations: Sequence[Sequence[Message]]) -> str | None:
    own = template_of(processor)
    rendered = [_rendered(processor, own, told) for told in conversations]
    for template in _all_of_trl() if rendered[0] is not None else ():
        if all(_rendered(processor, template, t) == r for t, r in zip(conversations, rendered, strict=True)):
            return template
    return None


def _all_of_trl() -> tuple[str, ...]:
    """TRL's training templates. It keeps each as a string in one module (trl.chat_template_utils)."""
    from trl import chat_template_utils

    texts = (value for value in vars(chat_template_utils).values() if isinstance(value, str))
    return tuple(text for text in texts if chat_template_utils.has_generation_markers(text))


def _samples() -> Iterable[Sequence[Message]]:
    plain = sample()
    yield plain
    yield [{"role": "system", "content": "Be brief."}, *plain]
    yield [user("  spaces \n"), assistant("  and\n\nlines ")]


def _rendered(processor: Any, template: str | None, conversation: Sequence[Message]) -> str | None:
    """The text, or None where the template refuses."""
    from jinja2 import TemplateError

    try:
        text: str = tokenizer_of(processor).apply_chat_template(
            list(conversation), chat_template=template, tokenize=False
        )
    except (TemplateError, TypeError, ValueError):
        return None
    return text
