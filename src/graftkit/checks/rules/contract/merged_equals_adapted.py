"""Merging must not change what the adapted model computes."""

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
        bounded, bitten = wrapper_effect(model, batch)
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
        "bounded_wrappers_reached": bitten,
    }
    if not apart <= allowed:
        return failed(f"merged and adapted logits differ by {apart:.1e} (allowed {allowed:.0e})", **figures)
    if not effect > allowed:
        return unknown(
            f"the adapter changes the logits by {effect:.1e}, too little to tell a wrong merge", **figures
        )
    if bounded and not bitten:
        return unknown(
            "equal, but the batch drives no wrapper into its bounds, so these were not tested", **figures
        )
    clamps = f", {bitten} of {bounded} bounded wrappers active" if bounded else ""
    return passed(f"merged and adapted logits differ by {apart:.1e}{clamps}", **figures)


RULE = Rule(
    code="GK601",
    title="the merged model computes what the adapted one does",
    severity=Severity.ERROR,
    needs=("model", "batch"),
    check=_check,
    why="the model that is shipped would not be the one that was trained and evaluated",
    example=(
        "A wrapper that clamps is passed to PEFT as if it were a linear: the delta is added outside the "
        "clamp while training, and ends up inside it when merged."
    ),
    help="attach inside the wrapper (its inner linear), then merge again",
    safety=(
        "Attaching to the inner linear is safe, and the tensors keep their keys; an adapter trained "
        "outside the clamp is another adapter."
    ),
    since="0.1.0",
    sources=("https://github.com/huggingface/peft/issues/3129", "https://github.com/huggingface/peft/pull/3130"),
)
