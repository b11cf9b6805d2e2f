"""The findings of one run as GitHub's workflow commands, which annotate a pull request.

Source: https://docs.github.com/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

from graftkit.findings import Finding, Report, Severity

_COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def to_annotations(report: Report) -> str:
    """Return one command for each error, warning and info, and one notice for all that is unknown."""
    lines = [_annotation(finding) for finding in report if finding.severity in _COMMANDS]
    unknown = [finding.code for finding in report.by_severity[Severity.UNKNOWN]]
    if unknown:
        lines.append(f"::notice title=graftkit::not decided: {', '.join(unknown)}")
    return "\n".join(lines)


def _annotation(finding: Finding) -> str:
    place = {"file": finding.file, "line": finding.line, "title": f"{finding.code} {finding.title}"}
    given = ",".join(f"{name}={_property(str(value))}" for name, value in place.items() if value is not None)
    where = f"{finding.where}: " if finding.where else ""
    advice = f"\nhelp: {finding.help}" if finding.help else ""
    return f"::{_COMMANDS[finding.severity]} {given}::{_data(where + finding.message + advice)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
