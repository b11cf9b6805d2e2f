"""Check that every field of a message appears in the text that is learned.

## Why it matters

What the template leaves out is not in the text, so it is not learned, and there is no error.

## Example

The first templates of Gemma 4 render `reasoning_content` only in messages with tool calls: with a data set of
questions, thoughts and answers, only questions and answers are learned.

## How safe that is

The model then sees the field where the template puts it: keep the place that it was trained on.

## Sources

- trl: trl.chat_template_utils.supports_tool_calling
- the chat template itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftkit.checks.chat.conversations import (
    ANSWERS,
    QUESTIONS,
    Message,
    TemplateRefusalError,
    assistant,
    render,
    sample,
    user,
)
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed, unknown
from graftkit.findings import Severity
from graftkit.surveying.sources.local_processor import template_of

_THOUGHT = "Rivers and capitals come to mind."
_CALL = [
    {"id": "call00001", "type": "function", "function": {"name": "find_river", "arguments": {"city": "Vienna"}}}
]
_RESULT: Message = {
    "role": "tool",
    "name": "find_river",
    "tool_call_id": "call00001",
    "content": "Danube, 2850 km",
}
_SYSTEM: Message = {"role": "system", "content": "You answer in one sentence."}


@dataclass(frozen=True)
class _Field:
    """A field of a message, and what shows that it was rendered.

    Attributes:
        name: as it stands in a finding.
        messages: a conversation with this field.
        signs: texts that must appear.
    """

    name: str
    messages: Sequence[Message]
    signs: tuple[str, ...]


def _fields() -> tuple[_Field, ...]:
    question, answer = user(QUESTIONS[0]), assistant(ANSWERS[0])
    thought = assistant(ANSWERS[0], reasoning_content=_THOUGHT)
    call = assistant("", tool_calls=_CALL)
    thoughtful_call = {**call, "reasoning_content": _THOUGHT}
    return (
        _Field("content", sample(), (*QUESTIONS, *ANSWERS)),
        _Field("the system message", [_SYSTEM, question, answer], (str(_SYSTEM["content"]),)),
        _Field("reasoning_content of the last answer", [question, thought], (_THOUGHT,)),
        _Field("reasoning_content of an earlier answer", [question, thought, *sample()[2:]], (_THOUGHT,)),
        _Field("tool_calls", [question, call, _RESULT, answer], ("find_river", "Vienna")),
        _Field("the tool's result", [question, call, _RESULT, answer], (str(_RESULT["content"]),)),
        _Field("reasoning_content of a tool call", [question, thoughtful_call, _RESULT, answer], (_THOUGHT,)),
    )


def _check(context: CheckContext) -> Observation:
    if template_of(context.processor) is None:
        return unknown("the tokenizer has no chat template")
    fates = {field.name: _fate(context.processor, field) for field in _fields()}
    dropped = [name for name, fate in fates.items() if fate == "dropped"]
    evidence: dict[str, Any] = {"fields": fates}
    if fates["content"] != "rendered":
        return failed("the template does not render the content of messages", where="chat_template", **evidence)
    if dropped:
        message = f"the template drops {', '.join(dropped)} without an error"
        return info(message, help="if the data has it, put it into content, or use another template", **evidence)
    refused = [name for name, fate in fates.items() if fate == "refused"]
    kept = len(fates) - len(refused)
    return passed(f"{kept} of {len(fates)} kinds of content are rendered, the others refused", **evidence)


def _fate(processor: Any, field: _Field) -> str:
    """``"rendered"``, ``"dropped"``, or ``"refused"`` with an error that stops the training."""
    try:
        text = render(processor, field.messages)
    except TemplateRefusalError:
        return "refused"
    return "rendered" if all(sign in text for sign in field.signs) else "dropped"


RULE = Rule(
    code="GK208",
    title="the template renders every field of a message",
    severity=Severity.ERROR,
    needs=("processor",),
    check=_check,
    help="use a template that renders the field (chat_template_path)",
    since="0.1.0",
)
