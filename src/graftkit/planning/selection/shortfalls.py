"""Targets that reach nothing: why, and the error that says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence

from graftkit.errors import PlanError
from graftkit.planning.decisions import LeftAlone, Shortfall, Skipped, Unmet, is_tied_to_linears, objection_to
from graftkit.planning.matching import ends_with
from graftkit.planning.selection.scope import Scope
from graftkit.planning.selection.target_names import ALL_LINEAR, ROLE_TARGETS, USUAL_NAMES, is_role, sites_meant
from graftkit.surveying.sites import ModelMap, Site
from graftkit.text import some, suggest


def unmet_by(
    target: str, matched: Sequence[Site], objections: Sequence[Skipped], model_map: ModelMap, scope: Scope
) -> Unmet | None:
    """Return why a target reaches nothing that an adapter can go on; None where it does.

    Args:
        matched: the sites in scope that it means.
        objections: why some of these are left alone.
    """
    if len(objections) < len(matched):
        return None
    if matched:
        # Sites without a gradient come last: the error names the first one, and says what to do about that.
        ordered = sorted(objections, key=lambda objection: objection.cause is LeftAlone.NO_GRADIENT)
        cause = Shortfall.NO_GRADIENT if ordered[0].cause is LeftAlone.NO_GRADIENT else Shortfall.NOT_ADAPTABLE
        return cause.of(target, [objection.site for objection in ordered], reasons=_reasons(ordered))
    outside = [site for site in model_map if site not in scope]
    if towers := sorted({site.tower for site, _ in sites_meant(target, outside)}):
        return Shortfall.OUT_OF_SCOPE.of(target, towers=", ".join(towers))
    within = [site for site in model_map if site in scope]
    is_mlp = target in USUAL_NAMES or (is_role(target) and target.partition(".")[0] == "mlp")
    if is_mlp and any(site.role == "expert" for site in within):
        return Shortfall.STACKED_EXPERTS.of(target)
    unclear = dict.fromkeys(s.names[-1].rpartition(".")[2] for s in within if s.is_linear and s.role == "other")
    if is_role(target) and unclear:
        return Shortfall.ROLE_UNCLEAR.of(target, scope=str(scope), names=some(unclear))
    return Shortfall.ABSENT.of(target, scope=str(scope))


def _reasons(objections: Sequence[Skipped]) -> str:
    """Return one reason for each cause, and how many weights have it where there are several."""
    counted = Counter(map(_kind_of, objections))
    first = {_kind_of(o): o.reason for o in reversed(objections)}
    return "; ".join(f"{first[c]} ({n})" if len(counted) > 1 else first[c] for c, n in counted.items())


def _kind_of(objection: Skipped) -> Hashable:
    by_cause = objection.cause is LeftAlone.NO_GRADIENT
    return objection.cause, objection.reason if by_cause else objection.site.obstacle


# ---- errors ----


def unmet_error(unmet: Unmet, model_map: ModelMap, scope: Scope, left_out: Collection[str]) -> PlanError:
    """Return the error for a target that is not met.

    Its code is ``target-not-adaptable`` where the target names something that no adapter can go on, else
    ``target-unmatched``, or ``target-no-gradient``.

    Args:
        left_out: paths of sites that no role adapts.
    """
    target = unmet.target
    if unmet.cause is Shortfall.NOT_ADAPTABLE:
        return PlanError(
            f"target {target!r} names only what no adapter can go on",
            where=unmet.sites[0],
            why=unmet.reason,
            help=_instead_of(model_map[unmet.sites[0]], model_map),
            code="target-not-adaptable",
        )
    if unmet.cause is Shortfall.NO_GRADIENT:
        return PlanError(
            f"target {target!r} names only what nothing would train",
            where=unmet.sites[0],
            why=unmet.reason,
            help=f"leave it out of the targets, or name the weights, as {unmet.sites[0]}",
            code="target-no-gradient",
        )
    if unmet.cause is Shortfall.OUT_OF_SCOPE:
        return PlanError(
            f"target {target!r} matches nothing in scope",
            where=f"scope {scope}",
            why=unmet.reason,
            help=f"add that tower to the scope, or leave {target!r} out",
            code="target-unmatched",
        )
    if unmet.cause is Shortfall.STACKED_EXPERTS:
        return PlanError(
            f"target {target!r} matches no module in this model",
            where=model_map.model.name,
            why=unmet.reason,
            help="use 'experts' in the targets instead",
            code="target-unmatched",
        )
    return (
        _role_error(unmet, model_map, scope, left_out)
        if is_role(target)
        else _name_error(target, model_map, scope)
    )


def _instead_of(site: Site, model_map: ModelMap) -> str:
    if is_tied_to_linears(site, model_map):
        return (
            f"name the weights, to train them without a merge: targets={[site.path]}, or the last parts of names"
        )
    if site.tied_to:
        return "train whole modules with modules_to_save, single tokens with trainable_token_indices, or untie"
    return "leave it out of the targets"


def _role_error(unmet: Unmet, model_map: ModelMap, scope: Scope, left_out: Collection[str]) -> PlanError:
    return PlanError(
        f"nothing in this model is {unmet.target!r}",
        where=model_map.model.name,
        why=unmet.reason,
        help=f"ask for what it has: {roles_present(model_map, scope, left_out)}",
        code="target-unmatched",
    )


def roles_present(model_map: ModelMap, scope: Scope, left_out: Collection[str]) -> str:
    """Return the role words that mean something adaptable in scope, as text.

    Args:
        left_out: paths of sites that no role adapts.
    """
    in_scope = [site for site in model_map if site in scope and site.path not in left_out]
    able = [site for site in in_scope if objection_to(site) is None]
    return ", ".join(role for role in (ALL_LINEAR, *ROLE_TARGETS) if sites_meant(role, able)) or "nothing"


def _name_error(target: str, model_map: ModelMap, scope: Scope) -> PlanError:
    known = _known_names(model_map, scope)
    names = some([name for name in known if not name.isdigit()], 12)
    modules = [path for path in model_map.module_paths if ends_with(path, target)]
    if modules:
        return PlanError(
            f"target {target!r} names no weight that an adapter could go on",
            where=modules[0],
            why="it is a module without a weight matrix (a norm, a container, an activation)",
            help=f"name a linear inside it; this model has {names}",
            code="target-not-adaptable",
        )
    candidates = [name for name in (*known, *ROLE_TARGETS, ALL_LINEAR) if name != target]
    return PlanError(
        f"target {target!r} matches nothing in this model",
        where=model_map.model.name,
        why=f"its names are {names}",
        help=suggest(target, candidates, 3) or "graft survey lists every name",
        code="target-unmatched",
    )


def _known_names(model_map: ModelMap, scope: Scope) -> list[str]:
    in_scope = [site for site in model_map if site in scope]
    return list(dict.fromkeys(name.rpartition(".")[2] for site in in_scope for name in site.names))
