"""Every target name must match something, in most of the model's layers.

## Why it matters

PEFT raises only where nothing matches: six of seven names may match nothing, and training goes on.

## Example

The usual attention names on a hybrid of state-space and attention layers: 4 of 56 layers are adapted, and the
loss of a preference run stays at ln 2.

## How safe that is

Naming more layers trains more of them.

## Sources

- https://github.com/huggingface/peft/issues/3554
- https://github.com/huggingface/trl/issues/6773
"""

from __future__ import annotations

from graftkit.checks.engine.context import CheckContext
from graftkit.checks.engine.rule import Observation, Rule, Setting, failed, info, passed
from graftkit.checks.peft_config.fixes import recipe_key
from graftkit.checks.peft_config.raw import RefusalKind
from graftkit.checks.peft_config.resolved import ResolvedTargets
from graftkit.checks.probes.modality_inputs import always_fed
from graftkit.findings import Severity, Source
from graftkit.planning.coverage import LayerReach, layers_reached
from graftkit.planning.matching import LONGEST_NAME
from graftkit.surveying.roles.by_name import role_of
from graftkit.text import some, suggest

# Suggestions are looked up among all names of the model, which is slow for a list of thousands.
_MOST_ADVISED = 20


def _check(context: CheckContext) -> Observation:
    resolved = context.resolved
    key = recipe_key(context, "target_modules")
    nothing = resolved.refusal(RefusalKind.NOTHING, RefusalKind.NO_DEFAULT)
    if nothing is not None:
        return failed(f"PEFT refuses: {nothing.why}", where=nothing.where, key=key)
    unmatched = _unmatched(resolved)
    wanted = {name: why for name, why in unmatched.items() if why}
    if wanted:
        name, why = next(iter(wanted.items()))
        message = f"{len(wanted)} of the target names match nothing, and PEFT does not warn: {some(wanted)}"
        return failed(message, where=name, help=why, key=key, unmatched=len(wanted))
    # A plan chooses its sites, and reports the layers it covers.
    thin = _thin(context, resolved) if context.given.plan is None else None
    if thin is not None:
        message = f"only {thin.reached} of {thin.layers} layers in the {thin.tower} tower carry an adapter"
        advice = "the other layers have other names: graft plan MODEL shows them"
        return failed(
            message,
            where=thin.tower,
            help=advice,
            key=key,
            severity=Severity.WARNING,
            layers=thin.layers,
            reached=thin.reached,
        )
    if unmatched:
        message = f"{some(unmatched)} match nothing, and no linear of their kind is left without an adapter"
        return info(message, unmatched=len(unmatched))
    return passed("every target name matches")


def _unmatched(resolved: ResolvedTargets) -> dict[str, str]:
    """Return name -> what to do about it; an empty text for a name that this model does not need."""
    names = [] if resolved.is_all_linear else [name for name, hit in resolved.named.items() if not hit]
    names = [name for name in names if name not in resolved.rewritten]
    found = {name: _advice(resolved, name) for name in names[:_MOST_ADVISED]}
    found |= dict.fromkeys(names[_MOST_ADVISED:], "no module has this name")
    found |= {name: "no parameter has this name" for name, hit in resolved.named_parameters.items() if not hit}
    found |= {name: "no module has this name" for name, hit in resolved.saved_whole.items() if not hit}
    return found | {f"layer {index}": "no layer of this number has a target" for index in _empty_layers(resolved)}


def _empty_layers(resolved: ResolvedTargets) -> list[int]:
    """Return the entries of ``layers_to_transform`` that have no target."""
    given = resolved.given.get("layers_to_transform")
    asked = [given] if isinstance(given, int) else given or []
    numbers = {int(part) for path in resolved.modules for part in path.split(".") if part.isdecimal()}
    return [index for index in asked if index not in numbers][:_MOST_ADVISED]


def _advice(resolved: ResolvedTargets, name: str) -> str:
    """Return a suggestion; an empty text for another family's name of layers that are adapted anyway."""
    area = role_of((name,), "linear").partition(".")[0]
    if area == "other":
        leaves = dict.fromkeys(path.rpartition(".")[2] for path in resolved.base.module_paths)
        return suggest(name[:LONGEST_NAME], leaves) or "no module has this name: leave it out"
    fed = always_fed(resolved.base)
    left = [s for s in resolved.base if s.is_linear and s.tower in fed and s.role.partition(".")[0] == area]
    unused = {s.names[-1].rpartition(".")[2]: s for s in left if s.path not in resolved.adapted}
    return f"this model has {some(unused)} there" if unused else ""


def _thin(context: CheckContext, resolved: ResolvedTargets) -> LayerReach | None:
    """Return the first tower with adapters in fewer layers than the limit, where no layers were chosen."""
    text = resolved.targets if isinstance(resolved.targets, str) else " ".join(resolved.targets or ())
    numbered = any(part.isdigit() for part in text.replace("\\", ".").split("."))
    if numbered or resolved.given.get("layers_to_transform") not in (None, [], ""):
        return None
    share = RULE.limit(context.settings, "layers")
    rows = layers_reached(resolved.base, resolved.adapted)
    fed = always_fed(resolved.base)
    return next((r for r in rows if r.tower in fed and 0 < r.reached < share * r.layers), None)


RULE = Rule(
    code="GK107",
    title="every target name matches, in most layers",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=_check,
    help="use this model's own names: `graft survey MODEL` lists them, `graft plan MODEL` translates others",
    since="0.1.0",
    settings={"layers": Setting(0.5, "the least share of a tower's layers that must carry an adapter, 0 to 1")},
    source=Source.INTROSPECTION,
)
