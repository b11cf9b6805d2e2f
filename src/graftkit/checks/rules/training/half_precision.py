"""Check that a model made for bfloat16 is not trained in float16, whose range is far smaller.

## Why it matters

Float16 ends at 65,504: if activations go beyond, the loss becomes NaN after some steps.

## Example

`fp16: true` for a model whose embeddings are scaled by the square root of its width.

## How safe that is

bfloat16 takes the same memory, and needs a device that has it (Ampere or newer).

## Sources

- https://github.com/huggingface/transformers/issues/36822
- https://github.com/huggingface/transformers/issues/39972
- https://github.com/unslothai/unsloth/pull/5074
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.findings import Fix, Severity, Source

_LARGEST = 65_504


def _check(context: CheckContext) -> Observation:
    if context.training.precision != "fp16":
        return passed(f"the forward pass is in {context.training.precision}")
    made_for = _dtype(context.config)
    if made_for is None:
        return unknown("the model's configuration has no dtype")
    if made_for != "bfloat16":
        return passed(f"the model was made for {made_for}")
    return failed(
        f"training is in float16, the model was made for bfloat16: activations over {_LARGEST:,} are infinite",
        fix=Fix("recipe", {"args.bf16": True, "args.fp16": False}) if context.given.recipe is not None else None,
        key="args.fp16",
        largest=_LARGEST,
    )


def _dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype in the configuration, or in that of its text model, without "torch."."""
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, Mapping) else {}):
        given = fields.get("dtype") or fields.get("torch_dtype")
        if given is not None:
            return str(given).removeprefix("torch.")
    return None


RULE = Rule(
    code="GK209",
    title="a model made for bfloat16 is not trained in float16",
    severity=Severity.WARNING,
    needs=("config", "training"),
    check=_check,
    help="train in bfloat16, or in float32 on a device without it",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
