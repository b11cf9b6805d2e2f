"""A model as grids of cells, one a tower: a row for each kind of weight, a column for each layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graftkit.report.data import SiteCell, SiteState, TowerMap

STATE_TEXT: dict[SiteState, str] = {
    "adapted": "adapted",
    "possible": "could be adapted",
    "impossible": "cannot be adapted",
}
# In the order in which a batch passes the towers.
_STAGES = {"vision": 0, "audio": 0, "projector": 1, "language": 2, "other": 2, "head": 3}
_STEP = 18  # a cell of 14 units and the gap to the next
_HEAD = 16  # the height of the layers' numbers
_LETTER = 6.8  # the width of a letter of the rows' names
_LONGEST = 30
_NARROW = 12


@dataclass(frozen=True)
class _Cell:
    x: int
    y: int
    state: SiteState
    label: str


@dataclass(frozen=True)
class TowerGrid:
    """One tower as a grid of ``width`` x ``height`` units."""

    name: str
    caption: str | None
    sites: int
    left: int
    cells: tuple[_Cell, ...]
    rows: tuple[tuple[int, str], ...]
    columns: tuple[tuple[int, str], ...]
    width: int
    height: int
    counts: dict[SiteState, int]
    params: int
    shares: dict[SiteState, float]
    reasons: tuple[tuple[str, int], ...]
    description: str


def draw_towers(towers: Iterable[TowerMap]) -> tuple[tuple[TowerGrid, ...], ...]:
    """Draw towers in the order in which a batch passes them; those of one row stand side by side."""
    rows: dict[int, list[TowerGrid]] = {}
    for tower in towers:
        rows.setdefault(_STAGES.get(tower["name"], 2), []).append(_grid(tower))
    return tuple(tuple(rows[stage]) for stage in sorted(rows))


def _grid(tower: TowerMap) -> TowerGrid:
    sites = tower["sites"]
    places = [_place(site["path"]) for site in sites]
    rows = {key: at for at, key in enumerate(dict.fromkeys(key for key, _ in places))}
    columns = {layer: at for at, layer in enumerate(sorted({layer for _, layer in places}))}
    labels = [_shortened(text) for _, text in rows]
    left = round(_LETTER * max(map(len, ("layer", *labels)))) + 10
    top = _HEAD if len(columns) > 1 else 0
    cells = tuple(
        _cell(site, left + columns[layer] * _STEP, top + rows[key] * _STEP)
        for site, (key, layer) in zip(sites, places, strict=True)
    )
    counts = {state: sum(site["state"] == state for site in sites) for state in STATE_TEXT}
    params = {state: sum(site["params"] for site in sites if site["state"] == state) for state in STATE_TEXT}
    total = sum(params.values())
    return TowerGrid(
        name=tower["name"],
        caption=tower.get("caption"),
        sites=len(sites),
        left=left,
        cells=cells,
        rows=tuple((top + at * _STEP, label) for at, label in enumerate(labels)),
        columns=_column_labels(columns, left) if top else (),
        width=left + len(columns) * _STEP,
        height=top + len(rows) * _STEP,
        counts=counts,
        params=total,
        shares={state: round(100 * number / max(total, 1), 1) for state, number in params.items()},
        reasons=_reasons(sites),
        description=f"{tower['name']}: {counts['adapted']} of {len(sites)} weights adapted, "
        f"{counts['possible']} more could be, {counts['impossible']} cannot be",
    )


def _place(path: str) -> tuple[tuple[str, str], int]:
    """Return a site's row (its path before and after the layer's number) and its layer.

    A site outside the layers gets its own row, in the first column.
    """
    parts = path.split(".")
    for at, part in enumerate(parts[:-1]):
        if part.isdigit():
            return (".".join(parts[:at]), ".".join(parts[at + 1 :])), int(part)
    return (".".join(parts[:-1]), parts[-1]), 0


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else "…" + text[-(_LONGEST - 1) :]


def _column_labels(columns: Mapping[int, int], left: int) -> tuple[tuple[int, str], ...]:
    """Return the layers' numbers, or every fifth of many, so that they do not overlap."""
    every = 1 if len(columns) <= _NARROW else 5
    return tuple((left + 7 + at * _STEP, str(layer)) for layer, at in columns.items() if at % every == 0)


def _cell(site: SiteCell, x: int, y: int) -> _Cell:
    state = site["state"]
    if state not in STATE_TEXT:
        raise ValueError(f"{site['path']}: state {state!r} is not one of {', '.join(STATE_TEXT)}")
    label = f"{site['path']} — {STATE_TEXT[state]}, {site['params']:,} parameters"
    reason = site.get("reason")
    return _Cell(x, y, state, f"{label}: {reason}" if reason else label)


def _reasons(sites: Sequence[SiteCell]) -> tuple[tuple[str, int], ...]:
    """Return why sites of the tower are not adapted, and of how many each is true, most frequent first."""
    left = (site for site in sites if site["state"] != "adapted")
    counts = Counter(reason for site in left if (reason := site.get("reason")))
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
