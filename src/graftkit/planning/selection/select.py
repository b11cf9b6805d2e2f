"""Which sites a request means on one model, and a reason for each site either way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from graftkit.errors import PlanError
from graftkit.planning.decisions import (
    Attached,
    Caution,
    LeftAlone,
    PlanWarning,
    Skipped,
    Unmet,
    is_tied_to_linears,
    objection_to,
)
from graftkit.planning.matching import rewritten_names
from graftkit.planning.selection.scope import Scope, read_scope, refuse_to_guess
from graftkit.planning.selection.shortfalls import roles_present, unmet_by, unmet_error
from graftkit.planning.selection.target_names import ALL_LINEAR, ROLE_TARGETS, is_role, sites_meant
from graftkit.surveying.sites import ModelMap, Site
from graftkit.twins.reach import NoGradient


@dataclass(frozen=True)
class Intent:
    """The targets as the user wrote them, and where to look for them."""

    targets: tuple[str, ...]
    scope: Scope


def read_intent(model_map: ModelMap, targets: str | Iterable[str], scope: str | Iterable[str] | None) -> Intent:
    """Check targets and scope against the model.

    Raises:
        PlanError: ``targets-empty`` or ``scope-missing``.
    """
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    if not wanted or not all(isinstance(t, str) and t.strip() for t in wanted):
        raise PlanError(
            "no targets were given",
            help=f"give {ALL_LINEAR}, names, or roles: {', '.join(ROLE_TARGETS)}",
            code="targets-empty",
        )
    return Intent(wanted, read_scope(model_map, scope))


@dataclass(frozen=True)
class Selection:
    """What an intent means on one model.

    Attributes:
        attached: the sites to adapt, in the map's order.
        skipped: the other sites, in the map's order.
        unmet: the targets that reach nothing.
        warnings: about what is adapted because a target names it.
    """

    attached: tuple[Attached, ...]
    skipped: tuple[Skipped, ...]
    unmet: tuple[Unmet, ...]
    warnings: tuple[PlanWarning, ...] = ()


def select(
    model_map: ModelMap,
    intent: Intent,
    unreached: Mapping[str, NoGradient],
    *,
    allow_unmatched: bool = False,
    strict: bool = False,
) -> Selection:
    """Choose the sites that ``intent`` means, and the PEFT field that reaches each of them.

    A role that the model lacks, or that no adapter can go on, is passed over as long as something is adapted.
    A role does not mean what no gradient reaches, nor linears that share their weight; a name does.

    Args:
        unreached: the sites that no gradient reaches, and why, by path.
        allow_unmatched: pass over names that reach nothing, too.
        strict: do not pass over roles.

    Raises:
        PlanError: ``tower-unknown`` when the targets also name modules of no known tower and the scope only
            towers, ``target-unmatched`` when a target names nothing in scope, ``target-not-adaptable`` when it
            names only what no adapter can go on, ``target-no-gradient`` when it is a role that means only what no
            gradient reaches, ``plan-empty`` when several targets are all passed over.
    """
    refuse_to_guess(model_map, intent.scope, intent.targets, unreached)
    in_scope = [site for site in model_map if site in intent.scope]
    towers = [
        [site for site in in_scope if site.tower == name] for name in dict.fromkeys(s.tower for s in in_scope)
    ]
    answers: dict[str, tuple[str, str]] = {}
    left_alone: dict[str, Skipped] = {}
    unmet: list[Unmet] = []
    for target in intent.targets:
        # Tower by tower: a name that one tower spells differently still means that tower's own layer.
        matched = [(site, how) for sites in towers for site, how in sites_meant(target, sites)]
        meant = [site for site, _ in matched]
        objections = {
            s.path: against for s in meant if (against := _against(target, s, model_map, unreached)) is not None
        }
        shortfall = unmet_by(target, meant, tuple(objections.values()), model_map, intent.scope)
        if shortfall is not None:
            unmet.append(shortfall)
        left_alone |= objections
        for site, how in matched:
            if site.path not in objections:
                answers.setdefault(site.path, (target, how))
    for shortfall in unmet:
        if strict if is_role(shortfall.target) else not allow_unmatched:
            raise unmet_error(shortfall, model_map, intent.scope, unreached)
    chosen = [site for site in model_map if site.path in answers]
    if not chosen:
        raise _empty(unmet, model_map, intent, unreached)
    fields = _fields(model_map, chosen)
    return Selection(
        attached=tuple(Attached(site, fields[site.path], *answers[site.path]) for site in chosen),
        skipped=tuple(
            left_alone.get(site.path) or _skipped(site, intent) for site in model_map if site.path not in fields
        ),
        unmet=tuple(unmet),
        warnings=(*_tied(chosen, answers), *_warnings(chosen, answers, unreached)),
    )


def _against(target: str, site: Site, model_map: ModelMap, unreached: Mapping[str, NoGradient]) -> Skipped | None:
    """Return why a target that means a site does not adapt it, or None."""
    if (objection := objection_to(site)) is not None:
        named = objection.cause is LeftAlone.TIED and not is_role(target)
        return None if named and is_tied_to_linears(site, model_map) else objection
    cause = unreached.get(site.path) if is_role(target) else None
    return LeftAlone.NO_GRADIENT.skip(site, cause=cause.value) if cause is not None else None


def _warnings(
    chosen: Sequence[Site], answers: Mapping[str, tuple[str, str]], unreached: Mapping[str, NoGradient]
) -> Iterator[PlanWarning]:
    """Yield one warning for each target and cause, about the sites that no gradient reaches."""
    groups: dict[tuple[str, NoGradient], list[str]] = defaultdict(list)
    for site in chosen:
        if site.path in unreached:
            groups[answers[site.path][0], unreached[site.path]].append(site.path)
    for (target, cause), paths in groups.items():
        yield Caution.NO_GRADIENT.about(paths, target=target, cause=cause.value)


def _tied(chosen: Sequence[Site], answers: Mapping[str, tuple[str, str]]) -> Iterator[PlanWarning]:
    """Yield one warning for each target, about the linears that share their weight."""
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in chosen:
        if site.tied_to:
            groups[answers[site.path][0]].append(site)
    for target, sites in groups.items():
        yield Caution.TIED.about([site.path for site in sites], target=target, other=sites[0].tied_to[0])


def _empty(
    unmet: Sequence[Unmet], model_map: ModelMap, intent: Intent, unreached: Mapping[str, NoGradient]
) -> PlanError:
    if len(intent.targets) == 1:
        return unmet_error(unmet[0], model_map, intent.scope, unreached)
    present = roles_present(model_map, intent.scope, unreached)
    return PlanError(
        "nothing would be adapted",
        where=model_map.model.name,
        why="; ".join(f"{shortfall.target}: {shortfall.reason}" for shortfall in unmet),
        help=f"ask for what it has: {present}; graft survey lists every weight",
        code="plan-empty",
    )


def _fields(model_map: ModelMap, chosen: Sequence[Site]) -> dict[str, str]:
    """Return the PEFT field that reaches each of the chosen sites, by path."""
    rewritten = rewritten_names(model_map.model.model_type)
    by_parameter = {s.path for s in chosen if s.kind == "parameter" or s.path.rpartition(".")[2] in rewritten}
    return {s.path: "target_parameters" if s.path in by_parameter else "target_modules" for s in chosen}


def _skipped(site: Site, intent: Intent) -> Skipped:
    if site not in intent.scope:
        return LeftAlone.OUT_OF_SCOPE.skip(site, tower=site.tower)
    if (objection := objection_to(site)) is not None:
        return objection
    if ALL_LINEAR in intent.targets and site.is_linear:
        return LeftAlone.NOT_IN_ALL_LINEAR.skip(site, kind="routers" if site.role == "router" else "heads")
    return (LeftAlone.STACKED_EXPERTS if site.role == "expert" else LeftAlone.NOT_REQUESTED).skip(site)
