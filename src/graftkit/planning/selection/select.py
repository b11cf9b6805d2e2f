"""Which sites a request means on one model, and a reason for each site either way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graftkit.errors import PlanError
from graftkit.planning.decisions import Attached, LeftAlone, Skipped, Unmet, objection_to
from graftkit.planning.matching import rewritten_names
from graftkit.planning.selection.scope import Scope, read_scope, refuse_to_guess
from graftkit.planning.selection.shortfalls import roles_present, unmet_by, unmet_error
from graftkit.planning.selection.target_names import ALL_LINEAR, ROLE_TARGETS, is_role, sites_meant
from graftkit.surveying.sites import ModelMap, Site


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
            help=f"targets={ALL_LINEAR!r}, a list of names, or roles: {', '.join(ROLE_TARGETS)}",
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
    """

    attached: tuple[Attached, ...]
    skipped: tuple[Skipped, ...]
    unmet: tuple[Unmet, ...]


def select(
    model_map: ModelMap, intent: Intent, *, allow_unmatched: bool = False, strict: bool = False
) -> Selection:
    """Choose the sites that ``intent`` means, and the PEFT field that reaches each of them.

    A role that the model lacks, or that no adapter can go on, is passed over as long as something is adapted.

    Args:
        allow_unmatched: pass over names that reach nothing, too.
        strict: do not pass over roles.

    Raises:
        PlanError: ``tower-unknown`` when the targets also name modules of no known tower and the scope only
            towers, ``target-unmatched`` when a target names nothing in scope, ``target-not-adaptable`` when it
            names only what no adapter can go on, ``plan-empty`` when several targets are all passed over.
    """
    refuse_to_guess(model_map, intent.scope, intent.targets)
    in_scope = [site for site in model_map if site in intent.scope]
    towers = [
        [site for site in in_scope if site.tower == name] for name in dict.fromkeys(s.tower for s in in_scope)
    ]
    answers: dict[str, tuple[str, str]] = {}
    unmet: list[Unmet] = []
    for target in intent.targets:
        # Tower by tower: a name that one tower spells differently still means that tower's own layer.
        matched = [(site, how) for sites in towers for site, how in sites_meant(target, sites)]
        shortfall = unmet_by(target, [site for site, _ in matched], model_map, intent.scope)
        if shortfall is not None:
            unmet.append(shortfall)
        for site, how in matched:
            answers.setdefault(site.path, (target, how))
    for shortfall in unmet:
        if strict if is_role(shortfall.target) else not allow_unmatched:
            raise unmet_error(shortfall, model_map, intent.scope)
    chosen = [site for site in model_map if site.path in answers and objection_to(site) is None]
    if not chosen:
        raise _empty(unmet, model_map, intent)
    fields = _fields(model_map, chosen)
    return Selection(
        attached=tuple(Attached(site, fields[site.path], *answers[site.path]) for site in chosen),
        skipped=tuple(_skipped(site, intent) for site in model_map if site.path not in fields),
        unmet=tuple(unmet),
    )


def _empty(unmet: Sequence[Unmet], model_map: ModelMap, intent: Intent) -> PlanError:
    if len(intent.targets) == 1:
        return unmet_error(unmet[0], model_map, intent.scope)
    return PlanError(
        "nothing would be adapted",
        where=model_map.model.name,
        why="; ".join(f"{shortfall.target}: {shortfall.reason}" for shortfall in unmet),
        help=f"ask for what it has: {roles_present(model_map, intent.scope)}; graft survey lists every weight",
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
