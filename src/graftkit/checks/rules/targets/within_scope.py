"""Adapters must land in the towers that were meant, and on no router that nobody named."""

from __future__ import annotations

from collections import Counter
from typing import Any

from graftkit.checks.engine.context import Facts
from graftkit.checks.engine.rule import Observation, Rule, failed, held, noted
from graftkit.checks.peft_config.fixes import retargeted, written_at
from graftkit.checks.peft_config.resolved import Reach, with_reach
from graftkit.checks.probes.modality_inputs import always_fed, is_fed
from graftkit.findings import Severity, Source
from graftkit.planning.matching import rewritten_names
from graftkit.surveying.sites import ModelMap, Site


def _check(facts: Facts, reach: Reach) -> Observation:
    stray = _unplanned(facts, reach) if facts.plan is not None else _unasked(facts, reach)
    figures: dict[str, Any] = {tower: len(sites) for tower, sites in reach.by_tower.items()}
    if not stray:
        return held(f"all {len(reach.sites)} adapters are where they were asked for", **figures)
    counted = Counter("routers" if site.role == "router" else site.tower for site in stray)
    places = ", ".join(f"{number} in {place}" for place, number in counted.most_common())
    message = f"{len(stray)} of {len(reach.sites)} adapters are where nobody asked for them: {places}"
    fed = [site for site in stray if _is_fed(facts, reach.base, site)]
    if facts.plan is None and len(fed) == len(stray):
        return noted(message, where=stray[0].path, help="the batches feed them; leave them out to save", **figures)
    return failed(
        message,
        where=stray[0].path,
        # Mechanical only where it is known that the batches do not feed what would be left out.
        fix=retargeted(facts, reach, _without(reach, stray)) if _knows(facts) and not fed else None,
        key=written_at(facts, "target_modules"),
        **figures,
    )


def _unplanned(facts: Facts, reach: Reach) -> list[Site]:
    planned = {attached.path for attached in facts.plan.attached} if facts.plan is not None else set()
    return [site for site in reach.sites if site.path not in planned]


def _unasked(facts: Facts, reach: Reach) -> list[Site]:
    """Adapted sites in towers that no target mentions or no batch feeds, and routers that no target names.

    Where PEFT rewrites targets it keeps their last names alone, so that a regular expression loses its scope.
    """
    usual = always_fed(reach.base) | reach.mentioned
    if _knows(facts):
        usual = frozenset(tower for tower in usual if _batches_feed(facts, reach.base, tower))
    beyond = _beyond(reach)
    return [
        site
        for site in reach.sites
        if site.tower not in usual or site.path in beyond or (reach.is_all_linear and site.role == "router")
    ]


def _beyond(reach: Reach) -> frozenset[str]:
    if not isinstance(reach.targets, str) or not rewritten_names(reach.base.model.model_type):
        return frozenset()
    return reach.targeted.difference(reach.meant)


def _knows(facts: Facts) -> bool:
    return facts.plan is not None or (facts.training is not None and facts.training.modalities is not None)


def _batches_feed(facts: Facts, base: ModelMap, tower: str) -> bool:
    return is_fed(base, tower, (facts.training.modalities if facts.training else None) or ())


def _is_fed(facts: Facts, base: ModelMap, site: Site) -> bool:
    """Whether it lies in a further tower, and the batches are known to feed that."""
    further = site.role != "router" and site.tower not in always_fed(base)
    return further and _batches_feed(facts, base, site.tower)


def _without(reach: Reach, stray: list[Site]) -> list[str]:
    left_out = {name for site in stray for name in site.names}
    return [path for path in reach.modules if path not in left_out]


RULE = Rule(
    code="GK102",
    title="adapters are only where they were asked for",
    severity=Severity.WARNING,
    needs=("peft_config", "base"),
    check=with_reach(_check),
    why=(
        "adapters in a tower that no batch feeds cost memory and train nothing, and under DDP they stop the run;"
        " adapters on a router change which experts work at all"
    ),
    example=(
        '`target_modules: "all-linear"` on a model that also sees and hears: 41 of 92 adapters are in the vision'
        ' and audio towers. `["q_proj.linear"]` names the wrapped towers, and nothing of the language model.'
    ),
    help="name the towers that are meant, in `target_modules` or as the scope of a plan",
    safety="Leaving a tower out changes what is trained: where batches feed it, it may have been meant.",
    since="0.1.0",
    sources=(
        "https://github.com/huggingface/trl/issues/6617",
        "peft: tuners.tuners_utils._maybe_include_all_linear_layers",
        "peft: utils.transformers_weight_conversion._resolve_string_target_modules",
    ),
    source=Source.INTROSPECTION,
)
