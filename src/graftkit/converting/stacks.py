"""What several engines ask for: one pair of factors for all experts of a layer, of one rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from graftkit.converting.delta import Deltas, Factors, Slice

if TYPE_CHECKING:
    import torch


def by_matrix(deltas: Deltas) -> dict[Slice, Factors]:
    """Return updates of whole matrices by what they change."""
    return {factors.at: factors for factors in deltas}


def update_at(updates: Mapping[Slice, Factors], at: Slice) -> Factors | None:
    """Return the part of an update that lies in a slice, None where there is none."""
    whole = updates.get(at.whole)
    return whole if whole is None or at.outs is None else whole.cut(at.outs)


def largest_rank(found: Iterable[Factors | None]) -> int:
    """Return the largest rank of some updates; 0 where there are none."""
    return max((factors.rank for factors in found if factors is not None), default=0)


def padded(
    factors: Factors | None, shape: tuple[int, int], rank: int, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read A (rank, in) and B (out, rank), float64, filled up with zeros.

    Args:
        factors: None for an update that is zero.
        shape: (out, in).
        factor: B is multiplied by it.
    """
    import torch

    a = torch.zeros(rank, shape[1], dtype=torch.float64)
    b = torch.zeros(shape[0], rank, dtype=torch.float64)
    if factors is not None:
        own_a, own_b = factors.read()
        a[: factors.rank] = own_a
        b[:, : factors.rank] = own_b.double() * factor
    return a, b
