"""The result of a merge, for people and for ``merge_report.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftkit._version import SCHEMA_VERSION, __version__
from graftkit.merging.plan import MergePlan
from graftkit.merging.verify import Evidence
from graftkit.text import size


@dataclass(frozen=True)
class MergeReport:
    """A completed merge.

    Attributes:
        out: the merged checkpoint.
        tied: the choice for tied weights, or None.
        seconds: the duration.
        resumed: files that an earlier, interrupted run had finished.
        evidence: what the verification found; None where it was switched off.
    """

    plan: MergePlan = field(repr=False)
    out: Path
    tied: str | None
    seconds: float
    resumed: tuple[str, ...]
    evidence: Evidence | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "graftkit": __version__,
            "out": str(self.out),
            **self.plan.to_dict(),
            "tied": self.tied,
            "seconds": round(self.seconds, 3),
            "resumed": list(self.resumed),
            "verification": None if self.evidence is None else self.evidence.to_dict(),
        }

    def __str__(self) -> str:
        plan = self.plan.to_dict()
        rate = size(int(self.plan.bytes / self.seconds)) if self.seconds else "?"
        lines = [
            f"merged {len(self.plan.adapters)} adapter{'s' * (len(self.plan.adapters) > 1)} into {self.out}",
            f"{plan['changed']} of {plan['tensors']} tensors changed; {size(self.plan.bytes)} in "
            f"{self.seconds:.1f} s, {rate}/s",
        ]
        if self.resumed:
            lines.append(f"{len(self.resumed)} files were reused from an interrupted run")
        if plan["missing_buffers"]:
            lines.append(
                f"{plan['missing_buffers']} buffers of the class are neither in the base's files nor in these"
            )
        lines.append("not verified" if self.evidence is None else str(self.evidence))
        return "\n".join(lines)
