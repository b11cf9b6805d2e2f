"""Curves as SVG paths with axes and ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 440, 14, 238
# So many characters fit beside the vertical axis.
_LABEL = 6
_TICKS = 5


class Curve(TypedDict):
    """One curve: pairs of step (zero or more) and value, steps ascending."""

    label: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Line:
    """A curve as an SVG path, with its first and last value as text."""

    label: str
    path: str
    first: str
    last: str


@dataclass(frozen=True)
class CurvePlot:
    """Curves in a viewBox of 460 x 290 units, with the positions and labels of their ticks."""

    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    description: str
    left: int = _LEFT
    right: int = _RIGHT
    top: int = _TOP
    bottom: int = _BOTTOM


def draw_curves(curves: Sequence[Curve]) -> CurvePlot:
    """Draw curves on shared axes, the vertical one with zero on it. Points that are not finite are left out.

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
    return CurvePlot(
        lines=lines,
        x_ticks=tuple((_x(tick, x_ticks[-1]), f"{tick:g}") for tick in x_ticks),
        y_ticks=tuple((_y(tick, y_ticks), _label(tick)) for tick in y_ticks),
        description="; ".join(f"{line.label}: from {line.first} to {line.last}" for line in lines),
    )


def ticks(low: float, high: float) -> tuple[float, ...]:
    """Return about five evenly spaced round numbers, zero among them, from ``low`` (<= 0) to ``high`` (>= 0)."""
    rough = (high - low or 1.0) / _TICKS
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(step * at for at in range(first, max(last, first + 1) + 1))


def _line(label: str, points: Sequence[tuple[int, float]], x_max: float, y_ticks: Sequence[float]) -> Line:
    where = [f"{_x(step, x_max):.1f} {_y(value, y_ticks):.1f}" for step, value in points]
    return Line(label, "M" + "L".join(where), _text(points[0][1]), _text(points[-1][1]))


def _text(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"


def _label(value: float) -> str:
    """Return a tick's label, as "2.5e-4" where it would be too long otherwise."""
    plain = f"{value:g}"
    if len(plain) <= _LABEL:
        return plain
    digits, exponent = f"{value:.1e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _x(value: float, maximum: float) -> float:
    return round(_LEFT + (_RIGHT - _LEFT) * value / maximum, 1)


def _y(value: float, y_ticks: Sequence[float]) -> float:
    return round(_BOTTOM - (_BOTTOM - _TOP) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]), 1)
