"""A model map as a table that a person reads."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from graftkit.text import count, size, some, table

if TYPE_CHECKING:
    from graftkit.surveying.checkpoint.comparison import Checkpoint
    from graftkit.surveying.sites import ModelMap, Site


def survey_text(model_map: ModelMap) -> str:
    """One line per tower, role and wrapper, with an example path and what stands against adapting it."""
    info = model_map.model
    head = f"{info.name}: {info.cls}, {count(info.params)} parameters, read from {info.origin}"
    towers = table(
        ("tower", ">sites", ">parameters"),
        [(t.name, t.sites, count(t.params)) for t in model_map.towers],
    )
    groups = Counter(_row_key(site) for site in model_map)
    first: dict[tuple[str, ...], Site] = {}
    for site in model_map:
        first.setdefault(_row_key(site), site)
    rows = [(*key[:3], number, key[3], key[4], first[key].path) for key, number in groups.items()]
    sites = table(("tower", "role", "kind", ">sites", "wrapper", "adaptable", "first"), rows)
    return "\n\n".join([head, towers, sites, *_checkpoint_lines(model_map.checkpoint)])


def _checkpoint_lines(checkpoint: Checkpoint | None) -> list[str]:
    if checkpoint is None:
        return []
    kinds = ", ".join(f"{number} {dtype}" for dtype, number in checkpoint.dtypes)
    lines = [f"checkpoint: {checkpoint.tensors} tensors ({kinds}), {size(checkpoint.bytes)}"]
    for label, keys in (("unknown to the class", checkpoint.unknown), ("missing", checkpoint.missing)):
        if keys:
            lines.append(f"  {len(keys)} {label}: {some(keys)}")
    return ["\n".join(lines)]


def _row_key(site: Site) -> tuple[str, ...]:
    wrapper = site.wrapper.cls if site.wrapper else "-"
    adaptable = "yes" if site.adaptable else f"no: {site.reason}"
    if site.adaptable and site.tied_to:
        adaptable = f"tied to {site.tied_to[0]}"
    return (site.tower, site.role, site.kind, wrapper, adaptable)
