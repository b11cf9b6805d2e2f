"""The result of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftkit.findings import Report
from graftkit.planning.plan import Plan

REPORT_NAME = "report.html"


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.

    Attributes:
        folder: holds the adapter, the processor and the report.
        trainer: "sft", "dpo" or "grpo".
        steps: optimizer steps in all, those before a resume included.
        history: what the trainer logged, one mapping an entry, with its ``step``.
        metrics: of the last evaluation, empty without held-out data.
        findings: of the guard, and of the saved adapter.
        seconds: of this run, loading included.
        plan: None for a stock PEFT configuration.
        interrupted: whether Ctrl-C ended it; a checkpoint was then saved.
    """

    folder: Path
    trainer: str
    steps: int
    history: tuple[Mapping[str, Any], ...] = field(repr=False)
    metrics: Mapping[str, float]
    findings: Report
    seconds: float
    plan: Plan | None = field(repr=False)
    interrupted: bool = False

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.folder / REPORT_NAME

    def curve(self, name: str) -> tuple[tuple[int, float], ...]:
        """Return (step, value) of everything logged as ``name``: "loss", "eval_loss", "rewards/margins" …"""
        return tuple((int(entry["step"]), float(entry[name])) for entry in self.history if name in entry)

    def to_dict(self) -> dict[str, Any]:
        losses = self.curve("loss")
        return {
            "folder": str(self.folder),
            "trainer": self.trainer,
            "steps": self.steps,
            "loss": {"first": losses[0][1], "last": losses[-1][1]} if losses else None,
            "metrics": dict(self.metrics),
            "history": [dict(entry) for entry in self.history],
            "trainable_params": self.plan.trainable_params if self.plan else None,
            "seconds": round(self.seconds, 1),
            "interrupted": self.interrupted,
            "report": str(self.report),
            **self.findings.to_dict(),
        }

    def __str__(self) -> str:
        losses = self.curve("loss")
        change = f", loss {losses[0][1]:.3f} -> {losses[-1][1]:.3f}" if losses else ""
        lines = [f"{self.trainer}: {self.steps} steps in {self.seconds:.0f} s{change}"]
        lines += [f"{name}: {value:.4g}" for name, value in self.metrics.items()]
        lines += ["interrupted: graft train --resume continues from the last checkpoint"] * self.interrupted
        lines += [f"adapter: {self.folder}", f"report: {self.report}"]
        return "\n".join(lines) + f"\n\n{self.findings}"
