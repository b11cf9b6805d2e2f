"""The steps of a run that the guard measures: gradients, updates and clamped activations, and their curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from graftkit.modeling.bounded_wrappers import bounded_wrappers
from graftkit.modeling.unwrapping import name_in_base
from graftkit.report.chart import Curve
from graftkit.surveying.towers.find import tower_finder
from graftkit.training.guard.saturation import Saturation
from graftkit.training.guard.tensor_stats import TensorActivity, TensorStats, changes_since, nonfinite, sample

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


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


class StepMonitor:
    """Measures single steps; between them it costs nothing.

    For each of these steps call ``begin``, ``gradients`` and ``end``, in this order.
    """

    def __init__(self, model: PeftModel, *, hooks: bool = True) -> None:
        """
        Args:
            model: what is trained.
            hooks: whether hooks may be put on the bounded wrappers; a compiled model would be compiled again.
        """
        self.model = model
        self.tensors = TensorStats.of(model)
        start = self.tensors.norms(self.tensors.named)
        zero = frozenset(name for name, norm in start.items() if not norm)
        self.activity = TensorActivity(tuple(self.tensors.named), zero)
        self.steps: list[StepStats] = []
        self.active = False
        self._tower_of = tower_finder(model.get_base_model())
        self._saturation = Saturation(bounded_wrappers(model) if hooks else ())
        # Of the first measured step and the last one.
        self._shares: list[Mapping[str, float]] = []
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, float] = {}

    def begin(self) -> None:
        """Prepare for a step, before its forward pass."""
        self.active = bool(self.tensors.named)
        if self.active:
            self._before = sample(self.tensors.named)
            self._saturation.begin()

    def gradients(self) -> tuple[str, ...]:
        """Measure the gradients, before the optimizer's step; return the tensors whose gradient is nonfinite."""
        self._shares = [*self._shares[:1], self._saturation.end()]
        self._gradients = self.tensors.norms({name: p.grad for name, p in self.tensors.named.items()})
        return nonfinite(self._gradients)

    def end(self, step: int, *, learns: bool) -> tuple[str, ...]:
        """Measure the step, after the optimizer's; return the nonfinite tensors.

        Args:
            step: the optimizer step, from 1.
            learns: whether the learning rate was above zero.
        """
        weights = self.tensors.norms(self.tensors.named)
        changes = self.tensors.norms(changes_since(self._before, self.tensors.named))
        self.active, self._before = False, {}
        if learns:
            self.activity.record(self._gradients, weights, changes)
        sizes, changed = self.tensors.by_tower(weights), self.tensors.by_tower(changes)
        update = {tower: changed[tower] / size for tower, size in sizes.items() if size and tower in changed}
        gradient, saturation = self.tensors.by_tower(self._gradients), self._by_tower(self._shares[-1])
        self.steps.append(StepStats(step, gradient, update, saturation))
        return nonfinite(weights)

    def stop(self) -> None:
        """Remove all hooks, wherever the run was."""
        self.active = False
        self._saturation.end()

    def unclip(self, step: int, norm: float) -> None:
        """Scale a step's gradients, measured after clipping, to the norm that the trainer logs from before it."""
        if not self.steps or self.steps[-1].step != step:
            return
        last = self.steps[-1]
        clipped = math.hypot(*last.gradient.values())
        if clipped and math.isfinite(norm):
            scaled = {tower: value * norm / clipped for tower, value in last.gradient.items()}
            self.steps[-1] = replace(last, gradient=scaled)

    @property
    def grown_saturation(self) -> dict[str, float]:
        """Wrapper -> by how much its clamped share has grown since the first measured step."""
        if len(self._shares) < 2:
            return {}
        first, last = self._shares
        return {path: share - first[path] for path, share in last.items() if path in first}

    def _by_tower(self, shares: Mapping[str, float]) -> dict[str, float]:
        towers: dict[str, list[float]] = {}
        for path, share in shares.items():
            towers.setdefault(self._tower_of(name_in_base(path)), []).append(share)
        return {tower: sum(found) / len(found) for tower, found in towers.items()}


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
