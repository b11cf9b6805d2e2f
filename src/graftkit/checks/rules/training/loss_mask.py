"""Check that what is learned of a conversation is what the assistant says.

## Why it matters

With an empty mask there is no loss; with a wrong one the model learns to ask the user's questions. Most models'
templates have no generation marks, and TRL has training templates only for those it knows.

## Example

`assistant_only_loss: true` with the template of Gemma 4, which has no `{% generation %}`: TRL 1.16 has no
training template for it and raises; transformers returns a mask of zeros.

## How safe that is

Marks change what is learned, not what is rendered. Without a mask, user turns are learned, too.

## Sources

- https://github.com/huggingface/trl/issues/6578
- trl: trl.chat_template_utils.get_training_chat_template
- transformers: PreTrainedTokenizerBase.apply_chat_template(return_assistant_tokens_mask=True)
"""

from __future__ import annotations

from typing import Any

from graftkit.checks.chat.conversations import (
    ANSWERS,
    QUESTIONS,
    Rendered,
    TemplateRefusalError,
    answers_learned,
    everything_learned,
)
from graftkit.checks.chat.templates import trained_template
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed, unknown
from graftkit.findings import Severity
from graftkit.surveying.sources.local_processor import template_of


def _check(context: CheckContext) -> Observation:
    if template_of(context.processor) is None:
        return unknown("the tokenizer has no chat template")
    in_use = context.given.training is not None and context.training.assistant_only
    try:
        seen = answers_learned(context.processor, trained_template(context))
    except ImportError:
        return unknown("TRL, whose training templates decide this, is not installed")
    except TemplateRefusalError as refusal:
        return _faulty(in_use, str(refusal))
    if (fault := _fault(seen)) is not None:
        return _faulty(in_use, fault, seen)
    if in_use:
        return passed(f"learned of a sample: {seen.learned_text!r}", learned=seen.learned_text)
    return passed(
        "without assistant_only_loss, every token of a conversation is learned",
        learned=everything_learned(context.processor).learned_text,
        learned_with_assistant_only=seen.learned_text,
    )


def _fault(seen: Rendered) -> str | None:
    if not any(seen.learned):
        return "no token of a sample is learned: the template marks nothing as the assistant's"
    missed = [answer for answer in ANSWERS if seen.share_of(answer) < 1]
    if missed:
        return f"what the assistant says is not learned: {missed[0]!r}"
    asked = [question for question in QUESTIONS if seen.share_of(question) > 0]
    if asked:
        return f"what the user says is learned: {asked[0]!r}"
    return None


def _faulty(in_use: bool, fault: str, seen: Rendered | None = None) -> Observation:
    evidence: dict[str, Any] = {} if seen is None else {"learned": seen.learned_text, "tokens": sum(seen.learned)}
    if in_use:
        return failed(fault, where="chat_template", key="args.assistant_only_loss", **evidence)
    return info(f"with assistant_only_loss, {fault}", help="do not set assistant_only_loss", **evidence)


RULE = Rule(
    code="GK206",
    title="the loss mask covers what the assistant says, and nothing else",
    severity=Severity.ERROR,
    needs=("processor",),
    check=_check,
    help=(
        "use a template with {% generation %} around the assistant's turns (chat_template_path), "
        "or no assistant_only_loss"
    ),
    since="0.1.0",
)
