"""Which towers a batch feeds, and which of them somebody's words mean."""

from __future__ import annotations

from collections.abc import Iterable

from graftkit.planning.selection.intent import fed_towers
from graftkit.surveying.sites import ModelMap

# Tower -> what a batch has to hold for the tower to work. A projector works for any of them.
_FED_BY = {"vision": frozenset({"image", "video"}), "audio": frozenset({"audio"})}
_NOT_TEXT = frozenset({"image", "video", "audio"})


def always_fed(base: ModelMap) -> frozenset[str]:
    """The towers that every batch feeds, and the head."""
    return frozenset((*fed_towers(base, tuple(tower.name for tower in base.towers)), "head"))


def is_fed(base: ModelMap, tower: str, modalities: Iterable[str]) -> bool:
    """Whether batches that hold these modalities feed a tower."""
    return tower in always_fed(base) or not _FED_BY.get(tower, _NOT_TEXT).isdisjoint(modalities)


def own_names(base: ModelMap) -> dict[str, set[str]]:
    """Tower -> the names above its layers that no other tower has."""
    names: dict[str, set[str]] = {}
    for site in base:
        parts = site.names[-1].split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        names.setdefault(site.tower, set()).update(parts[:at])
    return {
        tower: found.difference(*(other for name, other in names.items() if name != tower))
        for tower, found in names.items()
    }
