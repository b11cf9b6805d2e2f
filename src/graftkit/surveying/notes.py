"""What an adapter on a site reaches besides its own projection, read from which projections a layer has."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from graftkit.surveying.sites import Note, Site


def with_notes(sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Return the sites with notes on attention layers that lack projections which their tower has elsewhere.

    A layer with a key but no value projection uses its keys as values; one with neither reads another
    layer's. A tower in which no layer has a value projection (a fused qkv) gets no notes.
    """
    layers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for site in sites:
        layers[_layer(site)].add(site.role)
    separate = {tower for (tower, _), roles in layers.items() if "attention.v" in roles}
    return tuple(replace(s, note=_note(s, layers[_layer(s)])) if s.tower in separate else s for s in sites)


def _layer(site: Site) -> tuple[str, str]:
    return site.tower, site.names[-1].rpartition(".")[0]


def _note(site: Site, roles: set[str]) -> Note | None:
    if "attention.v" in roles or roles & {"attention.qkv", "attention.kv"}:
        return None
    if site.role == "attention.k":
        return Note.KEY_IS_VALUE
    if site.role == "attention.q" and "attention.k" not in roles:
        return Note.SHARED_KV
    return None
