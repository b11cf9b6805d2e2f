"""Every target must be a layer that PEFT adapts, which a wrapper around a linear, or a block of several, is not.

## Why it matters

`get_peft_model` raises over the first module it does not know, even if no batch uses it.

## Example

`target_modules: ["q_proj"]` on a model whose vision tower keeps its linears inside wrappers: "Target module
…(…) is not supported", for text-only training too. The same for a module of a norm and a linear, or of a gate and
a value, whose own name stands in `target_modules`.

## How safe that is

The wrapper's forward stays around the adapter, so that the base computes the same. The fix adapts the named
layers of the language model, and of the towers that the targets mention or the data feeds.

## Sources

- https://github.com/huggingface/peft/issues/3129
- https://github.com/huggingface/peft/pull/3154
- peft: tuners.lora.model.LoraModel._create_new_module
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, failed, passed
from graftkit.checks.peft_config.fixes import recipe_key, retargeted
from graftkit.checks.peft_config.raw import RefusalKind
from graftkit.checks.peft_config.resolved import ResolvedTargets
from graftkit.checks.probes.modality_inputs import is_fed
from graftkit.findings import Severity, Source
from graftkit.text import some


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    key = recipe_key(context, "target_modules")
    around = (*resolved.wrappers, *resolved.composites)
    if around:
        why = resolved.refusal(RefusalKind.WRAPPER)
        meant = _inner(context, resolved)
        return failed(
            f"{len(around)} of {len(resolved.modules)} targets are modules around linears: {some(around)}"
            f" ({why.why if why else ''})",
            where=around[0],
            help=f"name the linears inside, such as {min(meant)}",
            fix=retargeted(context, meant, saved=True),
            key=key,
            wrappers=len(resolved.wrappers),
            composites=len(resolved.composites),
            targets=len(resolved.modules),
        )
    # Other rules report the other refusals.
    other = resolved.refusal(RefusalKind.CONFIG, RefusalKind.MODULE, RefusalKind.PARAMETER)
    if other is not None:
        in_config = other.kind is RefusalKind.CONFIG
        advice = "change the field it names" if in_config else "leave it out of the targets"
        return failed(f"PEFT refuses {other.where}: {other.why}", where=other.where, help=advice, key=key)
    named = len(resolved.modules) + len(resolved.parameters)
    return passed(f"PEFT adapts each of the {named} targets", targets=named)


def _inner(context: CheckContext, resolved: ResolvedTargets) -> set[str]:
    """Return the intended linears: those of the towers that batches feed, as in a plan.

    All of them for a saved adapter, which has been trained, and where the targets also name linears in wrappers.
    """
    meant = {linear for path in resolved.modules for linear in resolved.linears_meant(path)}
    if context.given.folder is not None or any(
        resolved.base.inner[path].path in resolved.targeted for path in resolved.wrappers
    ):
        return meant
    given = context.modalities or ()
    towers = {tower.name for tower in resolved.base.towers if is_fed(resolved.base, tower.name, given)}
    fed = {site.path for site in resolved.base if site.tower in towers | resolved.mentioned}
    return meant & fed or meant


RULE = Rule(
    code="GK101",
    title="every target is a layer that PEFT adapts",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=_check,
    help="name the linear inside the wrapper, or let `graft plan` write the targets",
    since="0.1.0",
    source=Source.INTROSPECTION,
)
