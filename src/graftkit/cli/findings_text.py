"""The findings of one run as text: what is wrong first, what could not be decided next, what held last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from textwrap import fill

from graftkit.findings import Finding, Report, Severity

_WIDTH = 110
_INDENT = "  "
_LABEL = 7


def findings_text(report: Report) -> str:
    """The report, worst first, each finding with its place, its figures and the next step."""
    parts = [_block(f) for severity in _TOLD for f in report if f.severity is severity and not _missing(f)]
    lacking = _lacking(report)
    held = [f"ok {f.code} {f.title}\n{_line('', f.message)}" for f in report if f.severity is Severity.OK]
    sections = ["\n\n".join(parts), "\n".join(lacking), "\n".join(held), _tally(report)]
    return "\n\n".join(section for section in sections if section)


_TOLD = (Severity.ERROR, Severity.WARNING, Severity.INFO, Severity.UNKNOWN)


def _block(finding: Finding) -> str:
    lines = [f"{finding.severity} {finding.code} {finding.title}"]
    lines += [_line(name, text) for name, text in _details(finding) if text]
    return "\n".join(lines)


def _details(finding: Finding) -> Iterator[tuple[str, str | None]]:
    yield "where", finding.place
    yield "seen", finding.message
    yield "help", finding.help
    yield "fix", str(finding.fix) if finding.fix else None
    if finding.severity is not Severity.UNKNOWN:
        yield "page", f"graft rules {finding.code}"


def _line(name: str, text: str) -> str:
    label = f"{name}:".ljust(_LABEL) if name else ""
    hanging = _INDENT + " " * len(label)
    lines = text.splitlines() or [""]
    wrapped = [
        fill(line, _WIDTH, initial_indent=hanging, subsequent_indent=hanging, break_long_words=False)
        for line in lines
    ]
    return "\n".join(wrapped).replace(hanging, _INDENT + label, 1)


def _missing(finding: Finding) -> tuple[str, ...]:
    return tuple(finding.evidence.get("missing", ())) if finding.severity is Severity.UNKNOWN else ()


def _lacking(findings: Iterable[Finding]) -> list[str]:
    """One line for all rules that lack the same facts."""
    codes: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for finding in findings:
        if missing := _missing(finding):
            codes[missing].append(finding.code)
    return [_line("", f"unknown, needs {', '.join(m)}: {', '.join(c)}").strip() for m, c in codes.items()]


def _tally(report: Report) -> str:
    if not len(report):
        return "no rule was run"
    counted = [f"{number} {name}" for name, number in report.summary.items() if number]
    fixable = sum(f.fix is not None for f in report)
    return ", ".join(counted) + (f"; --fix mends {fixable}" if fixable else "")
