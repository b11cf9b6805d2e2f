"""Which model types a test run covers: those that people ask for, and a tenth of the others, another one each day.

The turn is a day's, unless ``GRAFTKIT_FAMILY_TURN`` names one (0 to 9, or "all"). It is set once for a run, in the
environment that the workers of pytest-xdist inherit: all of them must collect the same tests, also at midnight.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import MutableMapping
from datetime import date

VARIABLE = "GRAFTKIT_FAMILY_TURN"
TURNS = 10
ALL = "all"


def fix_turn(environment: MutableMapping[str, str], today: date) -> str:
    """Set the turn of a run where nobody did, and return it.

    Raises:
        ValueError: the variable is neither "all" nor a number from 0 to 9.
    """
    turn = environment.setdefault(VARIABLE, str(today.toordinal() % TURNS))
    if turn != ALL and turn not in {str(number) for number in range(TURNS)}:
        raise ValueError(f"{VARIABLE}={turn}: a number from 0 to {TURNS - 1}, or {ALL}")
    return turn


def is_due(name: str, turn: str) -> bool:
    """Check whether it is a name's turn. Each has one of ten, by its own letters: a new name moves no other."""
    return turn == ALL or zlib.crc32(name.encode()) % TURNS == int(turn)


def due_now(name: str) -> bool:
    """Check whether it is a name's turn in this run."""
    return is_due(name, os.environ[VARIABLE])
