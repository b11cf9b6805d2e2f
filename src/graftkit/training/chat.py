"""The chat template that a loss on the assistant's turns is made with: it marks what the assistant says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback

from graftkit.checks.conversations import Message, assistant, sample, template_of, user
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

    The model's own where it has marks, else the one that TRL has for exactly that text, else any of TRL's that
    renders sample conversations and these rows as the model's own does: a revision of a template that TRL knows,
    or a template that two models share, needs none of its own. (For Gemma 4's five, TRL 1.16 has no training
    template; it has one for DiffusionGemma, which speaks alike.)

    Args:
        processor: a processor or tokenizer.
        rows: of the data; the first few are tried.

    Raises:
        TrainingError: ``no-chat-template``: there is none, or none with marks.
    """
    from trl.chat_template_utils import has_generation_markers

    own = template_of(processor)
    if own is None:
        raise _no_template("the tokenizer has no chat template")
    if has_generation_markers(own):
        return own
    if (known := _known(processor)) is not None:
        return known
    conversations = [*_samples(), *_conversations(rows)]
    rendered = [_rendered(processor, own, told) for told in conversations]
    for template in _all_of_trl() if rendered[0] is not None else ():
        if all(_rendered(processor, template, t) == r for t, r in zip(conversations, rendered, strict=True)):
            return template
    raise _no_template("the template marks nothing as the assistant's, and TRL has none that renders alike")


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


def _known(processor: Any) -> str | None:
    from trl.chat_template_utils import get_training_chat_template

    try:
        found: str | None = get_training_chat_template(processor)
    except ValueError:
        return None
    return found


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


def _conversations(rows: Iterable[Mapping[str, Any]]) -> Iterable[Sequence[Message]]:
    for _, row in zip(range(_TRIED), rows, strict=False):
        if "messages" in row:
            yield row["messages"]
        elif not isinstance(row.get("prompt", ""), str):
            yield [*row["prompt"], *row.get("completion", ())]


def _rendered(processor: Any, template: str, conversation: Sequence[Message]) -> str | None:
    """The text, or None where the template refuses."""
    from jinja2 import TemplateError

    tokenizer = getattr(processor, "tokenizer", processor)
    try:
        text: str = tokenizer.apply_chat_template(list(conversation), chat_template=template, tokenize=False)
    except (TemplateError, TypeError, ValueError):
        return None
    return text
