"""A histogram as SVG rectangles with axes and ticks, and a limit as a line across it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from graftkit.report.chart import ticks

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 440, 14, 238
# A limit further out than this many times the largest value is not drawn: the bars would be too thin to see.
_FARTHEST = 2


class Histogram(TypedDict):
    """How many values lie in each bin. The first bin begins at 0, and all have the same ``width``, in ``unit``.

    ``limit``, in the same unit, is drawn as a line with ``limit_label``; None for no limit.
    """

    title: str
    unit: str
    width: int
    counts: Sequence[int]
    limit: int | None
    limit_label: str
    note: str


@dataclass(frozen=True)
class Bar:
    """A bin as a rectangle; ``label`` says what is in it."""

    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class HistogramPlot:
    """A histogram in a viewBox of 460 x 290 units, with the positions and labels of its ticks.

    Attributes:
        limit: where the limit's line is; None where it is not drawn.
    """

    bars: tuple[Bar, ...]
    limit: float | None
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    left: int = _LEFT
    right: int = _RIGHT
    top: int = _TOP
    bottom: int = _BOTTOM


def draw_histogram(given: Histogram) -> HistogramPlot:
    """Draw a histogram, the counts upwards from zero.

    Raises:
        ValueError: there is no bin.
    """
    width, counts, limit = given["width"], given["counts"], given["limit"]
    if not counts:
        raise ValueError(f"the histogram {given['title']!r} has no bin")
    end = width * len(counts)
    shown = limit if limit is not None and limit <= _FARTHEST * end else None
    xs, ys = ticks(0, max(end, shown or 0)), ticks(0, max(counts))

    def x(value: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * value / xs[-1], 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * value / ys[-1], 1)

    bars = tuple(
        Bar(
            x=x(at * width),
            y=y(count),
            width=round(x((at + 1) * width) - x(at * width), 1),
            height=round(_BOTTOM - y(count), 1),
            label=f"{at * width:,} to {(at + 1) * width - 1:,} {given['unit']}: {count:,}",
        )
        for at, count in enumerate(counts)
        if count
    )
    return HistogramPlot(
        bars=bars,
        limit=None if shown is None else x(shown),
        x_ticks=tuple((x(tick), f"{tick:,.0f}") for tick in xs),
        y_ticks=tuple((y(tick), f"{tick:g}") for tick in ys),
    )
