"""What a report page shows, as plain mappings. Every section is optional."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NotRequired, Required, TypedDict

from graftkit.report.chart import Curve
from graftkit.report.histogram import Histogram

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SiteState = Literal["adapted", "possible", "impossible"]
"""A weight has an adapter; could have one but was not asked to; or cannot have one."""

Verdict = Literal["failed", "warning", "info", "unknown", "ok"]
"""The result of a check, worst first; on a page, an error is "failed"."""


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
    """The output of another program: what was run, what it printed, and what that means."""

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
    """One tower of the model and its sites in order. ``name`` is the survey's: "language", "vision" …"""

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
    """One image: rows of grey levels (0 black to 255 white), the right answer, and each run's."""

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
    the command line that made the report; ``versions`` maps a package to its version, None where it is missing.
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
    histograms: Sequence[Histogram]
    samples: Sequence[Sample]
    samples_note: str
    checks: Sequence[Check]
    files: Sequence[SavedFile]
    versions: Mapping[str, str | None]
    command: str
