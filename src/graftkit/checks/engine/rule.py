"""What a rule is: a code, what it needs, a check, and the page that explains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graftkit.findings import Finding, Fix, Severity, Source

if TYPE_CHECKING:
    from graftkit.checks.engine.context import CheckContext
    from graftkit.recipes.settings import CheckSettings

# Relative to the repository: the pages are generated from the rules by checks/pages.py.
PAGES = "docs/rules"


@dataclass(frozen=True)
class Observation:
    """What one check saw.

    Attributes:
        verdict: ``Severity.OK``, ``Severity.UNKNOWN``, or None for "it failed, as severe as the rule says".
        message: one sentence with the figures in it.
        where: the site, tensor or option concerned.
        help: the next step, where it depends on what was seen.
        evidence: the figures.
        fix: a mechanical fix, where there is one.
        key: the recipe's key that decides it, dotted: the finding then names file and line.
    """

    verdict: Severity | None
    message: str
    where: str | None = None
    help: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    fix: Fix | None = None
    key: str | None = None


def passed(message: str, **evidence: Any) -> Observation:
    """The check ran and its fact holds."""
    return Observation(Severity.OK, message, evidence=evidence)


def failed(
    message: str,
    *,
    where: str | None = None,
    help: str | None = None,
    fix: Fix | None = None,
    key: str | None = None,
    **evidence: Any,
) -> Observation:
    """The check ran and its fact does not hold."""
    return Observation(None, message, where, help, evidence, fix, key)


def info(message: str, *, where: str | None = None, help: str | None = None, **evidence: Any) -> Observation:
    """The fact does not hold, and what the user does now is not touched by it: worth knowing, no more."""
    return Observation(Severity.INFO, message, where, help, evidence)


def unknown(message: str, *, help: str | None = None, **evidence: Any) -> Observation:
    """The fact could not be established; the message says why."""
    return Observation(Severity.UNKNOWN, message, None, help, evidence)


@dataclass(frozen=True)
class Setting:
    """A limit of a rule that a user may change.

    Attributes:
        default: its value, of the type that every value must have.
        meaning: what it limits, with its unit.
    """

    default: float | int | bool | str
    meaning: str


@dataclass(frozen=True)
class Rule:
    """One rule: one file in ``checks/rules/<area>/`` that defines ``RULE``.

    Attributes:
        code: unique, "GK" and three digits.
        title: the fact that must hold, as a short statement.
        severity: of a finding when it does not.
        needs: the names of the facts it reads; a missing one makes the rule "unknown".
        check: reads the facts, returns what it saw.
        why: why it is bad when the fact does not hold.
        example: a case in which it does not.
        help: the usual next step, or the fix.
        safety: how safe that fix is.
        since: the version of graftkit that brought the rule.
        sources: where the fact is known from: threads, code.
        settings: its limits, by name, that ``[tool.graftkit.rules.CODE]`` and recipes may change.
        source: where its findings come from.
    """

    code: str
    title: str
    severity: Severity
    needs: tuple[str, ...]
    check: Callable[[CheckContext], Observation]
    why: str
    example: str
    help: str
    safety: str
    since: str
    sources: tuple[str, ...]
    settings: Mapping[str, Setting] = field(default_factory=dict)
    source: Source = Source.PROBE

    @property
    def url(self) -> str:
        """Where its page is."""
        return f"{PAGES}/{self.code}.md"

    def limit(self, settings: CheckSettings, name: str) -> Any:
        """Return a setting of this rule: the user's value, or the rule's default."""
        return settings.rules.get(self.code, {}).get(name, self.settings[name].default)

    def finding(self, seen: Observation, severity: Severity | None = None) -> Finding:
        """What was seen, as a finding of this rule; ``severity`` replaces the rule's own where it failed."""
        verdict = (severity or self.severity) if seen.verdict is None else seen.verdict
        advice = seen.help or (self.help if seen.verdict is None else None)
        return Finding(
            code=self.code,
            severity=verdict,
            title=self.title,
            message=seen.message,
            where=seen.where or seen.key,
            help=advice,
            evidence=seen.evidence,
            source=self.source,
            url=self.url,
            fix=seen.fix,
        )
