"""Applies the mechanical fixes of findings to the recipe or the adapter's configuration they are about."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from graftkit.adapters.file import CONFIG_NAME, read_config
from graftkit.files import write_text
from graftkit.findings import Finding, Fix, Report
from graftkit.recipes.document import Key, read_document

# A fix may bring another rule to speak; a chain longer than this would be two rules undoing each other.
_MOST_ROUNDS = 5


def fix_all(
    check: Callable[[], Report], *, recipe: Path | None = None, adapter: Path | None = None
) -> tuple[Report, tuple[Finding, ...]]:
    """Check, apply what can be applied, and check again until nothing more can be.

    Of two fixes that want the same key the first is applied; the next round tells whether the other still stands.

    Args:
        check: reads the files anew and runs the rules.
        recipe: the recipe that fixes may change.
        adapter: the adapter's folder, whose configuration they may change.

    Returns:
        The last report, and the findings whose fixes were written.

    Raises:
        OutputError: a file cannot be written; it is then untouched.
    """
    applied: list[Finding] = []
    report = check()
    for _ in range(_MOST_ROUNDS):
        chosen = _compatible(f for f in report if _fits(f.fix, recipe, adapter) and f not in applied)
        if not chosen:
            break
        for finding in chosen:
            _apply(finding.fix, recipe, adapter)
        applied += chosen
        report = check()
    return report, tuple(applied)


def _fits(fix: Fix | None, recipe: Path | None, adapter: Path | None) -> bool:
    return fix is not None and {"recipe": recipe, "adapter": adapter}.get(fix.file) is not None


def _compatible(findings: Iterable[Finding]) -> list[Finding]:
    taken: set[tuple[str, str]] = set()
    chosen = []
    for finding in findings:
        assert finding.fix is not None
        keys = {(finding.fix.file, key) for key in (*finding.fix.sets, *finding.fix.removes)}
        if not keys & taken:
            taken |= keys
            chosen.append(finding)
    return chosen


def _apply(fix: Fix | None, recipe: Path | None, adapter: Path | None) -> None:
    assert fix is not None
    if fix.file == "recipe" and recipe is not None:
        sets: dict[Key, Any] = {tuple(key.split(".")): value for key, value in fix.sets.items()}
        read_document(recipe).write(sets, [tuple(key.split(".")) for key in fix.removes])
    elif adapter is not None:
        path = adapter / CONFIG_NAME
        fields = {**read_config(path), **fix.sets}
        for key in fix.removes:
            fields.pop(key, None)
        write_text(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")
