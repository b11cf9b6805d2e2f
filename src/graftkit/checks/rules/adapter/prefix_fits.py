"""Check that the adapter's module paths begin as those of the base do.

## Why it matters

No tensor matches, PEFT warns once, and the model that is served is the base.

## Example

An adapter is trained on a family's text-only class (`model.layers…`) and loaded on its multimodal class
(`model.language_model.layers…`).

## How safe that is

Renaming changes no value. A prefix is only suggested if every tensor then fits by shape.

## Sources

- https://github.com/huggingface/transformers/issues/46766
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity
from graftkit.modeling.unwrapping import PEFT_PREFIX
from graftkit.text import some

# The longest common endings come first, so the right prefix is among the first.
_MOST_PREFIXES = 64


def _check(context: CheckContext) -> Observation:
    modules = context.fit.saved.modules
    if not modules:
        return unknown("the file names no module of a base")
    found = sum(context.fit.has_place(names[0]) for names in modules.values())
    if found:
        return passed(f"{found} of {len(modules)} adapted modules are in the base under their name", found=found)
    fitting = next((pair for pair in islice(_prefixes(context), _MOST_PREFIXES) if _fits(context, *pair)), None)
    if fitting is None:
        message = f"none of {len(modules)} adapted modules is in the base, and no other prefix would help"
        trained_on = context.adapter.config.get("base_model_name_or_path")
        advice = "give the base it was trained on" + (f": {some([trained_on])}" if trained_on else "")
        return failed(message, where=next(iter(modules)), help=advice, found=0)
    before, after = (PEFT_PREFIX + part for part in fitting)
    return failed(
        f"none of {len(modules)} adapted modules is in the base; with {after!r:.200} for {before!r:.200} all are",
        where=next(iter(modules)),
        help=f"re-key the tensors from {before!r:.200} to {after!r:.200}, or load the class it was trained on",
        found=0,
        prefix=before,
        fitting_prefix=after,
    )


def _prefixes(context: CheckContext) -> Iterator[tuple[str, str]]:
    """Yield pairs: how the first module's path begins, and how a site with the same ending begins."""
    parts = next(iter(context.fit.saved.modules)).split(".")
    for at in range(len(parts)):
        head, tail = parts[:at], ".".join(parts[at:])
        for path in context.fit.sites:
            if path == tail or path.endswith(f".{tail}"):
                yield ".".join((*head, "")), path.removesuffix(tail)


def _fits(context: CheckContext, before: str, after: str) -> bool:
    names = (name for names in context.fit.saved.modules.values() for name in names)
    return all(
        name.startswith(PEFT_PREFIX + before)
        and context.fit.has_place(name, PEFT_PREFIX + after + name.removeprefix(PEFT_PREFIX + before))
        for name in names
    )


RULE = Rule(
    code="GK502",
    title="the adapter's paths begin as the base's do",
    severity=Severity.ERROR,
    needs=("adapter", "base"),
    check=_check,
    help="re-key the tensors, or load the class that the adapter was trained on",
    since="0.1.0",
)
