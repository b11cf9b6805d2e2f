"""Adapters must be in the intended towers alone, and on no router that was not named.

## Why it matters

Adapters in a tower that no batch feeds cost memory and train nothing, and under DDP they stop the run; adapters
on a router change which experts are used.

## Example

`target_modules: "all-linear"` on a model with vision and audio: 41 of 92 adapters are in the vision and audio
towers. `["q_proj.linear"]` names layers of the wrapped towers alone.

## How safe that is

Leaving a tower out changes what is trained: where batches feed it, it may be intended.

## Sources

- https://github.com/huggingface/trl/issues/6617
- peft: tuners.tuners_utils._maybe_include_all_linear_layers
- peft: utils.transformers_weight_conversion._resolve_string_target_modules
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed, unknown
from graftkit.checks.peft_config.fixes import recipe_key, retargeted
from graftkit.checks.peft_config.resolved import ResolvedTargets
from graftkit.checks.probes.modality_inputs import always_fed, is_fed, may_be_fed
from graftkit.findings import Severity, Source
from graftkit.surveying.sites import UNKNOWN_TOWER, ModelMap, Site


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    if context.given.plan is not None:
        planned = {attached.path for attached in context.plan.attached}
        stray = [site for site in resolved.sites if site.path not in planned]
    else:
        stray = _unasked(context, resolved)
    figures: dict[str, Any] = {tower: len(sites) for tower, sites in resolved.by_tower.items()}
    if not stray and (unclear := _of_no_known_tower(context, resolved)):
        return unknown(f"it is not known whether the batches feed {unclear} of the adapted modules", **figures)
    if not stray:
        return passed(f"all {len(resolved.sites)} adapters are where they were asked for", **figures)
    counted = Counter("routers" if site.role == "router" else site.tower for site in stray)
    places = ", ".join(f"{number} in {place}" for place, number in counted.most_common())
    message = f"{len(stray)} of {len(resolved.sites)} adapters are where none were asked for: {places}"
    fed = [site for site in stray if _in_fed_tower(context, resolved.base, site)]
    knows_batches = context.given.plan is not None or context.modalities is not None
    if context.given.plan is None and len(fed) == len(stray):
        return info(message, where=stray[0].path, help="the batches feed them; leave them out to save", **figures)
    return failed(
        message,
        where=stray[0].path,
        # Mechanical only where it is known that the batches do not feed what would be left out.
        fix=retargeted(context, _without(resolved, stray)) if knows_batches and not fed else None,
        key=recipe_key(context, "target_modules"),
        **figures,
    )


def _unasked(context: CheckContext, resolved: ResolvedTargets) -> list[Site]:
    """Return adapted sites in towers that no target mentions or no batch feeds, and routers that no target names.

    Where PEFT rewrites targets it keeps only their last names, so that a regular expression loses its scope.
    """
    usual = always_fed(resolved.base) | resolved.mentioned
    if context.modalities is not None:
        usual = frozenset(tower for tower in usual if is_fed(resolved.base, tower, context.modalities))
    beyond = _beyond(resolved)
    usual = usual.union(tower for tower in resolved.by_tower if may_be_fed(resolved.base, tower))
    return [
        site
        for site in resolved.sites
        if site.tower not in usual or site.path in beyond or (resolved.is_all_linear and site.role == "router")
    ]


def _of_no_known_tower(context: CheckContext, resolved: ResolvedTargets) -> int:
    """Count adapted sites of which neither a plan nor the targets' names say that they were meant."""
    if context.given.plan is not None or UNKNOWN_TOWER in resolved.mentioned:
        return 0
    return sum(len(sites) for tower, sites in resolved.by_tower.items() if may_be_fed(resolved.base, tower))


def _beyond(resolved: ResolvedTargets) -> frozenset[str]:
    if not isinstance(resolved.targets, str) or not resolved.expert_names:
        return frozenset()
    return resolved.targeted.difference(resolved.meant)


def _in_fed_tower(context: CheckContext, base: ModelMap, site: Site) -> bool:
    """Check whether a site is in an additional tower that the batches are known to feed."""
    additional = site.role != "router" and site.tower not in always_fed(base)
    return additional and is_fed(base, site.tower, context.modalities or ())


def _without(resolved: ResolvedTargets, stray: list[Site]) -> list[str]:
    left_out = {name for site in stray for name in site.names}
    return [path for path in resolved.modules if path not in left_out]


RULE = Rule(
    code="GK102",
    title="adapters are only where they were asked for",
    severity=Severity.WARNING,
    needs=("peft_config", "base"),
    check=_check,
    help="name the intended towers, in `target_modules` or as the scope of a plan",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
