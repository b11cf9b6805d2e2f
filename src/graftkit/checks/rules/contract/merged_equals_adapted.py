"""Check that the merged model computes what the adapted one does.

## Why it matters

The merged model would not be the one that was trained and evaluated.

## Example

A wrapper that clamps is given to PEFT as a linear: in training the update is added outside the clamp, after
merging it is inside.

Where rounding decides a rank or a length, the outputs of two equal models can differ. The comparison is then
repeated in float64, which tells rounding from a wrong merge.

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
from graftkit.checks.probes.forward import compare, tolerance
from graftkit.checks.probes.live_adapter import perturbing
from graftkit.checks.probes.merging import MergeRefusedError, merged_pass, repeat_in_float64
from graftkit.findings import Severity
from graftkit.modeling.outputs import outputs_of


def _check(context: CheckContext) -> Observation:
    model, batch, allowed = context.model, context.batch, tolerance(context.model)
    with perturbing(model):
        adapted = outputs_of(model, batch)
        bounded, reached = wrapper_effect(model, batch)
        try:
            merged = merged_pass(model, batch)
        except MergeRefusedError as refusal:
            return unknown(str(refusal), refused=refusal.by_design)
        compared = compare(adapted, merged.outputs)
        equal = compared.difference <= allowed
        exact = None if equal else repeat_in_float64(model, batch, merged)
    effect = compare(adapted, context.base_outputs).difference
    figures: dict[str, Any] = {
        **compared.figures,
        "adapter_effect": effect,
        "tolerance": allowed,
        "bounded_wrappers": bounded,
        "bounded_wrappers_reached": reached,
    }
    if exact is not None:
        figures |= {"difference_in_float64": exact.difference, "weights_difference": exact.weights}
    apart = f"merged and adapted outputs differ by {compared.difference:.1e}"
    if not equal and (exact is None or not exact.agrees):
        return failed(f"{apart} (allowed {allowed:.0e})", **figures)
    if not effect > allowed:
        return unknown(
            f"the adapter changes the outputs by {effect:.1e}, too little to show a wrong merge", **figures
        )
    if bounded and not reached:
        return unknown(
            "equal, but the batch drives no wrapper into its bounds, so the bounds were not tested", **figures
        )
    clamps = f", {reached} of {bounded} bounded wrappers active" if bounded else ""
    if exact is not None:
        return passed(f"{apart}, in float64 by {exact.difference:.1e}: rounding decides{clamps}", **figures)
    return passed(f"{apart}{clamps}", **figures)


RULE = Rule(
    code="GK601",
    title="the merged model computes what the adapted one does",
    severity=Severity.ERROR,
    needs=("model", "batch"),
    check=_check,
    help="attach to the linear inside the wrapper, then merge again",
    since="0.1.0",
)
