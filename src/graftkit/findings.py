"""What a check reports: Severity, Source, Fix, Finding and Report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from graftkit._version import SCHEMA_VERSION


class Severity(StrEnum):
    """How much a finding matters, worst first. ``UNKNOWN``: the check could not decide, which is never "ok"."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    UNKNOWN = "unknown"
    OK = "ok"


class Source(StrEnum):
    """Where a finding comes from."""

    PROBE = "probe"
    INTROSPECTION = "introspection"
    FILE = "file"
    VERSIONS = "version table"


@dataclass(frozen=True)
class Fix:
    """A mechanical change to a file that fixes a finding.

    Attributes:
        file: "recipe", or "adapter" for the configuration of a saved adapter.
        sets: dotted key -> value to write.
        removes: dotted keys to drop.
    """

    file: str
    sets: Mapping[str, Any] = field(default_factory=dict)
    removes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.file, "set": dict(self.sets), "remove": list(self.removes)}

    def __str__(self) -> str:
        changes = [f"{key}: {_shown(value)}" for key, value in self.sets.items()]
        return "; ".join([*changes, *(f"no {key}" for key in self.removes)])


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        code, title: those of the rule.
        severity: ``OK`` records that the check ran and passed.
        message: what was found, in one sentence.
        where: the site, key or option; None for the whole model.
        help: the next step.
        evidence: the figures behind the message.
        url: the rule's page.
        file, line: where ``where`` is written, from line 1.
        seconds: how long the rule took, with what it was the first to compute; None where no rule was run.
    """

    code: str
    severity: Severity
    title: str
    message: str
    where: str | None = None
    help: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    source: Source = Source.PROBE
    url: str | None = None
    fix: Fix | None = None
    file: str | None = None
    line: int | None = None
    seconds: float | None = field(default=None, compare=False)

    @property
    def place(self) -> str | None:
        """``file:line`` with the key or site, or either of them."""
        file = f"{self.file}:{self.line}" if self.file and self.line else self.file
        return " ".join(part for part in (file, self.where) if part) or None

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        return f"{self.severity} {self.code} {self.title}: {self.message}{place}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields without ``seconds``: what was found is the same in every run."""
        fields = {name: value for name, value in vars(self).items() if name != "seconds"}
        return {
            **fields,
            "severity": str(self.severity),
            "source": str(self.source),
            "evidence": dict(self.evidence),
            "fix": self.fix.to_dict() if self.fix is not None else None,
        }


@dataclass(frozen=True)
class Report:
    """The findings of one run, in the order the rules ran.

    Attributes:
        seconds: step -> how long it took, for what was done before the rules: building a model, making a batch.
    """

    findings: tuple[Finding, ...]
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    @property
    def by_severity(self) -> dict[Severity, list[Finding]]:
        """Severity -> its findings, the worst severity first."""
        return {severity: [f for f in self if f.severity is severity] for severity in Severity}

    @property
    def summary(self) -> dict[str, int]:
        """Severity -> number of findings."""
        return {str(severity): len(found) for severity, found in self.by_severity.items()}

    @property
    def tally(self) -> str:
        """The summary in one line: "1 error, 2 warnings, 20 passed"."""
        counted = [f"{number} {_counted(name, number)}" for name, number in self.summary.items() if number]
        return ", ".join(counted) or "no rule was run"

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(self.by_severity[Severity.ERROR])

    @property
    def notable(self) -> list[Finding]:
        """The infos, warnings and errors, the worst last."""
        found = self.by_severity
        return [*found[Severity.INFO], *found[Severity.WARNING], *found[Severity.ERROR]]

    @property
    def proven(self) -> bool:
        """Whether every check ran and passed: no error, no warning and nothing unknown."""
        return all(f.severity in {Severity.OK, Severity.INFO} for f in self)

    def at_or_above(self, level: Severity) -> bool:
        """Check whether any finding counts at ``level``; at "unknown" all but "ok" do."""
        order = list(Severity)
        return any(order.index(f.severity) <= order.index(level) for f in self)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "findings": [finding.to_dict() for finding in self.findings],
            "summary": self.summary,
            "seconds": {**self.seconds, "rules": {f.code: f.seconds for f in self if f.seconds is not None}},
        }

    def __str__(self) -> str:
        """Return what needs attention, one line a finding and the worst last, and how many of each there are."""
        undecided = [finding.code for finding in self.by_severity[Severity.UNKNOWN]]
        unknown = [f"unknown: {', '.join(undecided)}"] if undecided else []
        return "\n".join([*unknown, *map(str, self.notable), self.tally])


def _counted(severity: str, number: int) -> str:
    if severity == Severity.OK:
        return "passed"
    return f"{severity}s" if number > 1 and severity in (Severity.ERROR, Severity.WARNING) else severity


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:97]}..."
