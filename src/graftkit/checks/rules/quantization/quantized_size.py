"""Check that quantizing reaches most of the base: only linears are quantized.

## Why it matters

Bitsandbytes quantizes only linears: experts that are stacked in one parameter stay in 16 bit.

## Example

A mixture of experts with 26 billion weights in 4 bit: 46 GB of experts stay in 16 bit.

## How safe that is

Nothing is changed: this is what loading needs.

## Sources

- https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849
- https://github.com/unslothai/unsloth/issues/5432
- transformers: integrations.bitsandbytes.replace_with_bnb_linear
"""

from __future__ import annotations

from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, Setting, failed, passed
from graftkit.findings import Severity, Source
from graftkit.planning.quantization import plan_quantization
from graftkit.text import size


def _check(context: CheckContext) -> Observation:
    bits = context.training.quantization
    if bits is None:
        return passed("the base is not quantized")
    plan = plan_quantization(context.base, bits)
    stacked = sum(kept.params for kept in plan.kept if kept.role == "expert")
    kept_bytes = round(stacked * plan.kept_bytes / max(plan.kept_params, 1))
    expected = round(context.base.model.params * plan.quantized_bytes / max(plan.quantized_params, 1))
    figures: dict[str, Any] = {
        "total_bytes": plan.total_bytes,
        "expert_bytes": kept_bytes,
        "hoped_bytes": expected,
    }
    if kept_bytes <= RULE.limit(context.settings, "share") * plan.total_bytes:
        return passed(f"in {bits} the base takes {size(plan.total_bytes)}", **figures)
    return failed(
        f"{bits} leaves stacked experts of {size(kept_bytes)} in 16 bit: the base takes {size(plan.total_bytes)},"
        f" not {size(expected)}",
        key="quantization" if context.given.recipe is not None else None,
        help=f"plan for {size(plan.total_bytes)}, or use a release whose experts are quantized for training",
        **figures,
    )


RULE = Rule(
    code="GK301",
    title="quantizing reaches the larger part of the weights",
    severity=Severity.WARNING,
    needs=("base", "training"),
    check=_check,
    help="plan for the actual size",
    since="0.1.0",
    settings={"share": Setting(0.1, "the largest share of the base that experts may keep in 16 bit, 0 to 1")},
    source=Source.INTROSPECTION,
)
