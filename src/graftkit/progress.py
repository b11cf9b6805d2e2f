"""The progress of a long call: what every ``on_progress`` callback gets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a long call.

    Attributes:
        step: what is being done now, for people.
        done: how much is finished, in the unit of the call: rules, bytes.
        total: how much there is in all, in that unit; None where it is not known.
    """

    step: str
    done: int
    total: int | None


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Add the time that the block takes to ``seconds`` of this step, also where the block fails."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - started
