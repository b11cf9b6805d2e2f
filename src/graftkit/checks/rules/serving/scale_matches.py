"""Check that the engine scales the update as PEFT does.

## Why it matters

The adapter loads without an error, and is applied several times too weakly or too strongly.

## Example

SGLang serves an rsLoRA adapter of rank 64, and scales it by alpha / r: eight times too weak.

## How safe that is

The product B·A·scale stays the same up to the rounding of lora_B.

## Sources

- https://github.com/sgl-project/sglang/issues/40835
- https://github.com/vllm-project/vllm/pull/6909
- vllm/lora/peft_helper.py: get_rank_and_scaling, since 0.32
- llama.cpp: src/llama-adapter.h, llama_adapter_lora_weight::get_scale
- peft.tuners.lora.layer.LoraLayer.update_layer
"""

from __future__ import annotations

import math
from typing import Any

from graftkit.checks.adapter_files.engine_support import Scale, require_lora, scales
from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.engines import Stance
from graftkit.findings import Severity, Source


def _check(context: CheckContext) -> Observation:
    require_lora(context)
    found = scales(context.saved, context.engine)
    wrong = {core: scale for core, scale in found.items() if not math.isclose(scale.trained, scale.served)}
    figures: dict[str, Any] = {"engine": str(context.engine), "modules": len(found), "wrong": len(wrong)}
    if not wrong:
        return passed(f"{context.engine} scales all {len(found)} modules as PEFT does", **figures)
    worst = max(wrong, key=lambda core: _distance(wrong[core]))
    scale = wrong[worst]
    message = (
        f"{context.engine} scales {len(wrong)} of {len(found)} modules differently: {scale.served:.3g} instead of "
        f"{scale.trained:.3g}"
    )
    figures |= {
        "ratio": scale.ratio,
        "served": scale.served,
        "trained": scale.trained,
        "stances": [Stance.IGNORES],
    }
    help = f"{context.engine.conversion} writes the scale into lora_B"
    return failed(message, where=worst, help=help, **figures)


def _distance(scale: Scale) -> float:
    return abs(math.log(scale.ratio)) if 0 < scale.ratio < math.inf else math.inf


RULE = Rule(
    code="GK704",
    title="the engine scales the update as PEFT does",
    severity=Severity.ERROR,
    needs=("adapter", "engine"),
    check=_check,
    help="graft convert ADAPTER OUT --to ENGINE writes the scale into lora_B, with lora_alpha = r",
    since="0.1.0",
    source=Source.VERSIONS,
)
