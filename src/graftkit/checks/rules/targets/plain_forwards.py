"""No adapter may sit on a layer that computes something else than its base class does.

## Why it matters

PEFT accepts any subclass of a linear, and its layer then returns one tensor where the model expects what the
subclass returns: the first forward crashes, or computes something else.

## Example

"all-linear" on a mixture of experts whose router is an nn.Linear that returns scores and indices.

## How safe that is

Leaving it out changes nothing else.

## Sources

- peft: tuners.lora.layer.dispatch_default
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.peft_config.fixes import recipe_key, retargeted
from graftkit.findings import Severity, Source
from graftkit.surveying.sites import Obstacle
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    strange = [site for site in resolved.sites if site.obstacle is Obstacle.OWN_FORWARD]
    if not strange:
        return passed(f"none of the {len(resolved.sites)} adapted layers has its own forward")
    left_out = {site.path for site in strange}
    return failed(
        f"{len(strange)} adapted layers: {strange[0].reason}: {some(site.path for site in strange)}",
        where=strange[0].path,
        fix=retargeted(context, (path for path in resolved.modules if path not in left_out)),
        key=recipe_key(context, "target_modules"),
        layers=len(strange),
    )


RULE = Rule(
    code="GK108",
    title="no adapter is on a layer with its own forward",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=_check,
    help="leave the layer out of the targets, or adapt its weight through target_parameters",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
