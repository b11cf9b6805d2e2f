"""Which sites a request means on one model, and a reason for each site either way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graftkit.errors import PlanError
from graftkit.planning.decisions import Attached, LeftAlone, Skipped
from graftkit.planning.matching import ends_with, rewritten_names
from graftkit.planning.selection.target_names import ALL_LINEAR, ROLE_TARGETS, USUAL_NAMES, sites_meant
from graftkit.surveying.sites import ModelMap, Site
from graftkit.text import some, suggest


@dataclass(frozen=True)
class Intent:
    """The targets as the user wrote them, and the towers to adapt."""

    targets: tuple[str, ...]
    scope: tuple[str, ...]


def read_intent(model_map: ModelMap, targets: str | Iterable[str], scope: str | Iterable[str] | None) -> Intent:
    """Check targets and scope against the model.

    Without a scope, the towers that every batch feeds are meant: the language tower, and the tower of the
    main input where that is not text (a speech recogniser's encoder). Towers that a text-only batch leaves
    unfed have to be asked for.

    Raises:
        PlanError: ``targets-empty`` or ``scope-missing``.
    """
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    if not wanted or not all(isinstance(t, str) and t.strip() for t in wanted):
        raise PlanError(
            "no targets were given",
            help=f"targets={ALL_LINEAR!r}, a list of names, or roles: {', '.join(ROLE_TARGETS)}",
            code="targets-empty",
        )
    if scope is None:
        return Intent(wanted, fed_towers(model_map))
    present = tuple(tower.name for tower in model_map.towers)
    named = (scope,) if isinstance(scope, str) else tuple(scope)
    if named == ("all",):
        return Intent(wanted, present)
    missing = next((name for name in named if name not in present), None)
    if missing is not None:
        raise PlanError(
            f"this model has no {missing!r} tower",
            where=model_map.model.name,
            why=f"its towers are {', '.join(present)}",
            help=suggest(missing, present) or f"scope={list(present)}, or leave scope out",
            code="scope-missing",
        )
    return Intent(wanted, named)


def fed_towers(model_map: ModelMap) -> tuple[str, ...]:
    """Return the towers that every batch feeds, and the head."""
    present = [tower.name for tower in model_map.towers]
    fed = [t for t in present if t == "language" or t in model_map.model.fed_towers]
    others = [t for t in present if t not in {"head", "projector"}]
    # The head can be adapted by name; "all-linear" leaves it out whatever the scope.
    return (*(fed or others), *(t for t in present if t == "head"))


@dataclass(frozen=True)
class Selection:
    """What an intent means on one model.

    Attributes:
        attached: the sites to adapt, in the map's order.
        skipped: the other sites, in the map's order.
        unmatched: targets that name nothing this model has in scope.
    """

    attached: tuple[Attached, ...]
    skipped: tuple[Skipped, ...]
    unmatched: tuple[str, ...]


def select(model_map: ModelMap, intent: Intent, *, allow_unmatched: bool = False) -> Selection:
    """Choose the sites that ``intent`` means, and the PEFT field that reaches each of them.

    Raises:
        PlanError: ``target-unmatched`` when a target names nothing in scope (unless allowed),
            ``target-not-adaptable`` when it names only what no adapter can go on, ``plan-empty``.
    """
    towers = [[site for site in model_map if site.tower == tower] for tower in intent.scope]
    answers: dict[str, tuple[str, str]] = {}
    unmatched: list[str] = []
    for target in intent.targets:
        # Tower by tower: a name that one tower spells differently still means that tower's own layer.
        matched = [(site, how) for sites in towers for site, how in sites_meant(target, sites)]
        if not matched:
            unmatched.append(target)
        elif all(_objection(site) for site, _ in matched) and not allow_unmatched:
            raise _not_adaptable(target, [site for site, _ in matched])
        for site, how in matched:
            answers.setdefault(site.path, (target, how))
    if unmatched and not allow_unmatched:
        raise _unmatched(unmatched[0], model_map, intent)
    chosen = [site for site in model_map if site.path in answers and _objection(site) is None]
    if not chosen:
        raise PlanError(
            "nothing would be adapted",
            where=model_map.model.name,
            why=f"no adaptable site in {', '.join(intent.scope)} matches {', '.join(intent.targets)}",
            help="graft survey shows every site and why some cannot be adapted",
            code="plan-empty",
        )
    fields = _fields(model_map, chosen)
    return Selection(
        attached=tuple(Attached(site, fields[site.path], *answers[site.path]) for site in chosen),
        skipped=tuple(_skipped(site, intent) for site in model_map if site.path not in fields),
        unmatched=tuple(unmatched),
    )


def _fields(model_map: ModelMap, chosen: Sequence[Site]) -> dict[str, str]:
    """Return the PEFT field that reaches each of the chosen sites, by path."""
    rewritten = rewritten_names(model_map.model.model_type)
    by_parameter = {s.path for s in chosen if s.kind == "parameter" or s.path.rpartition(".")[2] in rewritten}
    return {s.path: "target_parameters" if s.path in by_parameter else "target_modules" for s in chosen}


def _skipped(site: Site, intent: Intent) -> Skipped:
    if site.tower not in intent.scope:
        return LeftAlone.OUT_OF_SCOPE.skip(site, tower=site.tower)
    if (objection := _objection(site)) is not None:
        return objection
    if ALL_LINEAR in intent.targets and site.is_linear:
        return LeftAlone.NOT_IN_ALL_LINEAR.skip(site, kind="routers" if site.role == "router" else "heads")
    return (LeftAlone.STACKED_EXPERTS if site.role == "expert" else LeftAlone.NOT_REQUESTED).skip(site)


def _objection(site: Site) -> Skipped | None:
    """Return why no adapter goes on this site even when it is asked for, or None."""
    if not site.adaptable:
        return LeftAlone.NOT_ADAPTABLE.skip(site, reason=site.reason)
    return LeftAlone.TIED.skip(site, other=site.tied_to[0]) if site.tied_to else None


# ---- errors ----


def _not_adaptable(target: str, matched: Sequence[Site]) -> PlanError:
    objection = _objection(matched[0])
    return PlanError(
        f"target {target!r} names only what no adapter can go on",
        where=some([site.path for site in matched], 1),
        why=objection.reason if objection else None,
        help="train whole modules with modules_to_save, single tokens with trainable_token_indices, or untie"
        if matched[0].tied_to
        else "leave it out of the targets",
        code="target-not-adaptable",
    )


def _unmatched(target: str, model_map: ModelMap, intent: Intent) -> PlanError:
    outside = [s for s in model_map if s.tower not in intent.scope]
    towers = sorted({site.tower for site, _ in sites_meant(target, outside)})
    if towers:
        return PlanError(
            f"target {target!r} matches nothing in scope",
            where=f"scope {', '.join(intent.scope)}",
            why=f"it exists only outside it, in {', '.join(towers)}",
            help=f"add {towers[0]!r} to the scope, or leave {target!r} out",
            code="target-unmatched",
        )
    modules = [p for p in model_map.module_paths if ends_with(p, target)]
    if modules:
        return PlanError(
            f"target {target!r} names no weight that an adapter could go on",
            where=modules[0],
            why="it is a module without a weight matrix (a norm, a container, an activation)",
            help=f"name a linear inside it; this model has {_some_names(model_map, intent)}",
            code="target-not-adaptable",
        )
    if target in USUAL_NAMES and any(s.role == "expert" and s.tower in intent.scope for s in model_map):
        return PlanError(
            f"target {target!r} matches no module in this model",
            where=model_map.model.name,
            why="its MLPs are stacked experts, which module names do not reach",
            help="use 'experts' in the targets instead",
            code="target-unmatched",
        )
    known = _known_names(model_map, intent)
    candidates = [name for name in (*known, *ROLE_TARGETS, ALL_LINEAR) if name != target]
    return PlanError(
        f"target {target!r} matches nothing in this model",
        where=model_map.model.name,
        why=f"its names are {_some_names(model_map, intent)}",
        help=suggest(target, candidates, 3) or "graft survey lists every name",
        code="target-unmatched",
    )


def _known_names(model_map: ModelMap, intent: Intent) -> list[str]:
    in_scope = [s for s in model_map if s.tower in intent.scope]
    return list(dict.fromkeys(name.rpartition(".")[2] for s in in_scope for name in s.names))


def _some_names(model_map: ModelMap, intent: Intent) -> str:
    return some([n for n in _known_names(model_map, intent) if not n.isdigit()], 12)
