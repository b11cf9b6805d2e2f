"""Run rules on a context. A rule without its inputs, or one that raises, becomes an "unknown" finding."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from graftkit.checks.engine.context import CheckContext, UndecidableError
from graftkit.checks.engine.rule import Observation, Rule, unknown
from graftkit.env import failed_import, is_installed
from graftkit.errors import GraftError, RecipeError
from graftkit.findings import Finding, Report, Severity
from graftkit.progress import Progress
from graftkit.recipes.settings import CheckSettings
from graftkit.text import describe, printable

_log = logging.getLogger(__name__)
_SEVERITIES = (Severity.ERROR, Severity.WARNING, Severity.INFO)


def decidable(rules: Iterable[Rule], supplied: Collection[str]) -> tuple[Rule, ...]:
    """Return the rules that need only these inputs."""
    return tuple(rule for rule in rules if set(rule.needs) <= set(supplied))


def run(
    rules: Iterable[Rule], context: CheckContext, *, on_progress: Callable[[Progress], None] | None = None
) -> Report:
    """Run the rules that the context's settings select, in order; call ``on_progress`` before each.

    Raises:
        RecipeError: ``settings``: a setting that its rule does not have, or a value of another type.
    """
    findings = []
    wanted = [rule for rule in rules if context.settings.wants(rule.code)]
    severities = {rule.code: given_severity(rule, context.settings) for rule in wanted}
    for done, rule in enumerate(wanted):
        if on_progress is not None:
            on_progress(Progress(f"{rule.code} {rule.title}", done, len(wanted)))
        findings.append(_run_one(rule, context, severities[rule.code]))
    return Report(tuple(findings))


def _run_one(rule: Rule, context: CheckContext, severity: Severity | None) -> Finding:
    started = time.perf_counter()
    seen = _observe(rule, context)
    found = replace(rule.finding(seen, severity), seconds=time.perf_counter() - started)
    return _placed(_safe_to_print(found), seen, context)


def _observe(rule: Rule, context: CheckContext) -> Observation:
    try:
        context.require(rule.needs)
        return rule.check(context)
    except UndecidableError as reason:
        return unknown(str(reason), **reason.evidence)
    except GraftError as error:  # a check's own precondition: that there is a batch, or a twin
        message = f"{error.what}: {error.why}" if error.why else error.what
        return unknown(message, help=error.help, code=error.code)
    except Exception as error:
        if os.environ.get("GRAFT_DEBUG") == "1":
            raise
        _log.debug("rule %s raised", rule.code, exc_info=True)
        return _crashed(error)


def _safe_to_print(finding: Finding) -> Finding:
    """Escape control characters: a terminal would obey those that a finding quotes from a file."""
    where = None if finding.where is None else printable(finding.where)
    advice = None if finding.help is None else printable(finding.help)
    return replace(finding, message=printable(finding.message), where=where, help=advice)


def _placed(finding: Finding, seen: Observation, context: CheckContext) -> Finding:
    """Add the recipe's file and line where a key of the recipe decides it."""
    if seen.key is None or context.given.recipe is None:
        return finding
    return replace(finding, file=str(context.recipe.path), line=context.recipe.line(seen.key))


def _crashed(error: Exception) -> Observation:
    missing = failed_import(error)
    if missing is not None and not is_installed(missing.package):
        return unknown(f"{missing.package} is not installed", help=missing.help, error=type(error).__name__)
    return unknown(
        f"the check could not finish: {describe(error)}",
        help="GRAFT_DEBUG=1 shows where it stopped",
        error=type(error).__name__,
    )


def given_severity(rule: Rule, settings: CheckSettings) -> Severity | None:
    """Return the severity that the user gives a rule, or None for the rule's own.

    Raises:
        RecipeError: ``settings``: a setting that the rule does not have, or a value of another type.
    """
    given: Mapping[str, Any] = settings.rules.get(rule.code, {})
    for name, value in given.items():
        if name != "severity":
            _check_value(rule, name, value)
    severity = given.get("severity")
    if severity is not None and severity not in _SEVERITIES:
        raise _settings_error(rule, "severity", f"{severity!r} is not one of {', '.join(_SEVERITIES)}")
    return None if severity is None else Severity(severity)


def _check_value(rule: Rule, name: str, value: Any) -> None:
    setting = rule.settings.get(name)
    if setting is None:
        known = ", ".join((*rule.settings, "severity"))
        raise _settings_error(rule, name, f"{rule.code} has no such setting; it has {known}")
    kind = type(setting.default)
    if not (type(value) is kind or (kind is float and type(value) is int)):
        raise _settings_error(rule, name, f"{value!r} is not a {kind.__name__}")


def _settings_error(rule: Rule, name: str, why: str) -> RecipeError:
    return RecipeError(
        "a rule's setting cannot be used",
        where=f"rules.{rule.code}.{name}",
        why=why,
        help=f"graft rules {rule.code}",
        code="settings",
    )
