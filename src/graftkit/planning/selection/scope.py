"""Which sites a scope means: those of towers, and those in modules that it names by path."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from graftkit.errors import PlanError
from graftkit.planning.decisions import objection_to
from graftkit.planning.selection.target_names import sites_meant
from graftkit.surveying.kinds import EMBEDDING
from graftkit.surveying.sites import UNKNOWN_TOWER, ModelMap, Site
from graftkit.text import some, suggest


@dataclass(frozen=True)
class Scope:
    """Where the targets are looked for. A site is ``in`` it or not.

    Attributes:
        names: towers and paths of modules.
        paths: the sites in scope.
        settled: whether a site of no known tower is in the scope, or out of it, because the user said so.
    """

    names: tuple[str, ...]
    paths: frozenset[str] = field(repr=False)
    settled: bool

    def __contains__(self, site: Site) -> bool:
        return site.path in self.paths

    def __str__(self) -> str:
        return ", ".join(self.names)


def read_scope(model_map: ModelMap, scope: str | Iterable[str] | None) -> Scope:
    """Check a scope against the model.

    Without one, the towers that every batch feeds are meant: the language tower, and the tower of the
    main input where that is not text (a speech recogniser's encoder). Towers that a text-only batch leaves
    unfed, and modules of no known tower, have to be asked for.

    Raises:
        PlanError: ``scope-missing``.
    """
    present = tuple(tower.name for tower in model_map.towers)
    named = fed_towers(model_map) if scope is None else (scope,) if isinstance(scope, str) else tuple(scope)
    if named == ("all",):
        named = present
    missing = next((name for name in named if name not in present and name not in model_map.module_paths), None)
    if missing is not None:
        raise PlanError(
            f"this model has no {missing!r} tower, and no module of that path",
            where=model_map.model.name,
            why=f"its towers are {', '.join(present)}",
            help=suggest(missing, present) or "name some of these as the scope, or leave the scope out",
            code="scope-missing",
        )
    paths = frozenset(site.path for site in model_map if any(_is_in(site, name, present) for name in named))
    only_towers = scope is not None and set(present).issuperset(named)
    return Scope(named, paths, settled=not only_towers or UNKNOWN_TOWER in named)


def fed_towers(model_map: ModelMap) -> tuple[str, ...]:
    """Return the towers that every batch feeds, and the head.

    Where these are known to hold embeddings alone, whatever computes with them is among the others.
    """
    present = [tower.name for tower in model_map.towers]
    fed = [t for t in present if t == "language" or t in model_map.model.fed_towers]
    others = [t for t in present if t not in {"head", "projector"}]
    if not any(site.tower in fed for site in model_map if site.kind != EMBEDDING):
        fed = others
    # The head can be adapted by name; "all-linear" leaves it out whatever the scope.
    return (*(fed or others), *(t for t in present if t == "head"))


def refuse_to_guess(model_map: ModelMap, scope: Scope, targets: Iterable[str], left_out: Collection[str]) -> None:
    """Refuse a scope of towers where the targets also name modules of which the tower is not known.

    Args:
        left_out: paths of sites that are not adapted whatever the scope.

    Raises:
        PlanError: ``tower-unknown``.
    """
    if scope.settled:
        return
    able = [site for site in model_map if objection_to(site) is None and site.path not in left_out]
    unknown = [site for site in able if site.tower == UNKNOWN_TOWER]
    meant = {site.path for target in targets for site, _ in sites_meant(target, unknown)}
    if not meant:
        return
    wanted = [site for site in model_map if site in scope]
    raise PlanError(
        f"{len(meant)} weights that the targets name belong to no known tower",
        where=some(_shortest_paths([site for site in unknown if site.path in meant], model_map), 4),
        why="neither the model's structure nor its names show what feeds them, and the scope names towers",
        help=f"scope={[*scope.names, UNKNOWN_TOWER]} adapts them too; a scope may also name modules by path, as in"
        f" scope={_shortest_paths(wanted, model_map)[:4]}, which leaves them alone",
        code="tower-unknown",
    )


def _is_in(site: Site, name: str, towers: Collection[str]) -> bool:
    return site.tower == name if name in towers else f"{site.path}.".startswith(f"{name}.")


def _shortest_paths(sites: Sequence[Site], model_map: ModelMap) -> list[str]:
    """Return the fewest modules that hold these sites and no other that an adapter can go on."""
    paths = {site.path for site in sites}
    others = {at for site in model_map if site.adaptable and site.path not in paths for at in _prefixes(site.path)}
    held = (next((at for at in _prefixes(site.path) if at not in others), site.path) for site in sites)
    return list(dict.fromkeys(held))


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
