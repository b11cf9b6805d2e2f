"""Curves as SVG paths with axes and ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 440, 14, 238
_TICKS = 5


class Curve(TypedDict):
    """One curve: pairs of step (zero or more) and value, steps ascending."""

    label: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Line:
    """A curve as a path, with its first and last value as text."""

    label: str
    path: str
    first: str
    last: str


@dataclass(frozen=True)
class Drawing:
    """Curves in a drawing of 460 x 290 units, with tick positions and labels."""

    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    left: int
    right: int
    top: int
    bottom: int
    description: str


def drawn(curves: Sequence[Curve]) -> Drawing:
    """Draw curves that share their axes; the vertical one holds zero. What is not finite is left out.

    Raises:
        ValueError: a curve without a finite point.
    """
    finite = [[(step, value) for step, value in curve["points"] if math.isfinite(value)] for curve in curves]
    for curve, points in zip(curves, finite, strict=True):
        if not points:
            raise ValueError(f"the curve {curve['label']!r} has no finite point")
    values = [value for points in finite for _, value in points]
    x_ticks = ticks(0.0, max(step for points in finite for step, _ in points))
    y_ticks = ticks(min(0.0, *values), max(0.0, *values))
    lines = tuple(
        _line(curve["label"], points, x_ticks[-1], y_ticks) for curve, points in zip(curves, finite, strict=True)
    )
    return Drawing(
        lines=lines,
        x_ticks=tuple((_across(tick, x_ticks[-1]), f"{tick:g}") for tick in x_ticks),
        y_ticks=tuple((_down(tick, y_ticks), f"{tick:g}") for tick in y_ticks),
        left=_LEFT,
        right=_RIGHT,
        top=_TOP,
        bottom=_BOTTOM,
        description="; ".join(f"{line.label}: from {line.first} to {line.last}" for line in lines),
    )


def ticks(low: float, high: float) -> tuple[float, ...]:
    """About five round numbers a step apart, zero among them, that enclose ``low`` (<= 0) and ``high`` (>= 0)."""
    rough = max(high - low, 1e-9) / _TICKS
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(step * at for at in range(first, max(last, first + 1) + 1))


def _line(label: str, points: Sequence[tuple[int, float]], x_max: float, y_ticks: Sequence[float]) -> Line:
    where = [f"{_across(step, x_max):.1f} {_down(value, y_ticks):.1f}" for step, value in points]
    return Line(label, "M" + "L".join(where), _number(points[0][1]), _number(points[-1][1]))


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"


def _across(value: float, maximum: float) -> float:
    return round(_LEFT + (_RIGHT - _LEFT) * value / maximum, 1)


def _down(value: float, y_ticks: Sequence[float]) -> float:
    return round(_BOTTOM - (_BOTTOM - _TOP) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 1)
