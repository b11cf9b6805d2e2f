"""Which towers of a model a batch feeds."""

from __future__ import annotations

from collections.abc import Iterable

from graftkit.planning.selection.scope import fed_towers
from graftkit.surveying.sites import UNKNOWN_TOWER, ModelMap

# Tower -> the modalities that feed it. A projector is fed by any of them.
_FED_BY = {"vision": frozenset({"image", "video"}), "audio": frozenset({"audio"})}
_NOT_TEXT = frozenset({"image", "video", "audio"})


def always_fed(base: ModelMap) -> frozenset[str]:
    """Return the towers that every batch feeds, and the head."""
    return frozenset((*fed_towers(base), "head"))


def may_be_fed(base: ModelMap, tower: str) -> bool:
    """Check for a tower of which it is not known whether batches feed it, beside others that they do feed."""
    return tower == UNKNOWN_TOWER and tower not in always_fed(base)


def is_fed(base: ModelMap, tower: str, modalities: Iterable[str]) -> bool:
    """Check whether batches with these modalities feed a tower."""
    return tower in always_fed(base) or not _FED_BY.get(tower, _NOT_TEXT).isdisjoint(modalities)
