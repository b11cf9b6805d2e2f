"""The findings of one run as text: what needs attention, the worst last, and one line of summary."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from textwrap import fill

from graftkit.findings import Finding, Report, Severity
from graftkit.text import some

_WIDTH = 110
_INDENT = "  "
_LABEL = 7
_MOST_CODES = 6


def findings_text(report: Report, *, verbose: bool = False) -> str:
    """Return the report as text; ``verbose`` lists what passed, and every code of what is unknown."""
    passed = [f"ok {f.code} {f.title}\n{_line('', f.message)}" for f in report.by_severity[Severity.OK]]
    sections = [
        "\n".join(passed) if verbose else "",
        "\n".join(_unknown(report, verbose)),
        "\n\n".join(map(_block, report.notable)),
        _summary(report, verbose),
    ]
    return "\n\n".join(section for section in sections if section)


def _unknown(report: Report, verbose: bool) -> Iterator[str]:
    """One entry for all rules that could not decide for the same reason."""
    by_reason: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.by_severity[Severity.UNKNOWN]:
        by_reason[finding.message].append(finding)
    for reason, findings in by_reason.items():
        codes = [finding.code for finding in findings]
        if len(codes) == 1 and "missing" not in findings[0].evidence:
            yield _block(findings[0])
        else:
            yield _line("", f"unknown, {reason}: {some(codes, len(codes) if verbose else _MOST_CODES)}").strip()


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
    wrapped = [
        fill(line, _WIDTH, initial_indent=hanging, subsequent_indent=hanging, break_long_words=False)
        for line in text.splitlines() or [""]
    ]
    return "\n".join(wrapped).replace(hanging, _INDENT + label, 1)


def _summary(report: Report, verbose: bool) -> str:
    hidden = report.summary[Severity.OK] and not verbose
    fixes = sum(finding.fix is not None for finding in report)
    hints = ["-v lists what passed"] if hidden else []
    hints += [f"--fix writes {fixes} fix{'es' * (fixes > 1)}"] if fixes else []
    return "; ".join([report.tally, *hints])
