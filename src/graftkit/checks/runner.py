"""Runs rules over facts. A rule that lacks facts is unknown; a rule that raises becomes a finding."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable

from graftkit.checks.facts import Facts
from graftkit.checks.rule import Observation, Rule, unknown
from graftkit.findings import Finding, Report

_log = logging.getLogger(__name__)


def run(rules: Iterable[Rule], facts: Facts, *, progress: Callable[[Rule], None] | None = None) -> Report:
    """Run every rule over ``facts``, in order; ``progress`` is called before each."""
    findings = []
    for rule in rules:
        if progress is not None:
            progress(rule)
        findings.append(_run_one(rule, facts))
    return Report(tuple(findings))


def _run_one(rule: Rule, facts: Facts) -> Finding:
    missing = facts.missing(rule.needs)
    if missing:
        return rule.finding(unknown(f"needs {', '.join(missing)}"))
    try:
        seen = rule.check(facts)
    except Exception as error:
        if os.environ.get("GRAFT_DEBUG") == "1":
            raise
        _log.debug("rule %s raised", rule.code, exc_info=True)
        seen = _crashed(error)
    return rule.finding(seen)


def _crashed(error: Exception) -> Observation:
    first_line = str(error).strip().partition("\n")[0]
    return unknown(
        f"the check could not finish: {type(error).__name__}: {first_line}",
        help="GRAFT_DEBUG=1 shows where it stopped",
    )
