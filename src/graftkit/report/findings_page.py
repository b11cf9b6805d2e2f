"""The findings of one run as the data of a report page."""

from __future__ import annotations

from graftkit.findings import Finding, Report, Severity
from graftkit.report.data import Check, ReportData, Verdict

_VERDICTS: dict[Severity, Verdict] = {
    Severity.ERROR: "failed",
    Severity.WARNING: "warning",
    Severity.INFO: "info",
    Severity.UNKNOWN: "unknown",
    Severity.OK: "ok",
}


def findings_page(report: Report, title: str, command: str) -> ReportData:
    """Return the page of a report, worst findings first."""
    return ReportData(title=title, checks=checks_of(report), command=command)


def checks_of(report: Report) -> list[Check]:
    """Return the findings as a page shows them, worst first."""
    return [_check(finding) for found in report.by_severity.values() for finding in found]


def _check(finding: Finding) -> Check:
    return {
        "code": finding.code,
        "title": finding.title,
        "verdict": _VERDICTS[finding.severity],
        "evidence": finding.message,
        "where": finding.place or "",
        "help": finding.help or "",
    }
