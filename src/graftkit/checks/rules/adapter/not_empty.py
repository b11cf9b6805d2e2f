"""Check that the weights file has tensors, and none of size 0.

## Why it matters

The training is lost: a partitioned parameter is a placeholder of size 0 on every process.

## Example

Under ZeRO-3 `save_pretrained` is called without gathering: each `lora_A.weight` in the file has the shape
`[0]`.

## How safe that is

Gathering changes no value; it needs the memory of the adapter on one process.

## Sources

- https://github.com/huggingface/trl/issues/4416
- https://github.com/huggingface/peft/issues/2892
- https://github.com/deepspeedai/DeepSpeed/issues/7900
"""

from __future__ import annotations

import math

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.findings import Severity
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    tensors = context.adapter.tensors
    empty = [name for name, header in tensors.items() if not math.prod(header.shape)]
    if not tensors:
        return failed("the weights file has no tensors", tensors=0, empty=0)
    if empty:
        message = f"{len(empty)} of {len(tensors)} tensors have size 0: {some(empty)}"
        return failed(message, where=empty[0], tensors=len(tensors), empty=len(empty))
    return passed(f"{len(tensors)} tensors, none of size 0", tensors=len(tensors), empty=0)


RULE = Rule(
    code="GK401",
    title="the adapter was not saved empty",
    severity=Severity.ERROR,
    needs=("adapter",),
    check=_check,
    help=(
        "save again with the parameters gathered (`deepspeed.zero.GatheredParameters`, or "
        "`stage3_gather_16bit_weights_on_model_save`), or train with ZeRO-2; the optimizer's checkpoint still "
        "holds the weights (`zero_to_fp32.py`)"
    ),
    since="0.1.0",
)
