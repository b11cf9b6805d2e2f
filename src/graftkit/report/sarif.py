"""The findings of one run as SARIF 2.1.0, which code hosts show beside the lines they are about.

Source: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from graftkit._version import __version__
from graftkit.checks.engine.pages import page
from graftkit.checks.engine.rule import Rule
from graftkit.checks.rules import all_rules
from graftkit.findings import Finding, Report, Severity

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
# A finding that is neither a failure nor a note has level "none"; its kind says which of the two it is.
_KINDS = {Severity.OK: "pass", Severity.UNKNOWN: "open"}


def to_sarif(report: Report) -> dict[str, Any]:
    """Return a SARIF log with one run: every rule that ran, and one result for each finding."""
    known = {rule.code: rule for rule in all_rules()}
    codes = list(dict.fromkeys(finding.code for finding in report))
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "graftkit",
                        "semanticVersion": __version__,
                        "rules": [_rule(known[code]) for code in codes],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "results": [_result(finding, codes.index(finding.code)) for finding in report],
            }
        ],
    }


def _rule(rule: Rule) -> Mapping[str, Any]:
    # A file's path is not an address that a code host could link to.
    link = {"helpUri": rule.url} if rule.url.startswith("https://") else {}
    return {
        **link,
        "id": rule.code,
        "name": rule.title,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.why},
        "help": {"text": rule.help, "markdown": page(rule)},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
    }


def _result(finding: Finding, index: int) -> dict[str, Any]:
    advice = f"\nhelp: {finding.help}" if finding.help else ""
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": index,
        "kind": _KINDS.get(finding.severity, "fail"),
        "level": _LEVELS.get(finding.severity, "none"),
        "message": {"text": finding.message + advice},
        "properties": {"severity": str(finding.severity), "source": str(finding.source)},
    }
    if location := _location(finding):
        result["locations"] = [location]
    return result


def _location(finding: Finding) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if finding.file:
        found["physicalLocation"] = {"artifactLocation": {"uri": _uri(finding.file)}}
        if finding.line:
            found["physicalLocation"]["region"] = {"startLine": finding.line}
    if finding.where:
        found["logicalLocations"] = [{"fullyQualifiedName": finding.where}]
    return found


def _uri(file: str) -> str:
    path = PurePath(file)
    if path.is_absolute():
        return path.as_uri()
    from urllib.parse import quote

    return quote(path.as_posix())
