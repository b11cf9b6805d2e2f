"""Prove that a converted adapter adds what the original does: read back, and compared slice by slice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas, Factors, Slice
from graftkit.converting.dialects import DialectFormat
from graftkit.converting.errors import ConvertError

if TYPE_CHECKING:
    import torch

# What doubles themselves lose in a scale, a factor and their product.
_DOUBLE = 2.0**-48
_EPSILON = 2.0**-52
# Elements of an update that are compared at a time.
_CHUNK = 2**20


@dataclass(frozen=True)
class Proof:
    """What the comparison of a converted adapter with its original found; only equal ones have a proof.

    Attributes:
        slices: how many updates were compared.
        exact: how many of them have the very same factors.
        padding: further pairs in the file, which add nothing.
        largest: the largest error of an element, relative to the sum of its absolute products.
        rounding: what that may be in this dialect.
    """

    slices: int
    exact: int
    padding: int
    largest: float
    rounding: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "slices": self.slices,
            "exact": self.exact,
            "padding": self.padding,
            "largest_error": self.largest,
            "rounding": self.rounding,
        }

    def __str__(self) -> str:
        if self.exact == self.slices:
            return f"read back: all {self.slices} updates are exactly the original's"
        return (
            f"read back: {self.exact} of {self.slices} updates are exactly the original's, the others within "
            f"{self.largest:.1e} of it (rounding allows {self.rounding:.1e})"
        )


def prove_equal(original: Deltas, written: Deltas, dialect: DialectFormat, base: ConvertBase) -> Proof:
    """Compare every update, one at a time.

    Args:
        original: of whole matrices.
        written: the converted file, as its dialect reads it.

    Raises:
        ConvertError: ``convert-not-equal``: an update is missing, there is one too many, or one is another.
    """
    rounding = max(dialect.rounding, _DOUBLE)
    arrived: dict[Slice, list[Factors]] = defaultdict(list)
    for factors in written:
        arrived[replace(factors.at.whole, copy=factors.at.copy)].append(factors)
    errors = []
    for factors in original:
        for place in dialect.places(factors.at, base):
            parts = arrived.pop(place, [])
            _check_complete(factors.moved(place), parts)
            errors += [_compare(factors.cut(_outs(part)), part, rounding) for part in parts]
    padding = [part for parts in arrived.values() for part in parts]
    _check_zero(padding)
    return Proof(len(errors), errors.count(0.0), len(padding), max(errors, default=0.0), rounding)


def _outs(part: Factors) -> range:
    return part.at.outs if part.at.outs is not None else range(part.shape[0])


def _check_complete(factors: Factors, parts: Sequence[Factors]) -> None:
    """Check that the parts hold each output once."""
    outs = sorted(index for part in parts for index in _outs(part))
    if outs != list(range(factors.shape[0])):
        held = f"{len(outs)} of its {factors.shape[0]} outputs" if parts else "nothing of it"
        raise not_equal(factors.name, f"the converted file holds {held}, at {factors.at}")


def _check_zero(extra: Iterable[Factors]) -> None:
    for factors in extra:
        a, b = factors.read()
        if bool(a.any()) and bool(b.any()) and factors.scale:
            raise not_equal(factors.name, f"the original has no update at {factors.at}")


def _compare(wanted: Factors, found: Factors, rounding: float) -> float:
    """Return the largest relative error of one update.

    Raises:
        ConvertError: ``convert-not-equal``.
    """
    if wanted.shape != found.shape:
        raise not_equal(found.name, f"its shape is {list(found.shape)}, and the original's {list(wanted.shape)}")
    (a, b), (other_a, other_b) = wanted.exact(), found.exact()
    error = _by_factors(a, b, other_a, other_b)
    if error is not None and error <= rounding:
        return error
    error = _by_products(a, b, other_a, other_b)
    # The comparison itself sums in double precision.
    allowed = rounding + (len(a) + len(other_a)) * _EPSILON
    if not error <= allowed:
        raise not_equal(found.name, f"at {found.at} it is {error:.1e} off, and {allowed:.1e} is allowed")
    return error


def _by_factors(a: torch.Tensor, b: torch.Tensor, other_a: torch.Tensor, other_b: torch.Tensor) -> float | None:
    """Return a bound on the error from the factors alone; None where A is another than in the original.

    Zeros that fill up a rank add nothing.
    """
    rank = len(a)
    extra = other_a[rank:].any() and other_b[:, rank:].any()
    if len(other_a) < rank or bool(extra) or not bool((a == other_a[:rank]).all()):
        return None
    return _relative((other_b[:, :rank] - b).abs(), b.abs())


def _by_products(a: torch.Tensor, b: torch.Tensor, other_a: torch.Tensor, other_b: torch.Tensor) -> float:
    step = max(1, _CHUNK // max(1, a.shape[1]))
    largest = 0.0
    for begin in range(0, len(b), step):
        rows, other = b[begin : begin + step], other_b[begin : begin + step]
        error = (other @ other_a - rows @ a).abs()
        largest = max(largest, _relative(error, rows.abs() @ a.abs()))
    return largest


def _relative(error: torch.Tensor, size: torch.Tensor) -> float:
    """Return the largest error in units of its size; infinity where that is zero or not finite."""
    import torch

    if not error.numel():
        return 0.0
    share = torch.where(error == 0, 0.0, error / size)
    return float(share.nan_to_num(nan=float("inf")).max())


def not_equal(name: str, why: str) -> ConvertError:
    """Return the error for a converted adapter that adds something else than its original."""
    return ConvertError(
        "the converted adapter is not equal to the original, and was not published",
        where=name,
        why=why,
        help="report it with the output of `graft env`; meanwhile, merge the adapter into its base",
        code="convert-not-equal",
    )
