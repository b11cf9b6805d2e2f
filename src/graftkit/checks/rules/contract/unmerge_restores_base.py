"""Unmerging must give the base weights back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed, unknown
from graftkit.checks.probes.forward import tolerance
from graftkit.checks.probes.live_adapter import adapted_layers, perturbing
from graftkit.checks.probes.merging import MergeRefusedError, merging
from graftkit.findings import Severity

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

# Adding a delta and taking it away rounds twice. Each rounding is at most half a unit in the last place of the
# merged weight, so two units of the larger operand bound the sum with room for the delta being computed twice.
_UNITS = 2.0


def _check(context: CheckContext) -> Observation:
    model = context.model
    try:
        with perturbing(model), merging(model) as before:
            merged = _weights(model, before)
            model.unmerge_adapter()
            after = _weights(model, before)
    except MergeRefusedError as refusal:
        return unknown(str(refusal))
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
        return failed(
            f"a base weight comes back {errors[worst]:.1f} units of rounding off", where=worst, **figures
        )
    if not drifts[lost] <= tolerance(model):
        message = f"the adapter outweighs the base: a weight comes back {100 * drifts[lost]:.2g} % of its size off"
        return failed(message, where=lost, **figures)
    return passed(
        f"{exact} of {len(before)} weights come back bit for bit, the others within "
        f"{errors[worst]:.1f} units of rounding",
        **figures,
    )


def _adds(model: PeftModel) -> bool:
    """Whether merging adds one delta, for which the unit bound holds; other methods scale or rotate the weight."""
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
    """Largest error in units in the last place of the largest value involved, element by element."""
    import torch

    if not before.is_floating_point():
        return 0.0 if before.equal(after) else float("inf")
    step = torch.finfo(before.dtype).eps
    scale = torch.maximum(before.abs(), merged.abs()).float().clamp_min(torch.finfo(before.dtype).tiny)
    return _finite(((after.float() - before.float()).abs() / (scale * step)).max())


def _drift(before: Tensor, after: Tensor) -> float:
    """Largest error relative to the tensor's largest weight: rounding of a large delta can swamp a small base."""
    if not before.is_floating_point():
        return 0.0
    return _finite((after.float() - before.float()).abs().max() / before.abs().max().float().clamp_min(1e-12))


def _finite(value: Tensor) -> float:
    """The value, or infinity where it is not finite: a weight that is no number was not restored."""
    return float(value) if value.isfinite() else float("inf")


RULE = Rule(
    code="GK607",
    title="unmerging restores the base weights",
    severity=Severity.ERROR,
    needs=("model",),
    check=_check,
    why=("a base that drifts with every merge and unmerge makes adapters trained on it fit less and less"),
    example=(
        "A base in bfloat16 and a delta much larger than its weights: adding and taking away rounds the "
        "base to the delta's precision."
    ),
    help="reload the base instead of unmerging, or keep adapters unmerged",
    safety="Reloading the base is always right.",
    since="0.1.0",
    sources=("peft: lora.Linear.merge, lora.Linear.unmerge",),
)
