"""Apply the fixes of findings to the recipe or the adapter's configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from graftkit.adapters.file import CONFIG_NAME, read_config
from graftkit.files import write_text
from graftkit.findings import Finding, Fix, Report
from graftkit.recipes.document import Key, read_document

# One fix may reveal another finding; a longer chain would be two rules undoing each other.
_MOST_ROUNDS = 5


def fix_all(
    check: Callable[[], Report], *, recipe: Path | None = None, adapter: Path | None = None
) -> tuple[Report, tuple[Finding, ...]]:
    """Check, apply the fixes, and check again until there is nothing more to apply.

    Of two fixes of the same key the first is applied; the next round shows whether the other is still needed.

    Args:
        check: reads the files and runs the rules.
        recipe: the recipe that may be changed.
        adapter: the adapter's folder, whose configuration may be changed.

    Returns:
        The last report, and the findings whose fixes were written.

    Raises:
        OutputError: a file cannot be written; it is then unchanged.
    """
    files = {name: path for name, path in (("recipe", recipe), ("adapter", adapter)) if path is not None}
    applied: list[Finding] = []
    report = check()
    for _ in range(_MOST_ROUNDS):
        chosen = _compatible(f for f in report if f.fix is not None and f.fix.file in files and f not in applied)
        if not chosen:
            break
        for finding, fix in chosen:
            _WRITERS[fix.file](files[fix.file], fix)
            applied.append(finding)
        report = check()
    return report, tuple(applied)


def _compatible(findings: Iterable[Finding]) -> list[tuple[Finding, Fix]]:
    """Return findings and fixes that change different keys."""
    taken: set[tuple[str, str]] = set()
    chosen = []
    for finding in findings:
        fix = finding.fix
        keys = {(fix.file, key) for key in (*fix.sets, *fix.removes)} if fix is not None else set()
        if fix is not None and not keys & taken:
            taken |= keys
            chosen.append((finding, fix))
    return chosen


def _write_recipe(path: Path, fix: Fix) -> None:
    sets: dict[Key, Any] = {tuple(key.split(".")): value for key, value in fix.sets.items()}
    read_document(path).write(sets, [tuple(key.split(".")) for key in fix.removes])


def _write_adapter(folder: Path, fix: Fix) -> None:
    path = folder / CONFIG_NAME
    fields = {**read_config(path), **fix.sets}
    for key in fix.removes:
        fields.pop(key, None)
    write_text(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")


_WRITERS = {"recipe": _write_recipe, "adapter": _write_adapter}
