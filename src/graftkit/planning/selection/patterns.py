"""``rank_pattern`` and the like: the user's names -> keys that PEFT matches on exactly the meant sites."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftkit.errors import PlanError
from graftkit.planning.matching import ends_with, key_matches, smallest_exact
from graftkit.planning.selection.target_names import ROLE_TARGETS, sites_meant
from graftkit.text import suggest

if TYPE_CHECKING:
    from graftkit.surveying.sites import ModelMap, Site


def rekey(name: str, pattern: Mapping[str, Any], model_map: ModelMap, sites: Sequence[Site]) -> dict[str, Any]:
    """Return ``pattern`` with keys that PEFT matches on the sites each of the user's keys means, and on no other.

    A key may be a tower, a role, a module's name, a wrapper's name, a usual name that the model spells
    differently, or a regular expression as PEFT reads it. Where two keys mean one site the first wins, as it
    does in PEFT.

    Args:
        name: the option, for messages.
        model_map: the map that the sites belong to, for messages.
        sites: the planned sites, each with the path that PEFT matches keys against.

    Raises:
        PlanError: ``pattern-unmatched`` when a key means no planned site.
    """
    paths = [site.path for site in sites]
    taken: set[str] = set()
    keyed: dict[str, Any] = {}
    for key, value in pattern.items():
        meant = [site.path for site in _meant(key, sites)]
        if not meant:
            raise _unmatched(name, key, model_map, sites)
        new = [path for path in meant if path not in taken]
        taken.update(new)
        keyed |= dict.fromkeys(_keys(new, paths), value)
    return keyed


# ---- which sites a key means: the first reading that finds any ----


def _meant(key: str, sites: Sequence[Site]) -> Sequence[Site]:
    readings = (reading(key, sites) for reading in (_as_tower, _as_target, _as_peft_reads))
    return next((meant for meant in readings if meant), ())


def _as_tower(key: str, sites: Sequence[Site]) -> Sequence[Site]:
    return [site for site in sites if site.tower == key]


def _as_target(key: str, sites: Sequence[Site]) -> Sequence[Site]:
    towers = dict.fromkeys(site.tower for site in sites)
    try:
        return [s for tower in towers for s, _ in sites_meant(key, [s for s in sites if s.tower == tower])]
    except PlanError:
        return ()


def _as_peft_reads(key: str, sites: Sequence[Site]) -> Sequence[Site]:
    try:
        return [site for site in sites if any(key_matches(key, name) for name in site.names)]
    except re.error:
        return ()


# ---- keys that PEFT's tuners all read alike ----

# Most tuners use get_pattern_key; C3A and FourierFT want a dot before the key; OSF searches anywhere.
_READERS: tuple[Callable[[str, str], object], ...] = (
    key_matches,
    lambda key, path: "." not in path or re.match(rf".*\.{key}$", path),
    lambda key, path: re.search(key, path),
)


def _keys(meant: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return the fewest keys that match ``meant`` among the planned ``paths``, plain names where those do."""
    if not meant:
        return []
    for keys in _candidates(meant, paths):
        if all(_is_exact(keys, meant, paths, reads) for reads in _READERS):
            return keys
    return [f"^{re.escape(path)}$" for path in meant]


def _candidates(meant: Sequence[str], paths: Sequence[str]) -> list[list[str]]:
    # Without the first component the dot before it is left for the tuners that ask for one.
    targets = smallest_exact([_inner(path) for path in meant], [_inner(path) for path in paths])
    if isinstance(targets, str):
        return [[f"(?:{targets})$"], [f"^(?:.*\\.)?(?:{targets})$"], [_tail(path) for path in meant]]
    names = list(targets)
    return [names, [re.escape(n) for n in names], [f"{re.escape(n)}$" for n in names], [_tail(p) for p in meant]]


def _inner(path: str) -> str:
    return path.partition(".")[2] or path


def _tail(path: str) -> str:
    return re.escape(_inner(path)) + "$"


def _is_exact(
    keys: Sequence[str], meant: Sequence[str], paths: Sequence[str], reads: Callable[[str, str], object]
) -> bool:
    return {path for path in paths if any(reads(key, path) for key in keys)} == set(meant)


# ---- errors ----


def _unmatched(name: str, key: str, model_map: ModelMap, sites: Sequence[Site]) -> PlanError:
    elsewhere = [site for site in model_map if any(ends_with(n, key) for n in site.names)]
    if elsewhere:
        return PlanError(
            f"{name} key {key!r} matches no planned site",
            where=elsewhere[0].path,
            why="the plan leaves the sites of that name alone",
            help="add them to the targets and the scope, or leave the key out",
            code="pattern-unmatched",
        )
    leaves = [n.rpartition(".")[2] for site in sites for n in site.names]
    known = dict.fromkeys([*leaves, *(s.role for s in sites), *(s.tower for s in sites), *ROLE_TARGETS])
    return PlanError(
        f"{name} key {key!r} matches no planned site",
        where=model_map.model.name,
        why="PEFT would use the default there without a warning",
        help=suggest(key, known, 3) or "use a module's name, a role or a tower",
        code="pattern-unmatched",
    )
