"""The findings of one run as text: what needs attention, the worst last, and one line of summary."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from textwrap import fill

from graftkit.findings import Finding, Report, Severity
from graftkit.text import some, terminal_width

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
    """One entry for all rules that could not decide for the same reason; one for all that lack something."""
    lacking = _lacking(report)
    if not verbose and len({finding.message for finding in lacking}) > 1:
        yield _line("", _not_run(lacking)).strip()
    else:
        lacking = []
    by_reason: dict[str, list[Finding]] = defaultdict(list)
    for finding in report.by_severity[Severity.UNKNOWN]:
        if finding in lacking:
            continue
        by_reason[finding.message].append(finding)
    for reason, findings in by_reason.items():
        codes = [finding.code for finding in findings]
        if len(codes) == 1 and "missing" not in findings[0].evidence:
            yield _block(findings[0])
        else:
            yield _line("", f"unknown, {reason}: {some(codes, len(codes) if verbose else _MOST_CODES)}").strip()


def _lacking(report: Report) -> list[Finding]:
    """Return the findings of rules that were not given what they need."""
    return [finding for finding in report.by_severity[Severity.UNKNOWN] if "missing" in finding.evidence]


def _not_run(lacking: list[Finding]) -> str:
    """Say of rules that lack different things how many they are, and what most of them lack."""
    needs = Counter(need for finding in lacking for need in finding.evidence["missing"])
    most = [need for need, _ in needs.most_common()]
    return f"unknown: {len(lacking)} rules need what was not given: {some(most, _MOST_CODES)}"


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
        fill(line, terminal_width(), initial_indent=hanging, subsequent_indent=hanging, break_long_words=False)
        for line in text.splitlines() or [""]
    ]
    return "\n".join(wrapped).replace(hanging, _INDENT + label, 1)


def _summary(report: Report, verbose: bool) -> str:
    hidden = (report.summary[Severity.OK] or _lacking(report)) and not verbose
    fixes = sum(finding.fix is not None for finding in report)
    hints = ["-v lists them all"] if hidden else []
    hints += [f"--fix writes {fixes} fix{'es' * (fixes > 1)}"] if fixes else []
    return "; ".join([report.tally, *hints])
