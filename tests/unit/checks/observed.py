"""Findings that a test looks at. Each is recorded, so that conftest.py can compare it with the test's markers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from graftkit.checks.engine.context import CheckContext, Inputs
from graftkit.checks.engine.runner import run
from graftkit.checks.rules import all_rules
from graftkit.findings import Finding, Report, Severity
from graftkit.recipes.settings import CheckSettings

RULES = {rule.code: rule for rule in all_rules()}

_VERDICTS = {"rule_fails": {Severity.ERROR, Severity.WARNING}, "rule_passes": {Severity.OK}}

# Of the test that is running; emptied before each.
OBSERVED: list[Finding] = []


def seen(code: str, settings: CheckSettings | None = None, **given: Any) -> Finding:
    """Return the finding of one rule on these inputs."""
    return checked([code], settings, **given).findings[0]


def checked(codes: Iterable[str], settings: CheckSettings | None = None, **given: Any) -> Report:
    """Run rules, by code, on these inputs."""
    report = run([RULES[code] for code in codes], CheckContext(Inputs(**given), settings or CheckSettings()))
    OBSERVED.extend(report)
    return report


def finding(report: Report, code: str) -> Finding:
    """Return the finding of one rule in a report."""
    found = next(f for f in report if f.code == code)
    OBSERVED.append(found)
    return found


def by_code(report: Report) -> dict[str, Finding]:
    """Return the findings of a report by the code of their rule."""
    OBSERVED.extend(report)
    return {found.code: found for found in report}


def not_observed(markers: Iterable[pytest.Mark]) -> list[str]:
    """Return the verdicts that markers promise and the test did not see."""
    promised = [(marker.name, code) for marker in markers if marker.name in _VERDICTS for code in marker.args]
    verdicts = {(found.code, found.severity) for found in OBSERVED}
    return [f"{name}({code})" for name, code in promised if not verdicts & {(code, s) for s in _VERDICTS[name]}]


def edit(folder: Path, **fields: Any) -> None:
    """Set fields of the adapter configuration in ``folder``."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
