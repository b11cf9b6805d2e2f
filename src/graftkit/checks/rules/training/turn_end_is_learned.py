"""Check that the token that ends the assistant's turn is learned.

## Why it matters

A model that never learns the token that ends its turn does not stop, and the loss does not show it.

## Example

A template whose `{% endgeneration %}` stands before `<turn|>`; or one that ends a turn with the next message's
header, so that the last turn has no end.

## How safe that is

The rendered text of a conversation that continues stays the same.

## Sources

- https://github.com/axolotl-ai-cloud/axolotl/issues/3754
- trl: trl.chat_template_utils.is_chat_template_stop_token_trained
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graftkit.checks.chat.conversations import (
    ANSWERS,
    Rendered,
    TemplateRefusalError,
    answers_learned,
    everything_learned,
)
from graftkit.checks.chat.templates import trained_template
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed, unknown
from graftkit.findings import Severity
from graftkit.surveying.sources.local_processor import template_of, tokenizer_of


def _check(context: CheckContext) -> Observation:
    if template_of(context.processor) is None:
        return unknown("the tokenizer has no chat template")
    assistant_only = context.given.training is not None and context.training.assistant_only
    try:
        whole = _Ends.of(everything_learned(context.processor), context.processor)
    except TemplateRefusalError as refusal:
        return unknown(f"the template refuses a plain conversation: {refusal}")
    masked = _masked(context)
    if masked is None and assistant_only:
        return unknown("there is no loss mask to check (see GK206)", **whole.evidence)
    in_use = masked if masked is not None and assistant_only else whole
    if in_use.places[0] is None:
        return unknown("no special token follows an answer", **in_use.evidence)
    if in_use.faults:
        return failed(in_use.faults[0], where="chat_template", **in_use.evidence)
    if masked is not None and masked.faults:
        message = f"with assistant_only_loss, {masked.faults[0]}"
        return info(message, help="do not set assistant_only_loss", **masked.evidence)
    return passed(f"the end of a turn ({in_use.evidence['terminator']}) is learned", **in_use.evidence)


@dataclass(frozen=True)
class _Ends:
    """Where each answer of a rendered sample ends: the span of the special token after it, or None."""

    seen: Rendered
    places: tuple[tuple[int, int] | None, ...]
    eos: str | None

    @classmethod
    def of(cls, seen: Rendered, processor: Any) -> _Ends:
        """Find the ends. Raises UndecidableError if the template drops or rewrites an answer."""
        tokenizer = tokenizer_of(processor)
        specials = _specials(tokenizer)
        places = tuple(_end(seen.text, seen.span_of(answer)[1], specials) for answer in ANSWERS)
        return cls(seen, places, getattr(tokenizer, "eos_token", None))

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong after each answer whose end is not learned."""
        found = (self._fault(place, answer) for place, answer in zip(self.places, ANSWERS, strict=True))
        return tuple(fault for fault in found if fault is not None)

    def _fault(self, place: tuple[int, int] | None, answer: str) -> str | None:
        if place is None:
            return "the template puts no end token after the last answer, so a single turn never shows how to stop"
        return None if self.seen.share(*place) == 1 else f"the token that ends a turn is masked after {answer!r}"

    @property
    def evidence(self) -> dict[str, Any]:
        first = self.places[0]
        terminator = None if first is None else self.seen.text[slice(*first)]
        return {"terminator": terminator, "eos_token": self.eos, "learned": self.seen.learned_text}


def _masked(context: CheckContext) -> _Ends | None:
    """Return the sample under assistant_only_loss, or None if TRL cannot mask it."""
    try:
        return _Ends.of(answers_learned(context.processor, trained_template(context)), context.processor)
    except (ImportError, TemplateRefusalError):
        return None


def _specials(tokenizer: Any) -> list[str]:
    known = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    return sorted((token for token in known if token.strip()), key=len, reverse=True)


def _end(text: str, start: int, specials: list[str]) -> tuple[int, int] | None:
    """Return the span of the special token that follows ``start`` after at most white space, or None."""
    start += len(text[start:]) - len(text[start:].lstrip())
    found = next((token for token in specials if text.startswith(token, start)), None)
    return None if found is None else (start, start + len(found))


RULE = Rule(
    code="GK207",
    title="the end of the assistant's turn is learned",
    severity=Severity.ERROR,
    needs=("processor",),
    check=_check,
    help="put the token inside {% generation %} … {% endgeneration %}, and after the last turn too",
    since="0.1.0",
)
