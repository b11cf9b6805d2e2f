"""Nothing may show that the adapter was trained without the bounds of the base's wrappers.

## Why it matters

With a wrapper's bounds around it, an adapter that was trained without them computes something else, and nothing
raises: not loading, not merging.

## Example

A tool redirects `q_proj` to the linear inside, and PEFT puts its layer where the wrapper was: the clamp is gone.
The tensors are called `q_proj.lora_A`, as those of a tool that clamps the sum of linear and adapter.

## How safe that is

`gk.migrate(…, trained_without_clamp=…)` writes what you know into the metadata of the weights, and changes no
value. Under `gk.unwrap` the adapter then gives the outputs that were trained. Where the tensors name the linears
inside, there were wrappers in training; that their bounds were those of the base is in no file, and not checked.

## Sources

- https://github.com/huggingface/peft/issues/3129
- https://github.com/huggingface/peft/pull/3130
"""

from __future__ import annotations

from graftkit.adapters.trained_bounds import TrainedBounds, trained_bounds
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    if context.saved.prefix is None:
        return unknown(f"adapters of type {some([context.adapter.peft_type])} have no tensors in a model's layers")
    adapted = context.fit.adapted
    bounded = [site for _, site in adapted if site.wrapper is not None and site.wrapper.bounded]
    bounds = trained_bounds(context.adapter, adapted)
    if bounds is TrainedBounds.REMOVED:
        return failed(
            f"{len(bounded)} adapted linears have bounds in this base, and were trained without them",
            where=bounded[0].path,
            help="use it under gk.unwrap(model, allow_change=True), with paths= where other wrappers were kept",
            bounded=len(bounded),
        )
    if bounds is TrainedBounds.UNKNOWN:
        return failed(
            f"{len(bounded)} adapted linears have bounds in this base, and may have been trained without them",
            where=bounded[0].path,
            severity=Severity.WARNING,
            bounded=len(bounded),
        )
    if not bounded:
        return passed("it adapts no linear that has bounds", bounded=0)
    reason = "its file says that they were kept" if bounds else "its tensors name the linears inside the wrappers"
    return passed(f"it adapts {len(bounded)} linears that have bounds, and {reason}", bounded=len(bounded))


RULE = Rule(
    code="GK509",
    title="nothing shows that the adapter was trained without the bounds of the base's wrappers",
    severity=Severity.ERROR,
    needs=("adapter", "base"),
    check=_check,
    help="if you know how it was trained: gk.migrate(adapter, base, out, trained_without_clamp=True or False)",
    since="0.1.0",
)
