"""The recipe's adapter must be possible on the model, exactly.

## Why it matters

A request that is met in part would train something else than intended.

## Example

`targets: [q_proj, k_prj]`: "k_prj" names nothing on this model.

## How safe that is

The plan says what is adapted before anything is loaded.

## Sources

- https://github.com/huggingface/peft/issues/3554
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.checks.peft_config.resolved import ResolvedTargets
from graftkit.findings import Severity, Source
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    if context.given.recipe_refusal is not None:
        error = context.given.recipe_refusal
        return failed(
            ": ".join(part for part in (error.what, error.why) if part),
            where=error.where,
            help=error.help,
            key="adapter.options" if context.recipe.fields.adapter.options else "adapter",
            error=error.code,
        )
    if context.given.plan is None:
        return _stock(context)
    return passed(f"{len(context.plan.attached)} sites are adapted, as asked", sites=len(context.plan.attached))


def _stock(context: CheckContext) -> Observation:
    """Check a stock configuration, which is not planned: PEFT accepts its fields, or refuses them."""
    if context.given.folder is not None or context.given.peft_config is None:
        return unknown("the configuration of a saved adapter is checked instead of the recipe's")
    resolved = ResolvedTargets(context.peft_config, context.base)
    key = "adapter.peft_config"
    if resolved.faults:
        message = f"the configuration cannot be used: {some(resolved.faults)}"
        return failed(message, key=key, problems=len(resolved.faults))
    if resolved.problems:
        return unknown(f"what PEFT does with it is not known: {some(resolved.problems)}")
    if resolved.ignored:
        name, near = next(iter(resolved.ignored.items()))
        advice = f"did you mean {near}?" if near else None
        message = f"PEFT ignores {name}: its class has no such field"
        return failed(message, help=advice, key=f"{key}.{name}", ignored=name)
    if resolved.refusals:
        first = resolved.refusals[0]
        return failed(f"PEFT refuses {first.where}: {first.why}", key=key, refusal=first.kind.name.lower())
    return passed("PEFT accepts the stock configuration")


RULE = Rule(
    code="GK100",
    title="what the recipe asks for can be planned and attached, exactly",
    severity=Severity.ERROR,
    needs=("recipe", "base"),
    check=_check,
    help="change the request as the message says; `graft plan MODEL` shows what a request means",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
