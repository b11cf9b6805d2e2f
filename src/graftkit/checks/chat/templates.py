"""Finding a chat template whose generation marks show which tokens are the assistant's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checks.chat.conversations import (
    Message,
    TemplateRefusalError,
    apply_template,
    assistant,
    sample,
    user,
)
from graftkit.surveying.sources.local_processor import local_processor, template_of, tokenizer_of

if TYPE_CHECKING:
    from graftkit.checks.engine.context import CheckContext


def as_trained(processor: Any, args: Mapping[str, Any]) -> Any | None:
    """Return the processor with the template and the end token that a recipe's arguments give it.

    None if the template is that of another model, which is not on this machine.
    Source: ``trl.trainer.sft_trainer.SFTTrainer.__init__``.
    """
    if args.get("eos_token") is not None:
        tokenizer_of(processor).eos_token = args["eos_token"]
    path = args.get("chat_template_path")
    if path is None:
        return processor
    if Path(path).is_file() and str(path).endswith((".jinja", ".j2")):
        processor.chat_template = Path(path).read_text(encoding="utf-8")
        return processor
    other = local_processor(path)
    if other is not None:
        processor.chat_template = template_of(other)
    return None if other is None else processor


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
    recipe = context.given.recipe
    # TRL reads a template that the user names, and graftkit then looks for no other.
    find = marked_template if recipe is None or recipe.args.get("chat_template_path") else found_template
    return find(context.processor)


def _equivalent(processor: Any, conversations: Sequence[Sequence[Message]]) -> str | None:
    """Return a training template of TRL's that renders the conversations as the processor's own does, or None."""
    own = template_of(processor)
    rendered = [_text_or_none(processor, own, conversation) for conversation in conversations]
    for template in _training_templates() if rendered[0] is not None else ():
        if all(_text_or_none(processor, template, t) == r for t, r in zip(conversations, rendered, strict=True)):
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


def _text_or_none(processor: Any, template: str | None, conversation: Sequence[Message]) -> str | None:
    """Return the text, or None if the template refuses the conversation."""
    try:
        text: str = apply_template(processor, conversation, template)
    except TemplateRefusalError:
        return None
    return text
