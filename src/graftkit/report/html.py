"""A report as one HTML page that needs nothing else: no scripts, no fonts, no requests.

The page is drawn from a plain mapping (:class:`ReportData`). Every section is optional: what a command does
not know, its page does not show. Geometry is computed here; the template only places it.
"""

from __future__ import annotations

import functools
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NotRequired, Required, TypedDict, get_args

from graftkit.errors import OutputError
from graftkit.files import write_text
from graftkit.report.chart import Curve, drawn

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    import jinja2

SiteState = Literal["adapted", "possible", "impossible"]
"""A weight has an adapter; could have one but was not asked to; or cannot have one."""

Verdict = Literal["failed", "warning", "noted", "unknown", "ok"]
"""A check did not hold; did not, and that may do harm; did not, without harm here; was not decided; held."""


class Figure(TypedDict):
    """One headline number.

    ``value`` is the number as text; ``share`` (0 to 1), where given, is drawn as a bar under it, with a mark
    at ``baseline`` (0 to 1), for instance the share that guessing reaches.
    """

    label: str
    value: str
    share: NotRequired[float]
    baseline: NotRequired[float]
    note: NotRequired[str]


class Quote(TypedDict):
    """Somebody else's output, word for word: what was run, what it said, and what that means."""

    title: str
    text: str
    command: NotRequired[str]
    explanation: NotRequired[str]


class SiteCell(TypedDict):
    """One weight that an adapter may attach to."""

    path: str
    state: SiteState
    params: int
    reason: NotRequired[str]


class TowerMap(TypedDict):
    """One tower of the model and its sites in order. ``name`` is the survey's: language, vision, audio …"""

    name: str
    sites: Sequence[SiteCell]
    caption: NotRequired[str]


class Chart(TypedDict):
    """Curves that share their axes. ``title`` heads the section, ``unit`` names the vertical axis."""

    title: str
    unit: str
    curves: Sequence[Curve]
    note: NotRequired[str]


class Check(TypedDict):
    """One check and what it found. ``evidence`` is the measured fact in a sentence, ``help`` the next step."""

    code: str
    title: str
    verdict: Verdict
    evidence: str
    where: NotRequired[str]
    help: NotRequired[str]


class Answer(TypedDict):
    """What one run answered to a sample."""

    run: str
    text: str


class Sample(TypedDict):
    """One picture: rows of grey levels (0 black to 255 white), the right answer, and each run's."""

    pixels: Sequence[Sequence[int]]
    expected: str
    answers: Sequence[Answer]


class SavedFile(TypedDict):
    """A file that the command wrote. ``size`` is in bytes."""

    path: str
    size: NotRequired[int]
    note: NotRequired[str]


class ReportData(TypedDict, total=False):
    """What a report shows. Only ``title`` is required; an absent or empty section is left out.

    ``summary`` is a list of paragraphs; ``figures_note`` says how the figures were measured; ``command`` is
    the command line that made the report; ``versions`` maps a package to its version.
    """

    title: Required[str]
    subtitle: str
    summary: Sequence[str]
    figures_title: str
    figures: Sequence[Figure]
    figures_note: str
    quote: Quote
    towers: Sequence[TowerMap]
    towers_note: str
    charts: Sequence[Chart]
    samples: Sequence[Sample]
    samples_note: str
    checks: Sequence[Check]
    files: Sequence[SavedFile]
    versions: Mapping[str, str]
    command: str


def render_report(data: ReportData) -> str:
    """The report as the text of a self-contained HTML page.

    All text is escaped. The page's own content policy forbids it to load anything.

    Raises:
        KeyError: an item lacks a required field.
        ValueError: a state or verdict is not one of those listed, or a curve has no finite point.
    """
    template = _environment().get_template("report.html.j2")
    return template.render(
        data=data,
        bars=[_bar(figure) for figure in data.get("figures", ())],
        rows=_tower_rows(data.get("towers", ())),
        charts=[(chart, drawn(chart["curves"])) for chart in data.get("charts", ())],
        samples=[_drawn(sample) for sample in data.get("samples", ())],
        tally=_tally(data.get("checks", ())),
        files=[(file, _size(file.get("size"))) for file in data.get("files", ())],
    )


def write_report(path: str | os.PathLike[str], data: ReportData) -> Path:
    """Render the report into ``path``, whole or not at all, and return the path.

    Missing folders are made. If anything fails, what was at ``path`` before is still there.

    Raises:
        OutputError: ``output-not-writable``: the file or its folder is read-only or cannot be reached.
        KeyError, ValueError: see :func:`render_report`.
    """
    target = Path(path)
    page = render_report(data)
    for place in (target, target.parent):
        _refuse_read_only(place, target)
    return write_text(target, page)


def _refuse_read_only(place: Path, target: Path) -> None:
    """What is marked read-only is meant to stay as it is, even where a rename or root could replace it."""
    try:
        marked = not place.stat().st_mode & stat.S_IWUSR
    except OSError:
        return  # not there yet, or not to be reached: writing will tell
    if marked:
        raise OutputError(
            "the report cannot be written",
            where=str(target),
            why=f"{place} is read-only",
            help="name a file in a folder you can write to",
            code="output-not-writable",
        )


# The template


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graftkit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = _grouped
    return environment


def _grouped(number: int) -> str:
    """1234567 -> '1,234,567'."""
    return f"{number:,}"


def _size(size: int | None) -> str | None:
    if size is None:
        return None
    scaled = float(size)
    for unit in ("bytes", "KB", "MB"):
        if scaled < 1000:
            return f"{scaled:.0f} {unit}" if unit == "bytes" else f"{scaled:.1f} {unit}"
        scaled /= 1000
    return f"{scaled:.1f} GB"


