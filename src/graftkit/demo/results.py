"""What the demo measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graftkit.demo.training import TrainingRun
from graftkit.findings import Report
from graftkit.planning.plan import Plan


@dataclass(frozen=True)
class Run:
    """One trained adapter: its plan, the checks before training, the training, and held-out accuracy, 0 to 1."""

    plan: Plan
    report: Report
    trained: TrainingRun
    accuracy: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, and where its files are.

    Attributes:
        stock_peft_error: the first line of stock PEFT's refusal.
        held_out_accuracy: run -> share of held-out digits read right, 0 to 1.
        checks: name -> verdict ("ok", "failed" or "unknown"), message and figures.
        report, adapter, merged: paths of the page, the adapter and the merged model.
        seconds: wall-clock time of the whole demo.
    """

    stock_peft_error: str
    held_out_accuracy: dict[str, float]
    checks: dict[str, dict[str, Any]]
    report: str
    adapter: str
    merged: str
    seconds: float

    @property
    def proven(self) -> bool:
        """Whether every check ran and held."""
        return all(check["verdict"] == "ok" for check in self.checks.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "stock_peft_error": self.stock_peft_error,
            "held_out_accuracy": self.held_out_accuracy,
            "checks": self.checks,
            "report": self.report,
            "adapter": self.adapter,
            "merged": self.merged,
            "seconds": round(self.seconds, 1),
        }
