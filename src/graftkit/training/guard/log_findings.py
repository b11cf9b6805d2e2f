"""Findings, told while a run goes on: on the log and on stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from graftkit.findings import Finding, Severity

_log = logging.getLogger(__name__)
_LEVELS = {Severity.ERROR: logging.ERROR, Severity.WARNING: logging.WARNING, Severity.INFO: logging.INFO}


def tell(findings: Iterable[Finding]) -> None:
    """Errors, warnings and notes, one line each. What held, and what could not be decided, is for the report."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    for finding in findings:
        if (level := _LEVELS.get(finding.severity)) is None:
            continue
        line = str(finding)
        console.print(Text(line), soft_wrap=True)
        if _log.hasHandlers():  # without any, Python itself would print it a second time
            _log.log(level, "%s", line)