# Headline figures


@dataclass(frozen=True)
class _Bar:
    """A figure with the positions of its bar's end and of its baseline mark, in percent of the width."""

    figure: Figure
    filled: float | None
    mark: float | None


def _bar(figure: Figure) -> _Bar:
    share, baseline = figure.get("share"), figure.get("baseline")
    return _Bar(figure, _percent(share), _percent(baseline))


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * min(max(share, 0.0), 1.0), 2)


# The picture of the model

_STATES: tuple[SiteState, ...] = ("adapted", "possible", "impossible")
# What a batch passes first is drawn first.
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
class _TowerBlock:
    """One tower drawn as a grid, ``width`` x ``height`` units: a row a kind of weight, a column a layer."""

    name: str
    caption: str | None
    sites: int
    left: int
    cells: tuple[_Cell, ...]
    rows: tuple[tuple[int, str], ...]
    columns: tuple[tuple[int, str], ...]
    width: int
    height: int
    counts: tuple[tuple[SiteState, int], ...]
    params: int
    shares: tuple[tuple[SiteState, float], ...]
    reasons: tuple[tuple[str, int], ...]
    description: str


def _tower_rows(towers: Iterable[TowerMap]) -> tuple[tuple[_TowerBlock, ...], ...]:
    """Towers in the order in which a batch passes them; those in one row stand side by side."""
    rows: dict[int, list[_TowerBlock]] = {}
    for tower in towers:
        rows.setdefault(_STAGES.get(tower["name"], 2), []).append(_block(tower))
    return tuple(tuple(rows[stage]) for stage in sorted(rows))


def _block(tower: TowerMap) -> _TowerBlock:
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
    counts = {state: sum(site["state"] == state for site in sites) for state in _STATES}
    params = {state: sum(site["params"] for site in sites if site["state"] == state) for state in _STATES}
    total = sum(params.values())
    return _TowerBlock(
        name=tower["name"],
        caption=tower.get("caption"),
        sites=len(sites),
        left=left,
        cells=cells,
        rows=tuple((top + at * _STEP, label) for at, label in enumerate(labels)),
        columns=_column_labels(columns, left) if top else (),
        width=left + len(columns) * _STEP,
        height=top + len(rows) * _STEP,
        counts=tuple((state, counts[state]) for state in _STATES),
        params=total,
        shares=tuple((state, round(100 * params[state] / total, 1) if total else 0.0) for state in _STATES),
        reasons=_reasons(sites),
        description=f"{tower['name']}: {counts['adapted']} of {len(sites)} weights adapted, "
        f"{counts['possible']} more could be, {counts['impossible']} cannot be",
    )


def _place(path: str) -> tuple[tuple[str, str], int]:
    """A site's row (the part of its path before and after the layer's number) and its layer.

    A site outside the layers has a row of its own, in the first column.
    """
    parts = path.split(".")
    for at, part in enumerate(parts[:-1]):
        if part.isdigit():
            return (".".join(parts[:at]), ".".join(parts[at + 1 :])), int(part)
    return (".".join(parts[:-1]), parts[-1]), 0


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else "…" + text[-(_LONGEST - 1) :]


def _column_labels(columns: Mapping[int, int], left: int) -> tuple[tuple[int, str], ...]:
    """The layers' numbers; of many, every fifth, so that they do not run into each other."""
    every = 1 if len(columns) <= _NARROW else 5
    return tuple((left + 7 + at * _STEP, str(layer)) for layer, at in columns.items() if at % every == 0)


def _cell(site: SiteCell, x: int, y: int) -> _Cell:
    state = site["state"]
    if state not in _STATES:
        raise ValueError(f"{site['path']}: state {state!r} is not one of {', '.join(_STATES)}")
    words = f"{site['path']} — {_STATE_WORDS[state]}, {_grouped(site['params'])} parameters"
    reason = site.get("reason")
    return _Cell(x, y, state, f"{words}: {reason}" if reason else words)


_STATE_WORDS: dict[SiteState, str] = {
    "adapted": "adapted",
    "possible": "could be adapted",
    "impossible": "cannot be adapted",
}


def _reasons(sites: Sequence[SiteCell]) -> tuple[tuple[str, int], ...]:
    """Why sites of the tower are not adapted, most frequent first, with how many sites each concerns."""
    counts: dict[str, int] = {}
    for site in sites:
        reason = site.get("reason")
        if reason and site["state"] != "adapted":
            counts[reason] = counts.get(reason, 0) + 1
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# Samples and checks


@dataclass(frozen=True)
class _Drawn:
    """A sample as SVG paths, one for each grey level, in a drawing of one unit a pixel."""

    sample: Sample
    width: int
    height: int
    paths: tuple[tuple[float, str], ...]
    alt: str


def _drawn(sample: Sample) -> _Drawn:
    pixels = sample["pixels"]
    levels: dict[int, list[str]] = {}
    for y, row in enumerate(pixels):
        for x, grey in enumerate(row):
            if grey:
                levels.setdefault(grey, []).append(f"M{x} {y}h1v1h-1z")
    paths = tuple((round(grey / 255, 3), "".join(parts)) for grey, parts in sorted(levels.items()))
    width = max((len(row) for row in pixels), default=0)
    return _Drawn(sample, width, len(pixels), paths, f"a picture of {sample['expected']}")


def _tally(checks: Sequence[Check]) -> dict[str, int]:
    tally: dict[str, int] = dict.fromkeys(get_args(Verdict), 0)
    for check in checks:
        if check["verdict"] not in tally:
            raise ValueError(f"{check['code']}: verdict {check['verdict']!r} is not one of {', '.join(tally)}")
        tally[check["verdict"]] += 1
    return tally
