"""Check that an adapter that was converted for one engine is given to that engine.

## Why it matters

Engines call the same weights differently, and scale by different fields. A file that one of them reads right is
refused by another, or applied in part.

## Example

An adapter was converted for llama.cpp, and its folder is handed to vLLM, which finds no `adapter_config.json`.

## How safe that is

The mark in `graftkit.json`, or the kind of the files, says what an adapter was converted for.

## Sources

- https://github.com/vllm-project/vllm/issues/34186
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.engines import Feature
from graftkit.findings import Severity, Source


def _check(context: CheckContext) -> Observation:
    form, engine = context.form, context.engine
    if form == engine.dialect:
        return passed(f"it is in the form that {engine} reads", form=form)
    if engine.dialect is None:
        advice = engine.advice(engine.fact(Feature.PEFT_FILES))
        return failed(f"it is in {form}'s form, and {engine} reads no adapters", help=advice, form=form)
    return failed(
        f"it is in {form}'s form, and {engine} reads {engine.dialect}'s",
        help=engine.conversion,
        form=form,
        wanted=engine.dialect,
    )


RULE = Rule(
    code="GK707",
    title="a converted adapter is in the form of the engine that is to serve it",
    severity=Severity.ERROR,
    needs=("form", "engine"),
    check=_check,
    help="convert it for the engine that is to serve it",
    since="0.1.0",
    source=Source.VERSIONS,
)
