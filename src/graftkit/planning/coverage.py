"""How much of the model a plan reaches: per tower and role, in sites and in share of parameters."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from graftkit.planning.decisions import Attached, Skipped
from graftkit.surveying.sites import ModelMap, Site


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """One tower and role.

    Attributes:
        sites, adapted: sites present, and those adapted.
        params, adapted_params: elements of their weights.
        reasons: why the others are not adapted, each with its number of sites.
    """

    tower: str
    role: str
    sites: int
    adapted: int
    params: int
    adapted_params: int
    reasons: tuple[tuple[str, int], ...]

    @property
    def share(self) -> float:
        """Share of this row's weight elements that are adapted, 0 to 1."""
        return self.adapted_params / self.params if self.params else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": round(self.share, 6), "reasons": dict(self.reasons)}


def coverage_of(
    model_map: ModelMap, attached: Iterable[Attached], skipped: Iterable[Skipped]
) -> tuple[CoverageRow, ...]:
    """Return one row per tower and role, in the order the model defines them."""
    adapted = {a.path for a in attached}
    reasons: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for s in skipped:
        reasons[s.site.tower, s.site.role][s.reason] += 1
    groups: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for site in model_map:
        groups[site.tower, site.role].append(site)
    return tuple(
        CoverageRow(
            tower=tower,
            role=role,
            sites=len(sites),
            adapted=sum(site.path in adapted for site in sites),
            params=sum(site.params for site in sites),
            adapted_params=sum(site.params for site in sites if site.path in adapted),
            reasons=tuple(reasons[tower, role].items()),
        )
        for (tower, role), sites in groups.items()
    )


@dataclass(frozen=True, slots=True)
class LayerReach:
    """How many of a tower's layers carry an adapter; a name that only some layers have shows here.

    Attributes:
        layers: layers that have sites.
        reached: layers with at least one adapted site.
    """

    tower: str
    layers: int
    reached: int


def layers_reached(model_map: ModelMap, adapted: Collection[str]) -> tuple[LayerReach, ...]:
    """Return one row for each tower that is built of numbered layers; ``adapted`` are paths of sites."""
    layers: dict[str, dict[str, bool]] = defaultdict(lambda: defaultdict(bool))
    for site in model_map:
        if (layer := _layer(site.path)) is not None:
            layers[site.tower][layer] |= site.path in adapted
    return tuple(LayerReach(tower, len(known), sum(known.values())) for tower, known in layers.items())


def _layer(path: str) -> str | None:
    """Return the path up to its first number: ``model.layers.3.self_attn.q_proj`` is in ``model.layers.3``."""
    parts = path.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if at is None else ".".join(parts[: at + 1])
