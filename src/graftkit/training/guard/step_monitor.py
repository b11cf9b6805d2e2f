"""The course of one run: what its watched steps show, and the curves that come of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from graftkit.modeling.bounded_wrappers import bounded_wrappers
from graftkit.modeling.unwrapping import name_in_base
from graftkit.report.chart import Curve
from graftkit.surveying.towers import tower_finder
from graftkit.training.guard.saturation import Saturation
from graftkit.training.guard.tensor_stats import Point, Watch

if TYPE_CHECKING:
    from peft import PeftModel


class Course:
    """Looks at the steps it is told to. For each: ``begin``, ``gradients``, ``end``, in this order."""

    def __init__(self, model: PeftModel, *, hooks: bool = True) -> None:
        """
        Args:
            model: what is trained.
            hooks: whether hooks may be put on the bounded wrappers; a compiled model would be compiled again.
        """
        self.model = model
        self.watch = Watch(model)
        self.points: list[Point] = []
        self.watching = False
        self._saturation = Saturation(bounded_wrappers(model) if hooks else ())
        self._tower_of: Callable[[str], str] = tower_finder(model.get_base_model())
        self._shares: list[Mapping[str, float]] = []

    def begin(self) -> None:
        """Before the step's forward pass."""
        self.watching = bool(self.watch.tensors.named)
        if self.watching:
            self.watch.begin()
            self._saturation.begin()

    def gradients(self) -> tuple[str, ...]:
        """Before the optimizer's step; returns the tensors whose gradient is not finite."""
        self._shares = [*self._shares[:1], self._saturation.end()]
        return self.watch.gradients()

    def end(self, step: int, *, learns: bool) -> tuple[str, ...]:
        """After the optimizer's step; returns the tensors that are not finite. See :meth:`Watch.end`."""
        self.watching = False
        point, nonfinite = self.watch.end(step, learns=learns)
        self.points.append(replace(point, saturation=self._by_tower(self._shares[-1])))
        return nonfinite

    def stop(self) -> None:
        """Leave the model as it is, wherever the run was."""
        self.watching = False
        self._saturation.end()

    def unclip(self, step: int, norm: float) -> None:
        """Scale the gradients of a step, seen after clipping, to what the trainer logs of them before."""
        if not self.points or self.points[-1].step != step:
            return
        last = self.points[-1]
        seen = math.hypot(*last.gradient.values())
        if seen and math.isfinite(norm):
            scaled = {tower: value * norm / seen for tower, value in last.gradient.items()}
            self.points[-1] = replace(last, gradient=scaled)

    @property
    def grown_saturation(self) -> dict[str, float]:
        """Wrapper -> by how much its clamped share has grown since the first watched step."""
        if len(self._shares) < 2:
            return {}
        first, last = self._shares
        return {path: share - first[path] for path, share in last.items() if path in first}

    def _by_tower(self, shares: Mapping[str, float]) -> dict[str, float]:
        towers: dict[str, list[float]] = {}
        for path, share in shares.items():
            towers.setdefault(self._tower_of(name_in_base(path)), []).append(share)
        return {tower: sum(found) / len(found) for tower, found in towers.items()}


def curves_of(points: Sequence[Point]) -> dict[str, tuple[Curve, ...]]:
    """Title -> a curve for each tower; figures that are not finite are left out, and so are empty curves."""
    series = {
        "Gradient norm": [(p.step, p.gradient) for p in points],
        "Update per step, relative to the weights": [(p.step, p.update) for p in points],
        "Clamped activations": [(p.step, p.saturation) for p in points],
    }
    return {title: curves for title, steps in series.items() if (curves := _curves(steps))}


def _curves(steps: Iterable[tuple[int, Mapping[str, float]]]) -> tuple[Curve, ...]:
    points: dict[str, list[tuple[int, float]]] = {}
    for step, values in steps:
        for tower, value in values.items():
            if math.isfinite(value):
                points.setdefault(tower, []).append((step, value))
    return tuple(Curve(label=tower, points=tuple(found)) for tower, found in points.items())
