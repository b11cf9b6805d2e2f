"""Names that PEFT fuses into one parameter must be named together.

## Why it matters

Gate and up projection are one parameter of the experts, and PEFT raises where one of them is named.

## Example

`target_modules: ["q_proj", "gate_proj"]` on a mixture of experts: "Cannot convert PEFT target(s) gate_proj
without also targeting up_proj".

## How safe that is

The other projection is trained too.

## Sources

- peft: utils.transformers_weight_conversion._convert_peft_config_moe
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.peft_config.fixes import config_fix, recipe_key
from graftkit.checks.peft_config.raw import RefusalKind
from graftkit.checks.peft_config.resolved import ResolvedTargets
from graftkit.findings import Fix, Severity, Source


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    refusal = resolved.refusal(RefusalKind.FUSED)
    if refusal is None:
        return passed("names that PEFT fuses are named together")
    missing = _missing(resolved)
    return failed(
        refusal.why,
        where=refusal.where,
        help=f"add {', '.join(missing)}, or leave out what it is fused with" if missing else None,
        fix=_fix(context, resolved, missing),
        key=recipe_key(context, "target_modules"),
        missing=missing,
    )


def _missing(resolved: ResolvedTargets) -> list[str]:
    """Return the names that are missing beside those of the same fused parameter."""
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN[resolved.base.model.model_type]
    present = {
        target.rpartition(".")[2] for target in resolved.targets or () if isinstance(resolved.targets, tuple)
    }
    fused = conversion._MOE_FUSED_TARGETS[pattern].values()
    return [name for names in fused if present & set(names) for name in names if name not in present]


def _fix(context: CheckContext, resolved: ResolvedTargets, missing: list[str]) -> Fix | None:
    if not missing or not isinstance(resolved.targets, tuple):
        return None
    return config_fix(context, {"target_modules": [*resolved.targets, *missing]})


RULE = Rule(
    code="GK106",
    title="names that PEFT fuses are named together",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=_check,
    help="name both",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
