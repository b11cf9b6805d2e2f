"""What an adapter on a site reaches besides its own projection, read from which projections a layer has."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from graftkit.surveying.sites import Site

_KEY_IS_VALUE = "also makes the values: this layer has no value projection of its own"
_SHARED = "reads keys and values of another layer: this layer has no projections for them"


def noted(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """The sites with notes on attention layers that lack projections which their tower has elsewhere.

    A layer with a key but no value projection uses its keys as values; one with neither reads another
    layer's. A tower in which no layer has a value projection (a fused qkv) tells nothing, and gets no note.
    """
    layers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for site in sites:
        layers[_layer(site)].add(site.role)
    telling = {tower for (tower, _), roles in layers.items() if "attention.v" in roles}
    return tuple(replace(s, note=_note(s, layers[_layer(s)])) if s.tower in telling else s for s in sites)


def makes_values(site: Site) -> bool:
    """Whether a key projection also makes its layer's values."""
    return site.note == _KEY_IS_VALUE


def _layer(site: Site) -> tuple[str, str]:
    return site.tower, site.names[-1].rpartition(".")[0]


def _note(site: Site, roles: set[str]) -> str | None:
    if "attention.v" in roles or roles & {"attention.qkv", "attention.kv"}:
        return None
    if site.role == "attention.k":
        return _KEY_IS_VALUE
    if site.role == "attention.q" and "attention.k" not in roles:
        return _SHARED
    return None
