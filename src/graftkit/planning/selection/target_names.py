"""The words of a target, and which sites of one tower each of them means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from graftkit.errors import PlanError
from graftkit.planning.matching import ends_with
from graftkit.surveying.roles.by_name import ROLES
from graftkit.surveying.sites import Site

ALL_LINEAR = "all-linear"

# What a role in ``targets`` covers. Asking for experts asks for everything experts stand in for: a model may
# store the same role as stacked parameters in one layer and as a dense or shared MLP in the next.
ROLE_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "mlp": ("mlp",),
    "experts": ("expert", "mlp"),
    "embeddings": ("embedding",),
    "head": ("lm_head",),
    "router": ("router",),
    "ssm": ("ssm",),
    "conv": ("conv",),
}

# The names everybody writes, and the role each one stands for on a model that spells it differently.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "q_proj": ("attention.q", "attention.qkv"),
    "k_proj": ("attention.k", "attention.qkv", "attention.kv"),
    "v_proj": ("attention.v", "attention.qkv", "attention.kv"),
    "o_proj": ("attention.o",),
    "gate_proj": ("mlp.gate", "mlp.gate_up"),
    "up_proj": ("mlp.up", "mlp.gate_up"),
    "down_proj": ("mlp.down",),
}


def is_role(target: str) -> bool:
    """Check whether a target is a word that means the same on every model, not one model's own name."""
    return target == ALL_LINEAR or target in ROLE_TARGETS or target in ROLES


def sites_meant(target: str, sites: Sequence[Site]) -> list[tuple[Site, str]]:
    """Return (site, how it answers the target) for every site of one tower that the target means.

    The first reading that finds any site wins.

    Raises:
        PlanError: ``target-regex``.
    """
    for reading in (_as_all_linear, _as_role, _as_name, _as_usual_name, _as_regex):
        matched, reason = reading(target, sites)
        if matched:
            return [(site, reason) for site in matched]
    return []


def _as_all_linear(target: str, sites: Sequence[Site]) -> tuple[list[Site], str]:
    if target != ALL_LINEAR:
        return [], ""
    left_out = {"router", "lm_head"}
    linears = (s for s in sites if s.is_linear or s.is_own_linear)
    return [s for s in linears if s.role not in left_out and s.tower != "head"], "linear"


def _as_role(target: str, sites: Sequence[Site]) -> tuple[list[Site], str]:
    roles = ROLE_TARGETS.get(target, (target,))
    matched = [s for s in sites if _has_role(s, roles)]
    if target == "head":  # a classifier has no token embeddings to share a role's name with
        matched = matched or [s for s in sites if s.tower == "head" and s.is_linear]
    return matched, f"role {target}"


def _has_role(site: Site, roles: Iterable[str]) -> bool:
    return any(site.role == role or site.role.startswith(f"{role}.") for role in roles)


def _as_name(target: str, sites: Sequence[Site]) -> tuple[list[Site], str]:
    # One of the usual names means a module. Stacked experts share some of those names but not all of them, and
    # half an expert is never meant: they are asked for by role.
    named = [s for s in sites if s.kind != "parameter" or target not in USUAL_NAMES]
    matched = [s for s in named if any(ends_with(name, target) for name in _names(s))]
    wrapped = " (the wrapper's inner linear, where wrapped)" if any(s.wrapper for s in matched) else ""
    composed = {c.cls for s in matched for c in s.composites if ends_with(c.path, target)}
    inside = f" (each linear inside, where it is a {' or '.join(sorted(composed))})" if composed else ""
    return matched, f"named {target}{wrapped}{inside}"


def _names(site: Site) -> tuple[str, ...]:
    return (*site.names, *(composite.path for composite in site.composites))


def _as_usual_name(target: str, sites: Sequence[Site]) -> tuple[list[Site], str]:
    for role in USUAL_NAMES.get(target, ()):
        matched = [s for s in sites if s.role == role]
        if matched:
            spelling = matched[0].names[-1].rpartition(".")[2]
            return matched, f"{target}, which this model calls {spelling}"
    return [], ""


def _as_regex(target: str, sites: Sequence[Site]) -> tuple[list[Site], str]:
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
    named = {s.path for s in sites if any(map(pattern.fullmatch, s.names))}
    composed = {c.path for s in sites for c in s.composites if _is_aimed_at(pattern, c.path)}
    # Where a pattern matches some of its linears, they say which are meant.
    composed -= {c.path for s in sites if s.path in named for c in s.composites}
    matched = [s for s in sites if s.path in named or any(c.path in composed for c in s.composites)]
    return matched, f"matches {target}"


def _is_aimed_at(pattern: re.Pattern[str], path: str) -> bool:
    """Check whether a pattern matches a module, and not the one that holds it, as "all but some" does."""
    return pattern.fullmatch(path) is not None and pattern.fullmatch(path.rpartition(".")[0]) is None
