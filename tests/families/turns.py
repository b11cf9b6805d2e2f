"""Which model types a test run covers: those that people ask for, and a tenth of the others, another one each day.

Stock PEFT alone proves a random tenth, another one each run (``drawn``); ``GRAFTKIT_FAMILY_SEED`` repeats one.

The turn is a day's, unless ``GRAFTKIT_FAMILY_TURN`` names one (0 to 9, or "all"). Both are set once for a run, in
the environment that the workers of pytest-xdist inherit: all must collect the same tests, also at midnight.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Collection, Iterable, MutableMapping
from datetime import date
from typing import Any

import pytest

VARIABLE = "GRAFTKIT_FAMILY_TURN"
SEED = "GRAFTKIT_FAMILY_SEED"
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


def in_turns(names: Iterable[str], always: Collection[str] = (), seldom: Collection[str] = ()) -> list[Any]:
    """Return a parameter for each name; the marker ``families`` is on those that a usual run leaves out.

    Args:
        always: names that each run has, as far as they are not in ``seldom``.
        seldom: names that only a run of all has.
    """

    def is_left_out(name: str) -> bool:
        if os.environ[VARIABLE] == ALL:
            return False
        return name in seldom or not (name in always or due_now(name))

    return [
        pytest.param(name, id=name, marks=pytest.mark.families if is_left_out(name) else ())
        for name in sorted(names)
    ]


def fix_seed(environment: MutableMapping[str, str]) -> str:
    """Set the seed of a run's random tenth where nobody did, and return it."""
    return environment.setdefault(SEED, str(random.randrange(10**6)))


def drawn(names: Iterable[str], seed: str) -> list[str]:
    """Return a random tenth of the names, at least one, in order."""
    every = sorted(names)
    return sorted(random.Random(int(seed)).sample(every, max(1, len(every) // TURNS)))
