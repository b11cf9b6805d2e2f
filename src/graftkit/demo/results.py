"""What the demo measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftkit.findings import Report, Severity
from graftkit.planning.plan import Plan
from graftkit.training.result import TrainingResult

if TYPE_CHECKING:
    from peft import PeftModel

_VERDICTS = {
    Severity.OK: "ok",
    Severity.INFO: "ok",
    Severity.UNKNOWN: "unknown",
    Severity.WARNING: "failed",
    Severity.ERROR: "failed",
}


@dataclass(frozen=True)
class TrainedAdapter:
    """One trained adapter.

    Attributes:
        plan: what was adapted.
        training: what the run did.
        model: the trained model, in eval mode.
        accuracy: the share of held-out digits read right, 0 to 1.
    """

    plan: Plan
    training: TrainingResult
    model: PeftModel
    accuracy: float

    @property
    def name(self) -> str:
        """The adapted towers, for a key."""
        return "_".join(self.plan.scope)

    @property
    def label(self) -> str:
        """The adapted towers, for people."""
        return " + ".join(self.plan.scope)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured, and where its files are.

    Attributes:
        stock_peft_error: the first line of stock PEFT's refusal.
        held_out_accuracy: run -> share of held-out digits read right, 0 to 1.
        checks: the contract before training, and the comparisons after it.
        report, adapter, merged: paths of the page, the adapter and the merged model.
        seconds: wall-clock time of the demo.
    """

    stock_peft_error: str
    held_out_accuracy: dict[str, float]
    checks: Report
    report: str
    adapter: str
    merged: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "checks": {
                finding.code: {
                    "title": finding.title,
                    "verdict": _VERDICTS[finding.severity],
                    "message": finding.message,
                    **finding.evidence,
                }
                for finding in self.checks
            },
            "seconds": round(self.seconds, 1),
        }
