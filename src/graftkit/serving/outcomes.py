"""What log-probabilities say of an adapter that was served: applied, ignored, scaled, different, or nothing.

No threshold is a number of its own: the engine's error on the base, where there is no adapter, says how exactly it
computes, and the adapter's effect how much there is to see.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

from graftkit.engines.outcome import Outcome, Served

# An engine may be that many times as far off with the adapter as it is without: its error grows with the update.
_MARGIN = 8.0
# Error of float32 log-probabilities that two libraries compute in another order, relative to their size.
_ROUNDING = 1e-5
# The effect is that many times the tolerance, or the comparison cannot tell applied from ignored.
_VISIBLE = 4.0
# Correlation of the served change with the expected one from which it is called the same, multiplied.
_PARALLEL = 0.97


@dataclass(frozen=True)
class Measured:
    """Log-probabilities of the same tokens after the same prefixes, in nats and in the same order.

    Attributes:
        base, adapted: as transformers and PEFT compute them.
        served_base, served_adapted: as the engine does.
    """

    base: Sequence[float]
    adapted: Sequence[float]
    served_base: Sequence[float]
    served_adapted: Sequence[float]


@dataclass(frozen=True)
class Figures:
    """What a comparison is decided by, in nats.

    Attributes:
        effect: the largest change that the adapter makes to a log-probability.
        served_effect: the same as it is served.
        error: the largest distance of what is served from what is expected, with the adapter.
        base_error: the same without it.
        tolerance: up to which error the adapter counts as applied.
        factor: by which the expected change has to be multiplied to come closest to the served one; None where
            there is no expected change.
        similarity: the correlation of both changes, from -1 to 1; None where one of them is zero.
        compared: how many log-probabilities were compared.
    """

    effect: float
    served_effect: float
    error: float
    base_error: float
    tolerance: float
    factor: float | None
    similarity: float | None
    compared: int

    @property
    def visible(self) -> bool:
        """Whether the effect stands out from the noise."""
        return self.effect > _VISIBLE * self.tolerance


def figures_of(measured: Measured) -> Figures:
    """Return the figures of a comparison.

    Log-probabilities that are infinite anywhere are left out: a token that cannot come is one that engines mask.

    Raises:
        ValueError: the sequences have different lengths, or nothing finite is left.
    """
    rows = [row for row in zip(*_columns(measured), strict=True) if all(map(isfinite, row))]
    if not rows:
        raise ValueError("there are no finite log-probabilities to compare")
    base, adapted, served_base, served = zip(*rows, strict=True)
    expected_change = [b - a for a, b in zip(base, adapted, strict=True)]
    served_change = [b - a for a, b in zip(served_base, served, strict=True)]
    base_error = _largest(a - b for a, b in zip(base, served_base, strict=True))
    size = _largest([*base, *adapted])
    expected, found = _dot(expected_change, expected_change), _dot(served_change, served_change)
    both = _dot(expected_change, served_change)
    return Figures(
        effect=_largest(expected_change),
        served_effect=_largest(served_change),
        error=_largest(a - b for a, b in zip(adapted, served, strict=True)),
        base_error=base_error,
        tolerance=max(_MARGIN * base_error, _ROUNDING * size),
        factor=both / expected if expected else None,
        similarity=both / sqrt(expected * found) if expected and found else None,
        compared=len(rows),
    )


def outcome_of(figures: Figures) -> Outcome:
    """Decide what was done with the adapter.

    ``UNKNOWN`` where its effect is not several times the tolerance. ``SCALED`` is an estimate: a scaled update
    changes log-probabilities in almost the same direction.
    """
    if not figures.visible:
        return Outcome.UNKNOWN
    if figures.error <= figures.tolerance:
        return Outcome.APPLIED
    if figures.served_effect <= figures.tolerance:
        return Outcome.IGNORED
    similar = figures.similarity is not None and figures.similarity >= _PARALLEL
    if similar and figures.factor is not None and abs(figures.factor - 1) > 2 * (1 - _PARALLEL):
        return Outcome.SCALED
    return Outcome.DIFFERENT


def served(measured: Measured, engine: str, *, replaced: tuple[str, ...] = ()) -> Served:
    """Return what an engine made of an adapter.

    Args:
        engine: its name and version.
        replaced: the parts of it that were replaced for the run.
    """
    figures = figures_of(measured)
    outcome = outcome_of(figures)
    return Served(
        outcome=outcome,
        engine=engine,
        effect=figures.effect,
        error=figures.error,
        base_error=figures.base_error,
        factor=figures.factor,
        compared=figures.compared,
        says=_why_unknown(figures) if outcome is Outcome.UNKNOWN else None,
        replaced=replaced,
    )


def refused(engine: str, words: str, *, replaced: tuple[str, ...] = ()) -> Served:
    """Return that an engine did not load the adapter, or its base, in its own words."""
    return Served(outcome=Outcome.REFUSED, engine=engine, says=words, replaced=replaced)


def _why_unknown(figures: Figures) -> str:
    return (
        f"the adapter changes log-probabilities by {figures.effect:.2g}, and the engine's base is itself "
        f"{figures.base_error:.2g} off: a comparison needs an effect of {_VISIBLE * figures.tolerance:.2g}"
    )


def _columns(measured: Measured) -> tuple[Sequence[float], ...]:
    return (measured.base, measured.adapted, measured.served_base, measured.served_adapted)


def _largest(values: Iterable[float]) -> float:
    return max((abs(value) for value in values), default=0.0)


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))
