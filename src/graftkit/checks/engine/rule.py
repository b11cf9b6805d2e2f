"""A rule: its code, the inputs it needs, its check, and the text of its page."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftkit.checks.engine.site import address_of_rule
from graftkit.findings import Finding, Fix, Severity, Source

if TYPE_CHECKING:
    from graftkit.checks.engine.context import CheckContext
    from graftkit.recipes.settings import CheckSettings


@dataclass(frozen=True)
class Observation:
    """What one check returns.

    Attributes:
        verdict: None for a failure of the rule's own severity.
        message: one sentence with the figures in it.
        where: the site, tensor or option concerned.
        help: the next step; None for the rule's own.
        evidence: the figures.
        fix: a mechanical fix.
        key: dotted key of the recipe that decides it: the finding then names file and line.
    """

    verdict: Severity | None
    message: str
    where: str | None = None
    help: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    fix: Fix | None = None
    key: str | None = None


def passed(message: str, **evidence: Any) -> Observation:
    """Return that the check ran and found nothing wrong."""
    return Observation(Severity.OK, message, evidence=evidence)


def failed(
    message: str,
    *,
    where: str | None = None,
    help: str | None = None,
    fix: Fix | None = None,
    key: str | None = None,
    severity: Severity | None = None,
    **evidence: Any,
) -> Observation:
    """Return that the check failed, with the rule's severity unless another is given."""
    return Observation(severity, message, where, help, evidence, fix, key)


def info(message: str, *, where: str | None = None, help: str | None = None, **evidence: Any) -> Observation:
    """Return that the check failed in a way that does not affect what the user is doing."""
    return Observation(Severity.INFO, message, where, help, evidence)


def unknown(message: str, *, help: str | None = None, **evidence: Any) -> Observation:
    """Return that the check could not decide; the message says why."""
    return Observation(Severity.UNKNOWN, message, None, help, evidence)


# What a check that failed may be; "info" is a failure that does not affect what the user is doing.
_FAILURES = frozenset({Severity.ERROR, Severity.WARNING})


@dataclass(frozen=True)
class Setting:
    """A limit of a rule that a user may change.

    Attributes:
        default: the value unless the user sets one, which must have the same type.
        meaning: what it limits, with its unit.
    """

    default: float | int | bool | str
    meaning: str


@dataclass(frozen=True)
class Rule:
    """One rule: one file in ``checks/rules/<area>/`` that defines ``RULE`` and describes it in its docstring.

    Attributes:
        code: "GK" and three digits, unique.
        title: what must be true, as a short statement.
        severity: severity of a finding when it is not.
        needs: names of the `Inputs` it cannot do without; a missing one makes the rule "unknown".
        help: the usual next step.
        since: the first version of graftkit with the rule.
        reads: names of the `Inputs` that it also looks at where they are given.
        settings: name -> limit that ``[tool.graftkit.rules.CODE]`` and recipes may change.
        source: where its findings come from.
        doc: Markdown with the sections "Why it matters", "Example", "How safe that is" and "Sources"; None for the
            docstring of the file that defines the check.
    """

    code: str
    title: str
    severity: Severity
    needs: tuple[str, ...]
    check: Callable[[CheckContext], Observation]
    help: str
    since: str
    reads: tuple[str, ...] = ()
    settings: Mapping[str, Setting] = field(default_factory=dict)
    source: Source = Source.PROBE
    doc: str | None = None

    @cached_property
    def _sections(self) -> Mapping[str, str]:
        """Heading -> text, without line breaks in paragraphs and list items."""
        doc = self.doc or sys.modules[self.check.__module__].__doc__ or ""
        parts = re.split(r"^## (.+)$", doc, flags=re.MULTILINE)
        return {
            heading: re.sub(r"\n(?!\n|- )(?<!\n\n)\s*", " ", text.strip())
            for heading, text in zip(parts[1::2], parts[2::2], strict=True)
        }

    @property
    def why(self) -> str:
        """The harm when it is not true."""
        return self._sections.get("Why it matters", "")

    @property
    def example(self) -> str:
        """A case in which it is not true."""
        return self._sections.get("Example", "")

    @property
    def safety(self) -> str:
        """How safe the next step, or the fix, is."""
        return self._sections.get("How safe that is", "")

    @property
    def sources(self) -> tuple[str, ...]:
        """Threads and code that show it."""
        return tuple(line.removeprefix("- ") for line in self._sections.get("Sources", "").splitlines())

    @property
    def url(self) -> str:
        """The address of its page, as ``site.address_of_rule`` has it."""
        return address_of_rule(self.code)

    def limit(self, settings: CheckSettings, name: str) -> Any:
        """Return a setting of this rule: the user's value, or the rule's default."""
        return settings.rules.get(self.code, {}).get(name, self.settings[name].default)

    def finding(self, seen: Observation, severity: Severity | None = None) -> Finding:
        """Return an observation as a finding of this rule; ``severity`` replaces the rule's own for a failure."""
        verdict = (severity or self.severity) if seen.verdict is None else seen.verdict
        advice = seen.help or (self.help if verdict in _FAILURES else None)
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
