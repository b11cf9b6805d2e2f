"""Check that a converted adapter is whole in the form that it is marked with.

## Why it matters

An engine that lacks one of a weight's copies, or one half of a pair, computes something that nobody trained,
without an error.

## Example

An adapter on keys that are the values too was converted for vLLM, and a script then removed the tensors of
`v_proj`, which stock PEFT would not load.

## How safe that is

Every tensor is read as the engine reads it: by its name, with its scale. Whether the values are those that were
trained is not known here: the conversion compared them with the original.

## Sources

- https://github.com/vllm-project/vllm/pull/41944
- https://github.com/sgl-project/sglang/pull/28199
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.findings import Severity, Source


def _check(context: CheckContext) -> Observation:
    if context.given.converted_refusal is not None:
        seen = context.given.converted_refusal
        why = f": {seen.why}" if seen.why else ""
        return failed(f"{seen.what}{why}", where=seen.where, help=seen.help, refusal=seen.code)
    found = context.converted
    message = f"all {found.updates} updates of its {found.dialect} form have their place in the base"
    return passed(message, form=found.dialect, updates=found.updates)


RULE = Rule(
    code="GK514",
    title="a converted adapter is whole in its form",
    severity=Severity.ERROR,
    needs=("base",),
    reads=("converted", "converted_refusal"),
    check=_check,
    help="convert the original adapter again",
    since="0.1.0",
    source=Source.FILE,
)
