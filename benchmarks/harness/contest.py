"""What a benchmark yields: sides that take turns, and the rows that compare two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class Size(Enum):
    """How large the inputs of a run are: those of the table that is kept, or as small as they can be."""

    QUICK = "quick"
    FULL = "full"


class Device(Enum):
    """Where models are trained."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True)
class Setting:
    """What was asked for on the command line.

    Args:
        size: which sizes.
        device: what the benchmarks of training run on.
        folder: where large files are written; None for the system's temporary folder.
    """

    size: Size = Size.FULL
    device: Device = Device.CPU
    folder: Path | None = None

    def of(self, *, quick: T, full: T) -> T:
        """Return the value for this size."""
        return quick if self.size is Size.QUICK else full


class Figure(Enum):
    """A quantity that is compared, with its unit and the factor from the value that is kept to that unit."""

    SECONDS = ("seconds", "s", 1.0)
    CPU = ("cpu_seconds", "CPU s", 1.0)
    PEAK = ("peak_bytes", "MB", 1e-6)
    RATE = ("steps_per_second", "steps/s", 1.0)
    WRONG = ("wrong_share", "ppm", 1e6)

    def __init__(self, key: str, unit: str, scale: float) -> None:
        self.key = key
        self.unit = unit
        self.scale = scale

    @property
    def more_is_better(self) -> bool:
        return self is Figure.RATE

    def text(self, value: float) -> str:
        """Return a value with its unit, in three digits."""
        scaled = value * self.scale
        digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
        return f"{scaled:.{digits}f} {self.unit}"


Figures = Mapping[Figure, float]
# Side -> its figures, of one turn.
Turn = Mapping[str, Figures]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        what: what graftkit does, in a few words.
        peer: the side it is compared with.
        figure: what is compared.
        aim: the most that the ratio should be, or the least where more is better; None where none was set.
        ours: the side that is graftkit's.
    """

    what: str
    peer: str
    figure: Figure
    aim: float | None = None
    ours: str = "graftkit"


@dataclass(frozen=True)
class Contest:
    """Sides that take turns, and what is compared.

    Args:
        size: what was worked on, in words with figures: "3.8 GB", "6 layers, 60 steps".
        rows: what is compared.
        turns: yields as many turns as it is asked for.
    """

    size: str
    rows: tuple[Row, ...]
    turns: Callable[[int], Iterator[Turn]]


@dataclass(frozen=True)
class Gap:
    """Rows that cannot be measured here, and why.

    Args:
        size: as of a contest.
        rows: what would be compared.
        why: what is missing, in a few words.
    """

    size: str
    rows: tuple[Row, ...]
    why: str


def in_turns(
    sides: Mapping[str, Callable[[], Figures]], *, warmups: int = 1, after: Callable[[], object] | None = None
) -> Callable[[int], Iterator[Turn]]:
    """Return a function that runs each side once a turn, in the order given.

    Args:
        sides: name -> a function that does the work once and returns its figures.
        warmups: turns that are run first and not counted: they fill the caches that all sides then share.
        after: called after each side of each turn, to clear away what it wrote.
    """

    def once() -> Turn:
        turn: dict[str, Figures] = {}
        for name, side in sides.items():
            turn[name] = side()
            if after is not None:
                after()
        return turn

    def turns(count: int) -> Iterator[Turn]:
        for _ in range(warmups):
            once()
        for _ in range(count):
            yield once()

    return turns
