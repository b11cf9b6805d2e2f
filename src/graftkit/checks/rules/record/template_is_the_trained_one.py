"""Check that the base's chat template renders conversations as the one that the adapter was trained with.

## Why it matters

A server renders messages with the template that it finds beside the base. Where training used another one,
every prompt is one that the adapter never saw.

## Example

An adapter is trained on a base model with a template given by hand, and served beside the base's files, which
have another template, or none.

## How safe that is

The texts of the templates are compared, and where they differ what they make of one conversation of four turns.
Templates that render it alike may differ in what they make of tools or system prompts.

## Sources

- https://github.com/ollama/ollama/issues/6823
- https://github.com/hiyouga/LlamaFactory/issues/6020
"""

from __future__ import annotations

from graftkit.adapters.fingerprints.tokenizer import template_hash
from graftkit.checks.chat.conversations import sample_rendering
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity, Source


def _check(context: CheckContext) -> Observation:
    known = context.record.tokenizer
    if known is None:
        return unknown("its graftkit.json has no chat template")
    now = template_hash(context.processor)
    if now == known.template:
        return passed(
            "no chat template, as in training" if now is None else "the same chat template as in training"
        )
    if known.template is None:
        return passed("there is a chat template, and the adapter was trained without one")
    if now is None:
        return failed("it was trained with a chat template, and there is none")
    rendered = sample_rendering(context.processor)
    if rendered is not None and rendered == known.rendering:
        return passed("another chat template, which renders a conversation of four turns alike")
    return failed("the chat template renders a conversation otherwise than the one in training")


RULE = Rule(
    code="GK512",
    title="the chat template is the one that the adapter was trained with",
    severity=Severity.WARNING,
    needs=("record", "processor"),
    check=_check,
    help="give the server the template of training, as vllm serve --chat-template FILE",
    since="0.1.0",
    source=Source.FILE,
)
