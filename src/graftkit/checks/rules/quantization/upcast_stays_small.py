"""Check that k-bit preparation, which casts all that stayed in 16 bit to float32, would add little memory.

## Why it matters

What stayed in 16 bit, such as experts and per-layer embeddings, takes twice the memory afterwards.

## Example

4-bit training of a mixture of experts with 26 billion weights: 46 GB of experts become 92 GB.

## How safe that is

The preparation also turns on re-entrant checkpointing by default: see GK202.

## Sources

- peft: utils.other.prepare_model_for_kbit_training
"""

from __future__ import annotations

from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, Setting, failed, info, passed
from graftkit.findings import Severity, Source
from graftkit.planning.quantization import plan_quantization
from graftkit.text import size


def _check(context: CheckContext) -> Observation:
    bits = context.training.quantization
    if bits is None:
        return passed("the base is not quantized")
    plan = plan_quantization(context.base, bits)
    figures: dict[str, Any] = {"upcast_bytes": plan.upcast_bytes, "total_bytes": plan.total_bytes}
    if plan.upcast_bytes <= RULE.limit(context.settings, "share") * plan.total_bytes:
        return passed(f"k-bit preparation would add {size(plan.upcast_bytes)}", **figures)
    largest = plan.kept[0]
    message = (
        f"prepare_model_for_kbit_training would add {size(plan.upcast_bytes)} to {size(plan.total_bytes)}:"
        f" most of it for {largest.tower} {largest.role} weights that stayed in 16 bit"
    )
    if context.given.recipe is not None:
        return info(message, help="TRL's trainers do not call it, and it is not needed: leave it out", **figures)
    return failed(message, **figures)


RULE = Rule(
    code="GK302",
    title="k-bit preparation would add little",
    severity=Severity.WARNING,
    needs=("base", "training"),
    check=_check,
    help="leave out prepare_model_for_kbit_training and freeze the base yourself, or cast only the norms",
    since="0.1.0",
    settings={
        "share": Setting(0.25, "the largest growth of the loaded base that is passed over, as a share of it")
    },
    source=Source.INTROSPECTION,
)
