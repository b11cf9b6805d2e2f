"""What a monitored step showed, and the curves that such steps make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graftkit.report.chart import Curve


@dataclass(frozen=True)
class StepStats:
    """Figures of one optimizer step, by tower.

    Attributes:
        step: the optimizer step, from 1.
        gradient: norm of the gradient; after clipping where the trainer logs no norm.
        update: norm of the step's change, relative to the norm of the weights.
        saturation: share of the activations that bounded linears clamp, 0 to 1.
    """

    step: int
    gradient: Mapping[str, float]
    update: Mapping[str, float]
    saturation: Mapping[str, float] = field(default_factory=dict)


def curves_of(steps: Sequence[StepStats]) -> dict[str, tuple[Curve, ...]]:
    """Return title -> a curve for each tower; nonfinite values and empty curves are left out."""
    series = {
        "Gradient norm": [(s.step, s.gradient) for s in steps],
        "Update per step, relative to the weights": [(s.step, s.update) for s in steps],
        "Clamped activations": [(s.step, s.saturation) for s in steps],
    }
    return {title: curves for title, values in series.items() if (curves := _curves(values))}


def _curves(steps: Iterable[tuple[int, Mapping[str, float]]]) -> tuple[Curve, ...]:
    points: dict[str, list[tuple[int, float]]] = {}
    for step, values in steps:
        for tower, value in values.items():
            if math.isfinite(value):
                points.setdefault(tower, []).append((step, value))
    return tuple(Curve(label=tower, points=tuple(found)) for tower, found in points.items())
