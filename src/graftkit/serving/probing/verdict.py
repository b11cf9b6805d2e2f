"""What a live server's log-probabilities say of an adapter.

A server names only the most likely tokens, and computes in half precision or on quantized weights. So the change
from its own base to its adapter is compared with the expected change, over all prompts together: errors of the
base that both have cancel, and what is left is measured on the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import sqrt

from graftkit.engines.outcome import Outcome, Served

# Root mean square of a change, in nats, of which float32 rounding and the record's five digits may be all.
_FLOOR = 2e-4
# A sum or difference of two values with independent errors has 1.4 times the error of one; more where an adapter's
# own arithmetic is coarse.
_NOISE = 2.0
# A strong adapter multiplies the error that its base has in half precision by so much, up to this share of its
# effect: more than on twins of Llama, Qwen 3 and Gemma 4 in bfloat16. A small part of it left out looks the same.
_AMPLIFIED, _SMALL_SHARE = 10.0, 0.15
# Up to this share of the effect, an error leaves no doubt which of "applied", "ignored" and "scaled" it is.
_SHARE = 1 / 3
# Without the base's own error: the share up to which a value counts as that of the adapter, or of the base.
_BLIND_SHARE = 0.1
# The same for a scaled adapter, whose values between those of the record are interpolated.
_SCALED_SHARE = 0.2
# Root mean square, in nats, from which a base's answers are not those of the same weights in another precision.
_OTHER_BASE = 0.5
# Log-probabilities below which agreement may be chance.
_FEWEST = 6
# Steps of the factor that are tried, and how far from 1 it is called another one.
_STEP, _LARGEST_FACTOR, _AT_ONE = 0.01, 2.0, 0.05


@dataclass(frozen=True)
class Row:
    """One token after one prompt, in nats.

    Attributes:
        curve: factor on the adapter's update -> log-probability that the record expects; it has 0 and 1.
        base: as the server's base has it, None where it does not name the token.
        adapted: as the server's adapter has it, None likewise.
    """

    curve: tuple[tuple[float, float], ...]
    base: float | None
    adapted: float | None

    def at(self, factor: float) -> float:
        """Return the log-probability expected at a factor, by the polynomial through the known ones.

        With those at 0, 0.5, 1 and 2 it is within a tenth of the effect of the true one for effects below one nat
        (root mean square), as measured on twins of Qwen 3 and Llama; a quarter for stronger adapters.
        """
        return _through(self.curve, factor)

    @property
    def expected_base(self) -> float:
        return dict(self.curve)[0.0]

    @property
    def expected(self) -> float:
        return dict(self.curve)[1.0]


def judge(rows: Sequence[Row], chats: Sequence[Row], engine: str, *, other_ids: bool = False) -> Served:
    """Decide what became of an adapter.

    Args:
        rows: of plain texts.
        chats: of conversations, which the server renders itself.
        other_ids: whether the server made another number of tokens of a prompt than training did; its answers to
            such prompts are not among the rows.
    """
    found = _judged(rows or chats, engine)
    if rows and chats and found.outcome in (Outcome.APPLIED, Outcome.UNKNOWN) and _other_prompt(rows, chats):
        says = "texts are answered as expected, and conversations are not: the server renders them otherwise"
        return _as(found, Outcome.OTHER_TEMPLATE, says)
    if other_ids and found.outcome in (Outcome.APPLIED, Outcome.UNKNOWN):
        says = "the server makes another number of tokens of a prompt than the tokenizer and template of training"
        return _as(found, Outcome.OTHER_TEMPLATE, says)
    return found


def _judged(rows: Sequence[Row], engine: str) -> Served:
    figures = Served(
        outcome=Outcome.UNKNOWN,
        engine=engine,
        effect=_largest(row.expected - row.expected_base for row in rows),
        error=_largest(row.adapted - row.expected for row in rows if row.adapted is not None),
        base_error=_largest(row.base - row.expected_base for row in rows if row.base is not None),
        compared=sum(row.adapted is not None for row in rows),
    )
    if figures.compared < _FEWEST:
        says = f"the server names {figures.compared} of the tokens in the record, and it takes {_FEWEST} to tell"
        return _as(figures, Outcome.UNKNOWN, says)
    if any(row.base is not None for row in rows):
        return _with_base(rows, figures)
    return _without_base(rows, figures)


def _with_base(rows: Sequence[Row], figures: Served) -> Served:
    noise = _rms(row.base - row.expected_base for row in rows if row.base is not None)
    if noise > _OTHER_BASE:
        return _as(figures, Outcome.OTHER_BASE, _other_base(rows, noise))
    changes = [_Change(row, row.adapted - _base_of(row)) for row in rows if row.adapted is not None]
    effect = _rms(change.expected(1.0) for change in changes)
    served = _rms(change.served for change in changes)
    allowed = max(_FLOOR, _NOISE * noise)
    if effect < 4 * _FLOOR:
        return _as(figures, Outcome.UNKNOWN, f"the adapter changes the record's prompts by {effect:.1g} nats only")
    if served <= max(_FLOOR, min(noise, effect / 20)):
        # An engine that leaves the adapter out computes the very same values twice.
        return _as(figures, Outcome.IGNORED, factor=0.0)
    error = _error(changes, 1.0)
    factor = _best_factor(changes)
    if error <= allowed and error <= _SHARE * effect:
        return _as(figures, Outcome.APPLIED, factor=factor)
    if _is_scaled(changes, factor, max(allowed, _SCALED_SHARE * effect)):
        return _as(figures, Outcome.SCALED, _beyond(factor), factor=factor)
    if allowed > _SHARE * effect:
        says = f"the server's base is itself {noise:.2g} nats off, and the adapter's effect is {effect:.2g}"
        return _as(figures, Outcome.UNKNOWN, says)
    if error <= _AMPLIFIED * noise and error <= _SMALL_SHARE * effect:
        says = (
            f"its error is {error:.2g} nats, and its base's {noise:.2g}: a strong adapter in half precision, or a "
            "small part of it left out. A server in float32 tells"
        )
        return _as(figures, Outcome.UNKNOWN, says)
    return _as(figures, Outcome.DIFFERENT)


def _without_base(rows: Sequence[Row], figures: Served) -> Served:
    """Judge by levels alone: only what is very near to one of the expected values can be told."""
    changes = [_Change(row, row.adapted - row.expected_base) for row in rows if row.adapted is not None]
    effect = _rms(change.expected(1.0) for change in changes)
    near = _BLIND_SHARE * effect
    if effect >= 4 * _FLOOR and _error(changes, 1.0) <= near:
        return _as(figures, Outcome.APPLIED, factor=_best_factor(changes))
    if effect >= 4 * _FLOOR and _error(changes, 0.0) <= near:
        return _as(figures, Outcome.IGNORED, factor=0.0)
    factor = _best_factor(changes)
    if effect >= 4 * _FLOOR and _is_scaled(changes, factor, _SCALED_SHARE * effect):
        return _as(figures, Outcome.SCALED, _beyond(factor), factor=factor)
    says = "its answers are near neither to those of the adapter nor to those of its base: --base NAME tells more"
    return _as(figures, Outcome.UNKNOWN, says)


@dataclass(frozen=True)
class _Change:
    """What an adapter does to one log-probability."""

    row: Row
    served: float

    def expected(self, factor: float) -> float:
        return self.row.at(factor) - self.row.expected_base


def _base_of(row: Row) -> float:
    """Return the server's base where it names the token, else the expected one."""
    return row.expected_base if row.base is None else row.base


