"""Check that the engine has a place for every tensor, and finds every tensor that it expects.

## Why it matters

The server or the converter fails at a tensor that it has no place for, or that is missing.

## Example

Layers that share keys and values have a `q_proj` and no `v_proj`. SGLang fuses the three projections when it
loads an adapter, and raises a KeyError.

## How safe that is

`graft convert` compares the update that it wrote with the original's, slice by slice. Zeros add nothing.

## Sources

- https://github.com/sgl-project/sglang/issues/25913
- https://github.com/sgl-project/sglang/pull/28199
- vllm/lora/model_manager.py: _validate_moe_lora_format
- llama.cpp: conversion/base.py, map_tensor_name
"""

from __future__ import annotations

from graftkit.checks.adapter_files.engine_support import judge_modules
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule
from graftkit.engines import Stance
from graftkit.findings import Severity, Source


def _check(context: CheckContext) -> Observation:
    # What the engine skips is for GK702 to report.
    return judge_modules(context, bad=Stance.REFUSES)


RULE = Rule(
    code="GK705",
    title="the adapter's names map to tensors of the engine",
    severity=Severity.ERROR,
    needs=("adapter", "base", "engine"),
    check=_check,
    help="graft convert ADAPTER OUT --to ENGINE, or merge the adapter",
    since="0.1.0",
    source=Source.VERSIONS,
)
