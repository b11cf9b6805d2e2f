"""A survey as tables for people, rendered from its JSON fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from graftkit.text import count, size, some, table


def survey_text(survey: Mapping[str, Any]) -> str:
    """Render what ``ModelMap.to_dict()`` returns: one line a tower, then one a tower, role, kind and wrapper."""
    model = survey["model"]
    head = f"{model['name']}: {model['class']}, {count(model['params'])} parameters, read from {model['origin']}"
    towers = table(
        ("tower", ">sites", ">parameters"),
        [(tower["name"], tower["sites"], count(tower["params"])) for tower in survey["towers"]],
    )
    groups = Counter(_row(site) for site in survey["sites"])
    first = {_row(site): site["path"] for site in reversed(survey["sites"])}
    rows = [(*row[:3], number, *row[3:], first[row]) for row, number in groups.items()]
    sites = table(("tower", "role", "kind", ">sites", "wrapper", "adaptable", "first"), rows)
    checkpoint = survey["checkpoint"]
    return "\n\n".join([head, towers, sites, *([_checkpoint_text(checkpoint)] if checkpoint else [])])


def _row(site: Mapping[str, Any]) -> tuple[str, ...]:
    wrapper = site["wrapper"]["class"] if site["wrapper"] else "-"
    adaptable = "yes" if site["adaptable"] else f"no: {site['reason']}"
    if site["adaptable"] and site["tied_to"]:
        adaptable = f"tied to {site['tied_to'][0]}"
    return (site["tower"], site["role"], site["kind"], wrapper, adaptable)


def _checkpoint_text(checkpoint: Mapping[str, Any]) -> str:
    kinds = ", ".join(f"{number} {dtype}" for dtype, number in checkpoint["dtypes"].items())
    lines = [f"checkpoint: {checkpoint['tensors']} tensors ({kinds}), {size(checkpoint['bytes'])}"]
    labels = {
        "unknown": "unknown to the class",
        "missing": "missing weights, which would be random",
        "missing_heads": "missing weights of a new head",
        "missing_buffers": "missing buffers, which keep the class's values",
        "mismatched": "of another shape",
    }
    lines += [
        f"  {len(checkpoint[field])} {label}: {some(checkpoint[field])}"
        for field, label in labels.items()
        if checkpoint[field]
    ]
    if checkpoint["renamed"]:
        lines.append(f"  {len(checkpoint['renamed'])} of them only have another name: graft rekey writes a copy")
    if checkpoint["undecided"]:
        lines.append(f"  not compared with the class: {checkpoint['undecided']}")
    return "\n".join(lines)
