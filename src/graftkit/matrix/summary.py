"""What the cells of a store come to: families proven by method, and verdicts by check."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from graftkit.matrix.cell import PROOF, Cell, Check, Verdict
from graftkit.text import and_more, table

_SHOWN = 40


@dataclass(frozen=True)
class Summary:
    """The cells that were asked for, and what they come to."""

    cells: tuple[Cell, ...]

    @property
    def failed(self) -> tuple[Cell, ...]:
        """The cells that failed."""
        return tuple(cell for cell in self.cells if cell.verdict is Verdict.FAILED)

    @property
    def families(self) -> tuple[str, ...]:
        """The model types, sorted."""
        return tuple(sorted({cell.model_type for cell in self.cells}))

    @property
    def proven(self) -> dict[str, tuple[str, ...]]:
        """Method -> the families of which every check of the proof was tried and holds."""
        held: dict[tuple[str, str], set[Check]] = defaultdict(set)
        for cell in self.cells:
            if cell.verdict is Verdict.PROVEN:
                held[cell.method, cell.model_type].add(cell.check)
        whole = sorted(key for key, checks in held.items() if checks >= set(PROOF))
        return {method: tuple(family for of, family in whole if of == method) for method in self.methods}

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in the order of their first cell."""
        return tuple(dict.fromkeys(cell.method for cell in self.cells))

    def verdicts(self, method: str) -> dict[Check, Counter[Verdict]]:
        """Return check -> how many families came to each verdict with this method."""
        counted: dict[Check, Counter[Verdict]] = {check: Counter() for check in Check}
        for cell in self.cells:
            if cell.method == method:
                counted[cell.check][cell.verdict] += 1
        return {check: verdicts for check, verdicts in counted.items() if verdicts}

    def to_dict(self) -> dict[str, Any]:
        return {
            "families": len(self.families),
            "methods": [
                {
                    "method": method,
                    "proven": len(self.proven[method]),
                    "checks": {
                        str(check): {str(verdict): counts[verdict] for verdict in Verdict}
                        for check, counts in self.verdicts(method).items()
                    },
                }
                for method in self.methods
            ],
            "cells": [cell.to_dict() for cell in self.cells],
        }

    def __str__(self) -> str:
        if not self.cells:
            return "no cell"
        parts = [_by_check(self, self.methods[0])] if len(self.methods) == 1 else [_by_method(self)]
        listed = list(self.cells) if len(self.cells) <= _SHOWN else list(self.failed)
        if listed:
            shown = listed[:_SHOWN]
            rows = [(c.model_type, c.method, c.check, c.verdict, " ".join(c.codes), c.message) for c in shown]
            parts.append(table(("family", "method", "check", "verdict", "code", "what was found"), rows))
            if more := and_more(listed, _SHOWN):
                parts.append(f"{more.strip()} that failed: --json has all")
        return "\n\n".join(parts)


def _by_check(summary: Summary, method: str) -> str:
    verdicts = summary.verdicts(method)
    rows = [(check, *(counts[verdict] or "" for verdict in _best_first())) for check, counts in verdicts.items()]
    head = f"{method}: {len(summary.proven[method])} of {len(summary.families)} families proven"
    return f"{head}\n\n{_table('check', rows)}"


def _by_method(summary: Summary) -> str:
    rows = []
    for method in summary.methods:
        total: Counter[Verdict] = sum(summary.verdicts(method).values(), Counter())
        rows.append((method, len(summary.proven[method]), *(total[verdict] or "" for verdict in _best_first())))
    return _table("method", rows, ">families proven")


def _table(first: str, rows: Iterable[tuple[object, ...]], *more: str) -> str:
    return table((first, *more, *(f">{verdict}" for verdict in _best_first())), rows)


def _best_first() -> tuple[Verdict, ...]:
    return tuple(reversed(Verdict))
