"""Findings of a run that goes on, written to the log and to stderr."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from graftkit.findings import Finding, Severity

_log = logging.getLogger(__name__)
_LEVELS = {Severity.ERROR: logging.ERROR, Severity.WARNING: logging.WARNING, Severity.INFO: logging.INFO}


def log_findings(findings: Iterable[Finding]) -> None:
    """Write errors, warnings and infos, one line each; all else is left to the report."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    for finding in findings:
        if (level := _LEVELS.get(finding.severity)) is None:
            continue
        line = str(finding)
        console.print(Text(line), soft_wrap=True)
        if _log.hasHandlers():  # without any, logging's last resort would print it a second time
            _log.log(level, "%s", line)
