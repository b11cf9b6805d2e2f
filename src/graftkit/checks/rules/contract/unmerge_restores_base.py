"""Check that unmerging restores the base weights.

## Why it matters

A base that changes with every merge and unmerge fits its adapters less and less.

## Example

A bfloat16 base and an update much larger than its weights: adding and subtracting it rounds the base to the
update's precision.

## How safe that is

Reloading the base is always right.

## Sources

- peft: lora.Linear.merge, lora.Linear.unmerge
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.checks.probes.forward import tolerance
from graftkit.checks.probes.live_adapter import adapted_layers, perturbing
from graftkit.checks.probes.merging import MergeRefusedError, merging
from graftkit.findings import Severity
from graftkit.text import percent

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

# Adding and subtracting an update rounds twice, each time by at most half a unit in the last place (ulp) of the
# merged weight. Two ulp of the larger operand leave room for computing the update twice.
_UNITS = 2.0


def _check(context: CheckContext) -> Observation:
    model = context.model
    try:
        with perturbing(model), merging(model) as before:
            merged = _weights(model, before)
            model.unmerge_adapter()
            after = _weights(model, before)
    except MergeRefusedError as refusal:
        return unknown(str(refusal), refused=refusal.by_design)
    errors = {name: _units(before[name], merged[name], after[name]) for name in before}
    drifts = {name: _drift(before[name], after[name]) for name in before}
    changed = sum(not before[name].equal(merged[name]) for name in before)
    if not changed:
        return unknown("merging changed no weight, so there was nothing to restore", tensors=len(before))
    worst, lost = max(errors, key=lambda name: errors[name]), max(drifts, key=lambda name: drifts[name])
    exact = sum(units == 0 for units in errors.values())
    figures: dict[str, Any] = {
        "tensors": len(before),
        "bitwise_equal": exact,
        "worst_units": errors[worst],
        "allowed_units": _UNITS,
    }
    if _adds(model) and not errors[worst] <= _UNITS:
        return failed(f"a base weight is {errors[worst]:.1f} ulp off after unmerging", where=worst, **figures)
    if not drifts[lost] <= tolerance(model):
        message = (
            f"the update is much larger than the base: a weight is {percent(drifts[lost])} off after unmerging"
        )
        return failed(message, where=lost, **figures)
    return passed(
        f"{exact} of {len(before)} weights are restored bit for bit, the others within {errors[worst]:.1f} ulp",
        **figures,
    )


def _adds(model: PeftModel) -> bool:
    """Check whether merging adds one update, for which the bound holds; other methods scale or rotate weights."""
    config = model.active_peft_config
    return str(config.peft_type).endswith("LORA") and not getattr(config, "use_dora", False)


def _weights(model: PeftModel, names: dict[str, Tensor]) -> dict[str, Tensor]:
    layers = adapted_layers(model)
    found = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        found[name] = getattr(layers[path].get_base_layer(), leaf).detach().clone()
    return found


def _units(before: Tensor, merged: Tensor, after: Tensor) -> float:
    """Return the largest error, elementwise, in ulp of the larger of the original and the merged weight."""
    import torch

    if not before.is_floating_point():
        return 0.0 if before.equal(after) else float("inf")
    step = torch.finfo(before.dtype).eps
    scale = torch.maximum(before.abs(), merged.abs()).float().clamp_min(torch.finfo(before.dtype).tiny)
    return _finite(((after.float() - before.float()).abs() / (scale * step)).max())


def _drift(before: Tensor, after: Tensor) -> float:
    """Return the largest error relative to the tensor's largest weight; it grows with the size of the update."""
    if not before.is_floating_point():
        return 0.0
    return _finite((after.float() - before.float()).abs().max() / before.abs().max().float().clamp_min(1e-12))


def _finite(value: Tensor) -> float:
    """Return the value, or infinity where it is NaN or infinite: such a weight was not restored."""
    return float(value) if value.isfinite() else float("inf")


RULE = Rule(
    code="GK607",
    title="unmerging restores the base weights",
    severity=Severity.ERROR,
    needs=("model",),
    check=_check,
    help="reload the base instead of unmerging, or keep adapters unmerged",
    since="0.1.0",
)
