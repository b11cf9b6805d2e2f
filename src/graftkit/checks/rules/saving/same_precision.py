"""Check that the base to merge onto has the precision that the adapter was trained on.

## Why it matters

The adapter also learned to correct the quantization error, which another base does not have.

## Example

QLoRA trains on a 4-bit copy; the adapter is then merged onto the 16-bit release.

## How safe that is

Merging into a quantized base loses updates that are smaller than the quantization step.

## Sources

- https://github.com/unslothai/unsloth/issues/3091
"""

from __future__ import annotations

from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed
from graftkit.findings import Severity, Source

_BITS = {"bitsandbytes 4-bit": "4bit", "bitsandbytes 8-bit": "8bit"}


def _check(context: CheckContext) -> Observation:
    trained = context.training.quantization
    quantizers = sorted({site.quantized for site in context.base if site.quantized})
    precision = _BITS.get(quantizers[0], quantizers[0]) if quantizers else None
    figures: dict[str, Any] = {"trained": trained, "base": precision}
    if trained == precision:
        return passed(f"trained on the precision that the base has ({trained or 'not quantized'})", **figures)
    if precision is None:
        return info(
            f"trained on the base in {trained}, and the base itself is not quantized: merged onto it, the outputs "
            "change by the quantization error",
            where="quantization",
            help="compare the logits of both on your data, or merge onto the base quantized and dequantized",
            **figures,
        )
    message = (
        f"trained on the base {'in ' + trained if trained else 'unquantized'}, and this base is in {precision}"
    )
    return failed(message, where="quantization", key="quantization", **figures)


RULE = Rule(
    code="GK605",
    title="the base to merge onto has the precision that the adapter was trained on",
    severity=Severity.WARNING,
    needs=("base", "training"),
    check=_check,
    help="merge onto the base in 16 bits, and compare the merged model's logits with the adapter's",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
