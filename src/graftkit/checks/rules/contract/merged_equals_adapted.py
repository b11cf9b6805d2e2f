"""Check that the merged model computes what the adapted one does.

## Why it matters

The merged model would not be the one that was trained and evaluated.

## Example

A wrapper that clamps is given to PEFT as a linear: in training the update is added outside the clamp, after
merging it is inside.

## How safe that is

Attaching to the inner linear is safe, and the tensors keep their keys. An adapter that was trained outside the
clamp has to be trained again.

## Sources

- https://github.com/huggingface/peft/issues/3129
- https://github.com/huggingface/peft/pull/3130
"""

from __future__ import annotations

from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.checks.probes.clamps import wrapper_effect
from graftkit.checks.probes.forward import difference, logits_of, tolerance
from graftkit.checks.probes.live_adapter import perturbing
from graftkit.checks.probes.merging import MergeRefusedError, merging
from graftkit.findings import Severity


def _check(context: CheckContext) -> Observation:
    model, batch = context.model, context.batch
    with perturbing(model):
        adapted = logits_of(model, batch)
        bounded, reached = wrapper_effect(model, batch)
        try:
            with merging(model):
                merged = logits_of(model, batch)
        except MergeRefusedError as refusal:
            return unknown(str(refusal))
    apart, effect = difference(adapted, merged), difference(adapted, context.base_logits)
    allowed = tolerance(model)
    figures: dict[str, Any] = {
        "difference": apart,
        "adapter_effect": effect,
        "tolerance": allowed,
        "bounded_wrappers": bounded,
        "bounded_wrappers_reached": reached,
    }
    if not apart <= allowed:
        return failed(f"merged and adapted logits differ by {apart:.1e} (allowed {allowed:.0e})", **figures)
    if not effect > allowed:
        return unknown(
            f"the adapter changes the logits by {effect:.1e}, too little to show a wrong merge", **figures
        )
    if bounded and not reached:
        return unknown(
            "equal, but the batch drives no wrapper into its bounds, so the bounds were not tested", **figures
        )
    clamps = f", {reached} of {bounded} bounded wrappers active" if bounded else ""
    return passed(f"merged and adapted logits differ by {apart:.1e}{clamps}", **figures)


RULE = Rule(
    code="GK601",
    title="the merged model computes what the adapted one does",
    severity=Severity.ERROR,
    needs=("model", "batch"),
    check=_check,
    help="attach to the linear inside the wrapper, then merge again",
    since="0.1.0",
)
