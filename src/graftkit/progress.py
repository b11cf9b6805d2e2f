"""The progress of a long call: what every ``on_progress`` callback gets."""

from __future__ import annotations

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
