"""A survey as tables for people, rendered from its JSON fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from graftkit.surveying.kinds import LINEAR
from graftkit.text import count, size, some, table


def survey_text(survey: Mapping[str, Any]) -> str:
    """Render what ``ModelMap.to_dict()`` returns: one line a tower, then one a tower, role and kind."""
    model = survey["model"]
    head = f"{model['name']}: {model['class']}, {count(model['params'])} parameters, read from {model['origin']}"
    towers = table(
        ("tower", ">sites", ">parameters"),
        [(tower["name"], tower["sites"], count(tower["params"])) for tower in survey["towers"]],
    )
    groups = Counter(_row(site) for site in survey["sites"])
    first = {_row(site): site["path"] for site in reversed(survey["sites"])}
    rows = [(*row[:2], number, row[2], first[row]) for row, number in groups.items()]
    sites = table(("tower", "role", ">sites", "kind", "first"), rows)
    checkpoint = survey["checkpoint"]
    return "\n\n".join([head, towers, sites, *([_checkpoint_text(checkpoint)] if checkpoint else [])])


def _row(site: Mapping[str, Any]) -> tuple[str, ...]:
    return (site["tower"], site["role"], _kind(site))


def _kind(site: Mapping[str, Any]) -> str:
    """Return a site's kind, and what is special about it: its wrapper, a tie, or why nothing can go on it."""
    kind = str(site["kind"])
    if not site["adaptable"]:
        return f"{kind}, not adaptable: {site['reason']}"
    if site["wrapper"]:
        wrapped = f"in {site['wrapper']['class']}"
        return wrapped if kind == LINEAR else f"{kind} {wrapped}"
    return f"{kind}, tied to {site['tied_to'][0]}" if site["tied_to"] else kind


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
