"""Intent + map -> which sites are adapted, and a reason for each site either way."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from graftkit.errors import PlanError
from graftkit.planning.matching import ends_with
from graftkit.planning.selection.intent import ALL_LINEAR, ROLE_TARGETS, USUAL_NAMES, Intent
from graftkit.surveying.sites import ModelMap, Site
from graftkit.text import some, suggest


@dataclass(frozen=True)
class Selection:
    """The sites chosen by an intent.

    Attributes:
        chosen: (site, why it is adapted), in the map's order.
        skipped: (site, why it is not), in the map's order.
        unmatched: targets that name nothing this model has in scope.
    """

    chosen: tuple[tuple[Site, str], ...]
    skipped: tuple[tuple[Site, str], ...]
    unmatched: tuple[str, ...]


def select(model_map: ModelMap, intent: Intent, *, allow_unmatched: bool = False) -> Selection:
    """Choose the sites that ``intent`` means.

    Raises:
        PlanError: ``target-unmatched`` when a target names nothing in scope (unless allowed),
            ``target-not-adaptable`` when it names only what no adapter can go on.
    """
    towers = [[site for site in model_map if site.tower == tower] for tower in intent.scope]
    reasons: dict[str, str] = {}
    unmatched: list[str] = []
    for target in intent.targets:
        # Tower by tower: a name that one tower spells differently still means that tower's own layer.
        matched = [(site, why) for sites in towers for site, why in _match(target, sites)]
        if not matched:
            unmatched.append(target)
        elif all(_objection(site) for site, _ in matched) and not allow_unmatched:
            raise _not_adaptable(target, [site for site, _ in matched])
        for site, why in matched:
            reasons.setdefault(site.path, why)
    if unmatched and not allow_unmatched:
        raise _unmatched(unmatched[0], model_map, intent)
    return _sort(model_map, intent, reasons, tuple(unmatched))


def _sort(model_map: ModelMap, intent: Intent, reasons: dict[str, str], unmatched: tuple[str, ...]) -> Selection:
    chosen, skipped = [], []
    for site in model_map:
        if site.path in reasons and _objection(site) is None:
            chosen.append((site, reasons[site.path]))
        else:
            skipped.append((site, _why_skipped(site, intent)))
    if not chosen:
        raise PlanError(
            "nothing would be adapted",
            where=model_map.model.name,
            why=f"no adaptable site in {', '.join(intent.scope)} matches {', '.join(intent.targets)}",
            help="graft survey shows every site and why some cannot be adapted",
            code="plan-empty",
        )
    return Selection(tuple(chosen), tuple(skipped), unmatched)


def _objection(site: Site) -> str | None:
    """Why no adapter goes on this site even when it is asked for."""
    if not site.adaptable:
        return site.reason or "unknown"
    if site.tied_to:
        return f"its weight is tied to {site.tied_to[0]}: merging an adapter on it would change both"
    return None


def _why_skipped(site: Site, intent: Intent) -> str:
    if site.tower not in intent.scope:
        return f"the {site.tower} tower is outside the scope"
    if (objection := _objection(site)) is not None:
        return objection
    if ALL_LINEAR in intent.targets and site.is_linear:
        return f"{ALL_LINEAR} leaves out {'routers' if site.role == 'router' else 'heads'}: name it to adapt it"
    if site.role == "expert":
        return "stacked experts: add 'experts' to the targets to adapt them"
    return "not requested"


# ---- one target in one tower: the first reading that matches anything wins ----


def _match(target: str, sites: list[Site]) -> list[tuple[Site, str]]:
    """(site, why it answers the target) for every site of one tower that the target means."""
    for reading in (_as_all_linear, _as_role, _as_name, _as_usual_name, _as_regex):
        matched, reason = reading(target, sites)
        if matched:
            return [(site, reason) for site in matched]
    return []


def _as_all_linear(target: str, sites: list[Site]) -> tuple[list[Site], str]:
    if target != ALL_LINEAR:
        return [], ""
    linears = [s for s in sites if s.is_linear and s.role not in {"router", "lm_head"}]
    return [s for s in linears if s.tower != "head"], "linear"


def _as_role(target: str, sites: list[Site]) -> tuple[list[Site], str]:
    roles = ROLE_TARGETS.get(target, (target,))
    matched = [s for s in sites if _has_role(s, roles)]
    if target == "head":  # a classifier has no token embeddings to share a role's name with
        matched = matched or [s for s in sites if s.tower == "head" and s.is_linear]
    return matched, f"role {target}"


def _has_role(site: Site, roles: Iterable[str]) -> bool:
    return any(site.role == role or site.role.startswith(f"{role}.") for role in roles)


def _as_name(target: str, sites: list[Site]) -> tuple[list[Site], str]:
    # One of the usual names means a module. Stacked experts share some of those names but not all of them, and
    # half an expert is never meant: they are asked for by role.
    named = [s for s in sites if s.kind != "parameter" or target not in USUAL_NAMES]
    matched = [s for s in named if any(ends_with(name, target) for name in s.names)]
    wrapped = any(s.wrapper for s in matched)
    return matched, f"named {target}" + (" (the wrapper's inner linear, where wrapped)" if wrapped else "")


def _as_usual_name(target: str, sites: list[Site]) -> tuple[list[Site], str]:
    for role in USUAL_NAMES.get(target, ()):
        matched = [s for s in sites if s.role == role]
        if matched:
            spelling = matched[0].names[-1].rpartition(".")[2]
            return matched, f"{target}, which this model calls {spelling}"
    return [], ""


def _as_regex(target: str, sites: list[Site]) -> tuple[list[Site], str]:
    if not re.search(r"[\\*+?()\[\]|^$]", target):
        return [], ""
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise PlanError(
            "a target is not a valid regular expression",
            where=target,
            why=str(error),
            help="PEFT matches a regular expression against the whole module path",
            code="target-regex",
        ) from error
    return [s for s in sites if any(pattern.fullmatch(name) for name in s.names)], f"matches {target}"


# ---- errors ----


def _not_adaptable(target: str, matched: list[Site]) -> PlanError:
    return PlanError(
        f"target {target!r} names only what no adapter can go on",
        where=some([site.path for site in matched], 1),
        why=_objection(matched[0]),
        help=_way_out(matched[0]),
        code="target-not-adaptable",
    )


def _way_out(site: Site) -> str:
    if site.tied_to:
        return "train whole modules with modules_to_save, single tokens with trainable_token_indices, or untie"
    return "leave it out of the targets"


def _unmatched(target: str, model_map: ModelMap, intent: Intent) -> PlanError:
    outside = [s for s in model_map if s.tower not in intent.scope]
    towers = sorted({site.tower for site, _ in _match(target, outside)})
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
            why="it is a module without a weight matrix of its own (a norm, a container, an activation)",
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
