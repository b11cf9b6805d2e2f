"""No adapter may be on a layer whose weight the model reads without calling the layer.

## Why it matters

A fused kernel, or the model, reads the layer's weight without calling the layer: the adapter gets no gradient,
or works in one mode and not in the other.

## Example

`out_proj` or `conv1d` of a state-space mixer, whose fused kernel is handed the weights.

## How safe that is

What is left out was not trained, or not consistently.

## Sources

- https://github.com/huggingface/peft/issues/2274
- https://github.com/huggingface/peft/pull/2562
- peft: tuners.tuners_utils._check_lora_target_modules_mamba
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.peft_config.fixes import recipe_key, retargeted
from graftkit.checks.peft_config.raw import RefusalKind
from graftkit.findings import Severity, Source
from graftkit.surveying.sites import Obstacle
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    refused = {refusal.where: refusal.why for refusal in resolved.refusals if refusal.kind is RefusalKind.MIXER}
    ignored = {site.path: site.reason or "" for site in resolved.sites if site.obstacle is Obstacle.BYPASSED}
    bad = {**refused, **ignored}
    if not bad:
        return passed(f"the model calls each of the {len(resolved.sites)} adapted layers")
    first = next(iter(bad))
    verdict = "PEFT refuses them" if refused else "what is trained there has no effect, or only sometimes"
    return failed(
        f"the model reads the weights of {len(bad)} targets without calling them, and {verdict}: {bad[first]}:"
        f" {some(bad)}",
        where=first,
        fix=retargeted(context, (path for path in resolved.modules if path not in bad)),
        key=recipe_key(context, "target_modules"),
        layers=len(bad),
    )


RULE = Rule(
    code="GK110",
    title="no adapter is on a layer whose weight the model reads without calling it",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=_check,
    help="leave it out of the targets",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
