"""The steps of a run that the guard measures: gradients, updates and clamped activations, by tower."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from graftkit.modeling.bounded_wrappers import bounded_wrappers
from graftkit.modeling.unwrapping import name_in_base
from graftkit.surveying.towers import tower_finder
from graftkit.training.guard.saturation import Saturation
from graftkit.training.guard.step_stats import StepStats
from graftkit.training.guard.tensor_stats import TensorStats

if TYPE_CHECKING:
    from peft import PeftModel


class StepMonitor:
    """Measures single steps. For each of them call ``begin``, ``gradients`` and ``end``, in this order."""

    def __init__(self, model: PeftModel, *, hooks: bool = True) -> None:
        """
        Args:
            model: what is trained.
            hooks: whether hooks may be put on the bounded wrappers; a compiled model would be compiled again.
        """
        self.model = model
        self.tensors = TensorStats(model)
        self.steps: list[StepStats] = []
        self.active = False
        self._saturation = Saturation(bounded_wrappers(model) if hooks else ())
        self._tower_of = tower_finder(model.get_base_model())
        # Of the first monitored step and the last one.
        self._shares: list[Mapping[str, float]] = []

    def begin(self) -> None:
        """Prepare for a step, before its forward pass."""
        self.active = bool(self.tensors.trained.named)
        if self.active:
            self.tensors.begin()
            self._saturation.begin()

    def gradients(self) -> tuple[str, ...]:
        """Measure the gradients, before the optimizer's step; return the tensors whose gradient is nonfinite."""
        self._shares = [*self._shares[:1], self._saturation.end()]
        return self.tensors.gradients()

    def end(self, step: int, *, learns: bool) -> tuple[str, ...]:
        """Measure the step, after the optimizer's; return the nonfinite tensors. See :meth:`TensorStats.end`."""
        self.active = False
        stats, nonfinite = self.tensors.end(step, learns=learns)
        self.steps.append(replace(stats, saturation=self._by_tower(self._shares[-1])))
        return nonfinite

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
        """Wrapper -> by how much its clamped share has grown since the first monitored step."""
        if len(self._shares) < 2:
            return {}
        first, last = self._shares
        return {path: share - first[path] for path, share in last.items() if path in first}

    def _by_tower(self, shares: Mapping[str, float]) -> dict[str, float]:
        towers: dict[str, list[float]] = {}
        for path, share in shares.items():
            towers.setdefault(self._tower_of(name_in_base(path)), []).append(share)
        return {tower: sum(found) / len(found) for tower, found in towers.items()}
