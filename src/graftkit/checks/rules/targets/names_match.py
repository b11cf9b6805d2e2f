"""Every name that is asked for must match something, in as many layers as the model has."""

from __future__ import annotations

import difflib

from graftkit.checks.engine.context import Facts
from graftkit.checks.engine.rule import Observation, Rule, Setting, failed, held, noted
from graftkit.checks.peft_config.fixes import written_at
from graftkit.checks.peft_config.resolved import Reach, with_reach
from graftkit.checks.probes.modality_inputs import always_fed
from graftkit.findings import Severity, Source
from graftkit.planning.coverage import LayerReach, layers_reached
from graftkit.planning.matching import LONGEST_NAME
from graftkit.surveying.roles import role_of
from graftkit.text import some

_NOTHING = frozenset({"nothing", "no-default"})
# Similar names are looked for among all of the model's: a list of thousands is no slip of the pen.
_MOST_ADVISED = 20


def _check(facts: Facts, reach: Reach) -> Observation:
    nothing = next((refusal for refusal in reach.refusals if refusal.kind in _NOTHING), None)
    if nothing is not None:
        return failed(f"PEFT refuses: {nothing.why}", where=nothing.where, key=_key(facts))
    unmatched = _unmatched(reach)
    wanted = {name: why for name, why in unmatched.items() if why}
    if wanted:
        name, why = next(iter(wanted.items()))
        message = f"{len(wanted)} of the names asked for match nothing, and PEFT says no word: {some(wanted)}"
        return failed(message, where=name, help=why, key=_key(facts), unmatched=len(wanted))
    # A plan was told which sites are meant, and lists the layers it reaches.
    thin = _thin(facts, reach) if facts.plan is None else None
    if thin is not None:
        message = f"only {thin.reached} of {thin.layers} layers in the {thin.tower} tower carry an adapter"
        advice = "the other layers have other names: graft plan MODEL shows them"
        figures = {"layers": thin.layers, "reached": thin.reached}
        return Observation(Severity.WARNING, message, thin.tower, advice, figures, key=_key(facts))
    if unmatched:
        message = f"{some(unmatched)} match nothing, and no linear of their kind is left without an adapter"
        return noted(message, unmatched=len(unmatched))
    return held("every name that is asked for matches")


def _key(facts: Facts) -> str | None:
    return written_at(facts, "target_modules")


def _unmatched(reach: Reach) -> dict[str, str]:
    """Name -> what to do about it; an empty text for one that this model does not need."""
    names = [] if reach.is_all_linear else [name for name, hit in reach.named.items() if not hit]
    names = [name for name in names if name not in reach.rewritten]
    found = {name: _advice(reach, name) for name in names[:_MOST_ADVISED]}
    found |= dict.fromkeys(names[_MOST_ADVISED:], "no module has this name")
    found |= {name: "no parameter has this name" for name, hit in reach.named_parameters.items() if not hit}
    found |= {name: "no module has this name" for name, hit in reach.saved_whole.items() if not hit}
    return found | {f"layer {index}": "no layer of this number has a target" for index in _empty_layers(reach)}


def _empty_layers(reach: Reach) -> list[int]:
    """Entries of ``layers_to_transform`` that no target is in."""
    given = reach.given.get("layers_to_transform")
    asked = [given] if isinstance(given, int) else given or []
    numbers = {int(part) for path in reach.modules for part in path.split(".") if part.isdecimal()}
    return [index for index in asked if index not in numbers][:_MOST_ADVISED]


def _advice(reach: Reach, name: str) -> str:
    """What may have been meant; nothing for a name from other families whose layers are adapted anyway."""
    area = role_of((name,), "linear").partition(".")[0]
    if area == "other":
        leaves = dict.fromkeys(path.rpartition(".")[2] for path in reach.base.module_paths)
        near = difflib.get_close_matches(name[:LONGEST_NAME], leaves, n=1)
        return f"did you mean {near[0]}?" if near else "no module has this name: leave it out"
    fed = always_fed(reach.base)
    left = [s for s in reach.base if s.is_linear and s.tower in fed and s.role.partition(".")[0] == area]
    spelled = {s.names[-1].rpartition(".")[2]: s for s in left if s.path not in reach.adapted}
    return f"this model has {some(spelled)} there" if spelled else ""


def _thin(facts: Facts, reach: Reach) -> LayerReach | None:
    """The first tower in which fewer layers carry an adapter than the limit, though no layer was singled out."""
    text = reach.targets if isinstance(reach.targets, str) else " ".join(reach.targets or ())
    if any(part.isdigit() for part in text.replace("\\", ".").split(".")) or "layers_to_transform" in _set(reach):
        return None
    share = facts.limit(RULE, "layers")
    rows = layers_reached(reach.base, reach.adapted)
    fed = always_fed(reach.base)
    return next((r for r in rows if r.tower in fed and 0 < r.reached < share * r.layers), None)


def _set(reach: Reach) -> set[str]:
    return {name for name, value in reach.given.items() if value not in (None, [], "")}


RULE = Rule(
    code="GK107",
    title="every name that is asked for matches, in most layers",
    severity=Severity.ERROR,
    needs=("peft_config", "base"),
    check=with_reach(_check),
    why="PEFT raises only when nothing at all matches: of seven names, six may name nothing, and training goes on",
    example=(
        "The usual attention names on a hybrid of state-space and attention layers: 4 of 56 layers are adapted,"
        " and the loss of a preference run stays at ln 2."
    ),
    help="use this model's own names: `graft survey MODEL` lists them, `graft plan MODEL` translates others",
    safety="Naming more layers trains more of them.",
    since="0.1.0",
    sources=(
        "https://github.com/huggingface/peft/issues/3554",
        "https://github.com/huggingface/trl/issues/6773",
    ),
    settings={"layers": Setting(0.5, "the least share of a tower's layers that must carry an adapter, 0 to 1")},
    source=Source.INTROSPECTION,
)
