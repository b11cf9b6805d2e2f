"""Two stores compared: which families are new, which broke, which got well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from graftkit.matrix.cell import PROOF, Cell, Check, Verdict
from graftkit.text import table


@dataclass(frozen=True)
class Standing:
    """How far one family came with one method.

    Attributes:
        proven: whether every check of the proof was tried and holds.
        cell: the first check of the proof that does not hold; None where all that were tried do.
    """

    proven: bool
    cell: Cell | None = None

    def __str__(self) -> str:
        if self.cell is None:
            return "proven" if self.proven else "not all tried"
        codes = f" {' '.join(self.cell.codes)}" if self.cell.codes else ""
        return f"{self.cell.check} {self.cell.verdict}{codes}: {self.cell.message}"


@dataclass(frozen=True)
class Change:
    """One family and method of which the two stores differ; None where a store does not have it."""

    model_type: str
    method: str
    before: Standing | None
    after: Standing | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "method": self.method,
            "before": None if self.before is None else str(self.before),
            "after": None if self.after is None else str(self.after),
        }


@dataclass(frozen=True)
class Changes:
    """What differs between an older and a newer store, over the families and methods that the newer one has.

    Attributes:
        new: not in the older store.
        broke: proven before, and not now.
        got_well: not proven before, and now.
        other: not proven before or now, for another cause.
        cells: the checks outside the proof whose verdict differs, of families in both: (before, after).
        gone: families of the older store that the newer transformers does not know.
        versions: package -> (before, after), where they differ.
    """

    new: tuple[Change, ...]
    broke: tuple[Change, ...]
    got_well: tuple[Change, ...]
    other: tuple[Change, ...]
    cells: tuple[tuple[Cell, Cell], ...]
    gone: tuple[str, ...]
    versions: Mapping[str, tuple[str, str]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "versions": {name: list(pair) for name, pair in self.versions.items()},
            "new": [change.to_dict() for change in self.new],
            "broke": [change.to_dict() for change in self.broke],
            "got_well": [change.to_dict() for change in self.got_well],
            "other": [change.to_dict() for change in self.other],
            "cells": [{"before": before.to_dict(), "after": after.to_dict()} for before, after in self.cells],
            "gone": list(self.gone),
        }

    def __str__(self) -> str:
        changed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in self.versions.items())
        parts = [changed or "the same versions"]
        for title, changes in (
            ("new", self.new),
            ("broke", self.broke),
            ("got well", self.got_well),
            ("not proven, for another cause", self.other),
        ):
            parts.append(_section(title, changes))
        if self.cells:
            rows = [(a.model_type, a.method, a.check, a.verdict, b.verdict, b.message) for a, b in self.cells]
            columns = ("family", "method", "check", "before", "now", "what was found")
            parts.append(f"other checks: {len(self.cells)}\n\n{table(columns, rows)}")
        if self.gone:
            parts.append(f"gone: {', '.join(self.gone)}")
        return "\n\n".join(parts)


def compare(older: Iterable[Cell], newer: Iterable[Cell], *, known: Iterable[str] = ()) -> Changes:
    """Compare two stores.

    Args:
        known: the model types that the newer transformers knows; the others of the older store are gone. Empty:
            nothing is said about that.
    """
    old_cells, new_cells = {c.key: c for c in older}, {c.key: c for c in newer}
    old, new = _standings(old_cells.values()), _standings(new_cells.values())
    changes = [Change(*key, old.get(key), standing) for key, standing in sorted(new.items())]
    both = [change for change in changes if change.before is not None and change.after is not None]
    pairs = [(old_cells[key], cell) for key, cell in new_cells.items() if key in old_cells]
    still = set(known)
    return Changes(
        new=tuple(change for change in changes if change.before is None),
        broke=tuple(c for c in both if c.before and c.after and c.before.proven and not c.after.proven),
        got_well=tuple(c for c in both if c.before and c.after and c.after.proven and not c.before.proven),
        other=tuple(c for c in both if _another_cause(c)),
        cells=tuple(pair for pair in pairs if pair[1].check not in PROOF and _differ(*pair)),
        gone=tuple(sorted({cell.model_type for cell in old_cells.values()} - still)) if still else (),
        versions=_versions(old_cells.values(), new_cells.values()),
    )


def _standings(cells: Iterable[Cell]) -> dict[tuple[str, str], Standing]:
    found: dict[tuple[str, str], dict[Check, Cell]] = {}
    for cell in cells:
        found.setdefault((cell.model_type, cell.method), {})[cell.check] = cell
    return {key: _standing(of) for key, of in found.items()}


def _standing(cells: Mapping[Check, Cell]) -> Standing:
    missed = next((cells[c] for c in PROOF if c in cells and cells[c].verdict is not Verdict.PROVEN), None)
    return Standing(missed is None and set(PROOF) <= set(cells), missed)


def _another_cause(change: Change) -> bool:
    before, after = change.before, change.after
    if before is None or after is None or before.cell is None or after.cell is None:
        return False
    return (before.cell.check, before.cell.verdict, before.cell.codes) != (
        after.cell.check,
        after.cell.verdict,
        after.cell.codes,
    )


def _differ(before: Cell, after: Cell) -> bool:
    return before.verdict is not after.verdict


def _versions(older: Iterable[Cell], newer: Iterable[Cell]) -> dict[str, tuple[str, str]]:
    old, new = _said(older), _said(newer)
    return {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}


def _said(cells: Iterable[Cell]) -> dict[str, str]:
    """Return package -> the versions that the cells were made with, usually one."""
    found: dict[str, set[str]] = {}
    for cell in cells:
        for name, version in cell.versions.items():
            found.setdefault(name, set()).add(version)
    return {name: " and ".join(sorted(versions)) for name, versions in found.items()}


def _section(title: str, changes: Iterable[Change]) -> str:
    rows = [(c.model_type, c.method, c.before or "", c.after or "") for c in changes]
    if not rows:
        return f"{title}: none"
    return f"{title}: {len(rows)}\n\n{table(('family', 'method', 'before', 'now'), rows)}"
