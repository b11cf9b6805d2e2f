"""Every role that was asked for should be there, and be adapted.

## Why it matters

One request, such as `targets: [attention, mlp, experts]`, is meant to fit every architecture, so that a plan
passes over a role that a model does not have. Where the model has such weights and no adapter can go on them,
something that was asked for is not trained.

## Example

`mlp` on a mixture whose MLPs are all stacked experts: there is none, and `experts` names them. `ssm` on mixers
whose projections a fused kernel reads: they exist, and cannot be adapted.

## How safe that is

The other targets are adapted exactly as asked. `strict: true` in the recipe, or `graft plan --strict`, refuses
instead of passing over.

## Sources

- peft: tuners.tuners_utils._check_lora_target_modules_mamba
"""

from __future__ import annotations

from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed
from graftkit.checks.peft_config.fixes import recipe_key
from graftkit.findings import Severity, Source


def _check(context: CheckContext) -> Observation:
    unmet = context.plan.unmet
    if not unmet:
        return passed(f"each of the {len(context.plan.targets)} targets is adapted")
    first = next((target for target in unmet if target.exists), unmet[0])
    message = "; ".join(f"{target.target} is not adapted: {target.reason}" for target in unmet)
    causes: dict[str, Any] = {target.target: target.cause.name.lower() for target in unmet}
    if not first.exists:
        return info(message, where=context.plan.model.model.name, **causes)
    return failed(message, where=first.sites[0], key=recipe_key(context, "target_modules"), **causes)


RULE = Rule(
    code="GK117",
    title="every role that was asked for is adapted",
    severity=Severity.WARNING,
    needs=("plan",),
    check=_check,
    help="leave the role out of the targets; `graft plan` shows why each weight is left alone",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
