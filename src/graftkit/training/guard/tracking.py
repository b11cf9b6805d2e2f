"""The guard's figures in the trackers that the trainer reports to, beside the trainer's own.

A trainer's trackers see what it logs before a callback of the user does, so each is written to directly: the run
that the trainer's own callback has started, at the trainer's step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftkit.training.guard.step_monitor import StepStats

PREFIX = "graftkit"
# Under which name transformers logs the step that W&B and trackio draw a run over.
_STEP = "train/global_step"
# As transformers.integrations.TensorBoardCallback reads it, and where it writes without it.
_TENSORBOARD_FOLDER, _RUNS = "TENSORBOARD_LOGGING_DIR", "runs"


def figures(step: StepStats) -> dict[str, float]:
    """Return name -> value: ``graftkit/gradient_norm/language`` and so on; nonfinite values are left out."""
    groups: Mapping[str, Mapping[str, float]] = {
        "gradient_norm": step.gradient,
        "relative_update": step.update,
        "clamped_share": step.saturation,
    }
    return {
        f"{PREFIX}/{group}/{tower}": value
        for group, values in groups.items()
        for tower, value in values.items()
        if math.isfinite(value)
    }


class Trackers:
    """The trackers of one run that figures are written to: TensorBoard, W&B and trackio."""

    def __init__(self, report_to: list[str], output_dir: str) -> None:
        """
        Args:
            report_to: names of trackers, as ``TrainingArguments`` has them; others are passed over.
            output_dir: of the run, where TensorBoard's folder is without a variable that names another.
        """
        self._names = frozenset(report_to)
        self._output_dir = Path(output_dir)
        self._written = 0
        self._writer: Any = None

    def write(self, steps: Sequence[StepStats]) -> None:
        """Write the figures of those steps of the run that are new since the last call."""
        for step in steps[self._written :]:
            self._write(figures(step), step.step)
        self._written = len(steps)

    def _write(self, found: Mapping[str, float], step: int) -> None:
        if "tensorboard" in self._names:
            self._to_tensorboard(found, step)
        if "wandb" in self._names:
            _to_wandb(found, step)
        if "trackio" in self._names:
            _to_trackio(found, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _to_tensorboard(self, found: Mapping[str, float], step: int) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._tensorboard_folder())
        for name, value in found.items():
            self._writer.add_scalar(name, value, step)

    def _tensorboard_folder(self) -> str:
        """Return the folder of the trainer's own events: a second file in it belongs to the same run."""
        named = os.environ.get(_TENSORBOARD_FOLDER)
        if named:
            return str(Path(named).expanduser())
        runs = self._output_dir / _RUNS
        newest = max(runs.glob("*/"), key=lambda folder: folder.stat().st_mtime, default=runs / PREFIX)
        return str(newest)


def _to_wandb(found: Mapping[str, float], step: int) -> None:
    import wandb

    if wandb.run is not None:
        wandb.run.log({**found, _STEP: step})


def _to_trackio(found: Mapping[str, float], step: int) -> None:
    import trackio

    trackio.log({**found, _STEP: step})
