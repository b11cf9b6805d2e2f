"""Ratios of turns: their spread, and whether one got worse than the one that was kept."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from .contest import Figure, Row, Turn


class Verdict(Enum):
    """How a ratio compares with the one that was kept for the same row and size."""

    NEW = "new"
    SAME = "same"
    BETTER = "better"
    WORSE = "worse"


@dataclass(frozen=True)
class Spread:
    """The least, middle and greatest of several values."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(min(values), statistics.median(values), max(values))

    @property
    def width(self) -> float:
        return self.max - self.min


def ratios(turns: Sequence[Turn], row: Row) -> Spread:
    """Return graftkit's figure divided by the peer's, turn by turn.

    Both sides of a turn follow each other, so that a machine that gets slower meanwhile slows both.

    Raises:
        ValueError: a figure is not a number, or a peer's is not greater than zero.
    """
    return Spread.of([_ratio(turn[row.ours][row.figure], turn[row.peer][row.figure], row) for turn in turns])


def _ratio(ours: float, peer: float, row: Row) -> float:
    if not (math.isfinite(ours) and math.isfinite(peer) and peer > 0):
        raise ValueError(f"{row.what} against {row.peer}: no ratio of {ours} to {peer}")
    return ours / peer


def middle(turns: Sequence[Turn], side: str, figure: Figure) -> float:
    """Return the median of one side's figure."""
    return statistics.median(turn[side][figure] for turn in turns)


def misses(ratio: Spread, aim: float | None, figure: Figure) -> bool:
    """Say whether the median is on the wrong side of the aim."""
    if aim is None:
        return False
    return ratio.median < aim if figure.more_is_better else ratio.median > aim


def compared(now: Spread, kept: Spread | None, figure: Figure) -> Verdict:
    """Compare the medians; what lies within the wider of both spreads is no change."""
    if kept is None:
        return Verdict.NEW
    grown = now.median - kept.median
    if abs(grown) <= max(now.width, kept.width):
        return Verdict.SAME
    return Verdict.BETTER if (grown > 0) is figure.more_is_better else Verdict.WORSE