def _error(changes: Iterable[_Change], factor: float) -> float:
    return _rms(change.served - change.expected(factor) for change in changes)


def _best_factor(changes: Sequence[_Change]) -> float:
    """Return the factor on the update that comes closest to what is served, from 0 to the largest one tried."""
    steps = round(_LARGEST_FACTOR / _STEP)
    return min((step * _STEP for step in range(steps + 1)), key=lambda factor: _error(changes, factor))


def _is_scaled(changes: Sequence[_Change], factor: float, allowed: float) -> bool:
    if abs(factor - 1) <= _AT_ONE:
        return False
    error = _error(changes, factor)
    return error <= allowed and error <= _SHARE * _error(changes, 1.0)


def _beyond(factor: float) -> str | None:
    return "the factor is 2 or more" if factor >= _LARGEST_FACTOR else None


def _other_base(rows: Sequence[Row], noise: float) -> str:
    swapped = _rms(row.base - row.expected for row in rows if row.base is not None)
    if swapped < noise * _SHARE:
        return "what is served as the base answers like the adapter: are the names exchanged?"
    return f"without the adapter its log-probabilities are {noise:.2g} nats from those of the base in training"


def _other_prompt(rows: Sequence[Row], chats: Sequence[Row]) -> bool:
    """Check whether conversations are farther from what is expected than texts of the same model can be."""

    def errors(of: Sequence[Row]) -> list[float]:
        bases = [row.base - row.expected_base for row in of if row.base is not None]
        return bases or [row.adapted - row.expected for row in of if row.adapted is not None]

    return bool(errors(chats)) and _rms(errors(chats)) > max(0.1, 4 * _rms(errors(rows)))


def _as(figures: Served, outcome: Outcome, says: str | None = None, factor: float | None = None) -> Served:
    return replace(figures, outcome=outcome, says=says, factor=factor)


def _through(points: Sequence[tuple[float, float]], at: float) -> float:
    """Return the value at a place of the polynomial through the points (Lagrange's form)."""
    total = 0.0
    for place, value in points:
        weight = 1.0
        for other, _ in points:
            if other != place:
                weight *= (at - other) / (place - other)
        total += weight * value
    return total


def _rms(values: Iterable[float]) -> float:
    listed = list(values)
    return sqrt(sum(value * value for value in listed) / len(listed)) if listed else 0.0


def _largest(values: Iterable[float]) -> float | None:
    return max((abs(value) for value in values), default=None)
