"""What ``max_length`` takes from sequences of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graftkit.checks.rows.sequences import TokenSequence
from graftkit.recipes.row_options import RowOptions

_BINS = 24


@dataclass(frozen=True)
class Cut:
    """What is taken from rows; a row of several sequences counts with its longest one.

    Attributes:
        lengths: the tokens of each row before the cut.
        cut: how many rows lose tokens.
        nothing_left: how many rows keep no token to learn in one of their sequences.
        lost_media: how many rows lose a placeholder of an image, a video or a sound.
    """

    lengths: tuple[int, ...]
    cut: int
    nothing_left: int
    lost_media: int

    @classmethod
    def of(cls, rows: Iterable[Sequence[TokenSequence]], options: RowOptions) -> Cut:
        rows, kept = list(rows), options.kept
        return cls(
            lengths=tuple(max(map(len, row)) for row in rows),
            cut=sum(any(len(range(len(s))[kept]) < len(s) for s in row) for row in rows),
            nothing_left=sum(not all(any(s.learned[kept]) for s in row) for row in rows),
            lost_media=sum(any(sum(s.media[kept]) < sum(s.media) for s in row) for row in rows),
        )

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def length_keeping(self, share: float) -> int:
        """Return the smallest ``max_length`` that leaves this share (0 to 1) of the rows whole."""
        return sorted(self.lengths)[math.ceil(share * len(self.lengths)) - 1]

    def histogram(self) -> dict[str, int | list[int]]:
        """Return the width of a bin in tokens, and how many rows are in each; the first bin begins at 0."""
        width = _round_width(self.longest / _BINS)
        counts = [0] * (self.longest // width + 1)
        for length in self.lengths:
            counts[length // width] += 1
        return {"width": width, "counts": counts}


def _round_width(least: float) -> int:
    """Return the smallest of 1, 2, 5, 10, 20, 50 … that is no less."""
    magnitude: int = 10 ** math.floor(math.log10(max(least, 1)))
    return next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= least)
