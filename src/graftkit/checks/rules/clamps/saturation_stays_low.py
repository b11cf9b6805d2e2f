"""Check that the adapter does not drive activations into the clamps.

## Why it matters

A clamped activation has no gradient: the adapter can no longer learn what it has pushed over a bound, and the
model computes with the bound instead.

## Example

A vision tower whose linears clamp their inputs and outputs, trained with a learning rate made for the language
model: half of a layer's outputs end on the bound.

## How safe that is

Training again gives another adapter; this one cannot be brought back inside the bounds.

## Sources

- transformers: the forward of the wrapper that is found
- torch: clamp's gradient
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, Setting, failed, passed, unknown
from graftkit.checks.probes.clamps import clamped_shares
from graftkit.checks.probes.live_adapter import adapted_layers, is_untrained
from graftkit.findings import Severity
from graftkit.modeling.bounded_wrappers import bounded_wrappers

if TYPE_CHECKING:
    from peft import PeftModel


def _check(context: CheckContext) -> Observation:
    if not bounded_wrappers(context.model):
        return passed("the model has no bounds around its linears")
    adapted = clamped_shares(context.model, context.batch)
    if not adapted:
        return _unreached(context.model)
    if any(math.isnan(share) for share in adapted.values()):
        return unknown("activations are not finite")
    if is_untrained(context.model):
        return _fresh(_mean(adapted))
    with context.model.disable_adapter():
        base = clamped_shares(context.model, context.batch)
    grown = {path: share - base.get(path, 0.0) for path, share in adapted.items()}
    worst = max(grown, key=lambda path: grown[path])
    allowed = RULE.limit(context.settings, "increase")
    over = [path for path, more in grown.items() if not more <= allowed]
    evidence: dict[str, Any] = {
        "wrappers": len(adapted),
        "over": len(over),
        "worst_increase": grown[worst],
        "share_adapted": _mean(adapted),
        "share_base": _mean(base),
        "allowed_increase": allowed,
    }
    shares = (
        f"{100 * base.get(worst, 0.0):.1f} % of the activations without the adapter, {100 * adapted[worst]:.1f} %"
    )
    if over:
        message = f"the adapter drives {len(over)} of {len(adapted)} linears into their bounds: {shares} with it"
        return failed(message, where=worst, **evidence)
    return passed(
        f"the adapter clamps at most {100 * grown[worst]:.1f} % more of a linear's activations", **evidence
    )


def _unreached(model: PeftModel) -> Observation:
    layers = set(adapted_layers(model).values())
    if any(bounded.layer in layers for bounded in bounded_wrappers(model)):
        return unknown("the batch reaches none of the bounded linears")
    return passed("no adapted linear has bounds, and the batch reaches none that does")


def _fresh(share: float) -> Observation:
    """Return unknown: a fresh adapter computes what the base does, so no check of it could fail."""
    message = f"a fresh adapter changes nothing yet ({100 * share:.1f} % of activations are clamped without it)"
    return unknown(message, help="verify the adapter again after training", share_base=share)


def _mean(shares: dict[str, float]) -> float:
    return sum(shares.values()) / len(shares) if shares else 0.0


RULE = Rule(
    code="GK306",
    title="the adapter keeps activations inside the bounds",
    severity=Severity.WARNING,
    needs=("model", "batch"),
    check=_check,
    help="train again with a lower learning rate, rank or alpha for this tower, or leave it out of the scope",
    since="0.1.0",
    settings={
        "increase": Setting(0.05, "largest accepted growth of the clamped share of one linear's activations"),
    },
)
