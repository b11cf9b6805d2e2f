"""Check that shapes and types are an adapter's, and that values are finite and trained.

## Why it matters

NaN spreads to every output, a malformed tensor cannot be loaded, and a B of zeros means no training.

## Example

A half-precision run overflows in its last steps: `lora_B` is NaN, and nobody looked at the loss.

## How safe that is

The file cannot be repaired: values that were lost have to be trained again.

## Sources

- peft: tuners.lora.layer.LoraLayer.reset_lora_parameters
"""

from __future__ import annotations

import math
from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Severity
from graftkit.text import some

# The factors of an update: matrices, or kernels of a convolution. Source: peft.tuners.lora.layer.
_MATRICES = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})
# Source: https://huggingface.co/docs/safetensors/index#format, less what a trained factor cannot be.
_FLOATS = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"})
# They start at zero, so that a fresh adapter adds nothing, and training moves them.
_STARTS_AT_ZERO = frozenset({"lora_B", "lora_embedding_A"})


def _check(context: CheckContext) -> Observation:
    tensors = context.adapter.tensors
    empty = [name for name, header in tensors.items() if not math.prod(header.shape)]
    flat = [n for n, h in tensors.items() if len(h.shape) < 2 and _is_factor(n)]
    if empty or flat:
        what = f"{len(empty)} tensors of size 0, {len(flat)} of one dimension that should have two"
        first = (empty or flat)[0]
        return failed(
            f"{what}: {some(dict.fromkeys(empty + flat))}", where=first, empty=len(empty), flat=len(flat)
        )
    if not tensors:
        return unknown("the file has no tensors")
    strange = [name for name, header in tensors.items() if header.dtype not in _FLOATS and _is_factor(name)]
    if strange:
        kinds = sorted({tensors[name].dtype for name in strange})
        message = f"{len(strange)} tensors have a type that no adapter has ({some(kinds)}): {some(strange)}"
        return failed(message, where=strange[0], strange=len(strange))
    if context.given.data is None:
        return unknown(f"the shapes of {len(tensors)} tensors are valid; the data was not read")
    broken = [name for name, stat in context.data.stats.items() if not stat.finite]
    if broken:
        message = f"{len(broken)} of {len(tensors)} tensors have NaN or infinite values: {some(broken)}"
        return failed(message, where=broken[0], not_finite=len(broken))
    return _judge_zeros(context)


def _is_factor(name: str) -> bool:
    return _is_one_of(_MATRICES, name)


def _is_one_of(factors: frozenset[str], name: str) -> bool:
    """Check whether the tensor is such a factor itself: with ``lora_bias``, B has a vector beside its matrix."""
    parts = name.split(".")
    return not factors.isdisjoint(parts) and parts[-1] != "bias"


def _judge_zeros(context: CheckContext) -> Observation:
    starting = [n for n in context.data.stats if _is_one_of(_STARTS_AT_ZERO, n)]
    # Of an embedding's pair either factor may be the one that starts at zero, of a linear's always B.
    zero = [name for name in starting if context.data.stats[name].square == 0]
    if not zero:
        return passed(f"{len(context.data.stats)} tensors, all finite, none left at zero")
    if len(zero) == len(starting):
        message = f"all {len(zero)} B tensors are zero: the adapter is untrained and adds nothing"
        advice = "check that the trained adapter was saved, and that it received gradients (graft verify)"
    else:
        message = f"{len(zero)} of {len(starting)} B tensors are zero, so their layers add nothing: {some(zero)}"
        advice = "these layers got no gradient: check that the data feeds their tower"
    figures: dict[str, Any] = {"zero": len(zero), "starting_at_zero": len(starting)}
    return failed(message, where=zero[0], help=advice, severity=Severity.WARNING, **figures)


RULE = Rule(
    code="GK503",
    title="the adapter's tensors are valid",
    severity=Severity.ERROR,
    needs=("adapter",),
    check=_check,
    help="take an earlier checkpoint, and train with a smaller learning rate or in bfloat16",
    since="0.1.0",
)
