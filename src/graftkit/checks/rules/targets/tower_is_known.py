"""Adapters must be on modules of which it is known what feeds them, or which were asked for by name.

## Why it matters

Where a model's class declares no towers and its structure does not show them, a module may serve text or anything
else. Adapting it may train what was to be left alone, and leaving it out may leave out what was meant.

## Example

A model of your own takes image features that were computed beforehand, in a module called `extra`. `all-linear`
adapts it with the language model; a plan without a scope leaves it alone.

## How safe that is

A scope that has `unknown`, or the module's path, or a class that declares its `main_input_name` settles it.

## Sources

- transformers: modeling_utils.PreTrainedModel.input_modalities
- peft: tuners.tuners_utils._maybe_include_all_linear_layers
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, info, passed
from graftkit.checks.peft_config.fixes import recipe_key
from graftkit.checks.probes.modality_inputs import may_be_fed
from graftkit.findings import Severity, Source
from graftkit.planning.decisions import LeftAlone
from graftkit.surveying.sites import UNKNOWN_TOWER, Site


def _check(context: CheckContext) -> Observation:
    if not may_be_fed(context.base, UNKNOWN_TOWER):
        return passed("what feeds each module is known, or the same for all")
    if context.given.plan is not None:
        return _of_plan(context)
    resolved = context.resolved
    adapted = resolved.by_tower.get(UNKNOWN_TOWER, ())
    if not adapted or UNKNOWN_TOWER in resolved.mentioned:
        return passed("every adapted module has a known tower, or is named", adapted=len(adapted))
    return failed(
        f"{len(adapted)} of {len(resolved.sites)} adapted modules belong to no known tower",
        where=adapted[0].path,
        key=recipe_key(context, "target_modules"),
        adapted=len(adapted),
    )


def _of_plan(context: CheckContext) -> Observation:
    """Check a plan: it adapts such modules only where its scope has them, but may leave them alone unasked."""
    plan = context.plan
    left = [skipped.site for skipped in plan.skipped if skipped.cause is LeftAlone.OUT_OF_SCOPE]
    open_ = [site for site in left if _is_open(site)]
    known = {tower.name for tower in plan.model.towers}
    if not open_ or not known.issuperset(plan.scope):
        return passed("the scope says what becomes of every module of no known tower", left=0)
    message = f"{len(open_)} linears of no known tower are left alone"
    return info(message, where=open_[0].path, left=len(open_))


def _is_open(site: Site) -> bool:
    return site.tower == UNKNOWN_TOWER and site.is_linear and site.adaptable


RULE = Rule(
    code="GK116",
    title="every adapted module has a known tower, or was asked for by name",
    severity=Severity.WARNING,
    needs=("peft_config", "base"),
    check=_check,
    help="name them in the scope of a plan, by path or as `unknown`, or name what is meant in `target_modules`",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
