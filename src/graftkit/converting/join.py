"""Put the parts of matrices together again: what one engine keeps apart or twice, another has as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas, Factors
from graftkit.converting.dialects._base import DialectFormat
from graftkit.errors import AdapterError

if TYPE_CHECKING:
    import torch


def read_whole(dialect: DialectFormat, folder: Path, base: ConvertBase) -> Deltas:
    """Read an adapter in any dialect as updates of whole matrices, each at every place that its engine has for it.

    Raises:
        AdapterError: as the dialect's ``read`` and :func:`joined`; ``adapter-copies-differ``: a copy is missing.
        MergeError: as the dialect's ``read``.
    """
    found = dialect.read(folder, base)
    whole = joined(found, base)
    arrived = {replace(factors.at.whole, copy=factors.at.copy) for factors in found}
    for factors in whole:
        for place in dialect.places(factors.at, base):
            if place not in arrived:
                raise _copies_differ(factors.moved(place), "it is not there")
    return whole


def joined(deltas: Deltas, base: ConvertBase) -> Deltas:
    """Return the same updates, of whole matrices.

    Parts that share A keep their rank; others get the sum of their ranks. Outputs that no part holds get zeros.
    What repeats an update for an engine's copy of a weight is left out, if it is equal; so are zeros for
    projections that only the engine has.

    Raises:
        AdapterError: ``adapter-copies-differ``: a copy is not equal, or there is one without the update itself;
            ``adapter-does-not-fit``: two updates have the same outputs.
    """
    groups: dict[object, list[Factors]] = defaultdict(list)
    copies: list[Factors] = []
    for factors in deltas:
        if factors.at.parameter not in base.shapes:
            check_zero(factors)
        elif factors.at.copy:
            copies.append(factors)
        else:
            groups[factors.at.whole].append(factors)
    whole = [_whole(parts, base) for parts in groups.values()]
    by_slice = {factors.at: factors for factors in whole}
    for copy in copies:
        _check_copy(copy, by_slice.get(copy.at.whole))
    return replace(deltas, factors=tuple(whole))


def _whole(parts: Sequence[Factors], base: ConvertBase) -> Factors:
    first = parts[0]
    if len(parts) == 1 and first.at.outs is None:
        return first
    out, ins = base.matrix(first.at.parameter)
    held = [index for part in parts for index in _outs(part, out)]
    if len(set(held)) != len(held):
        raise _does_not_fit(parts[1], f"{parts[0].name} has the same outputs")
    shared = _share_a(parts)
    rank = first.rank if shared else sum(part.rank for part in parts)
    dtype = first.dtype if len({(part.dtype, part.scale) for part in parts}) == 1 else "F32"

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        return _stacked(parts, out, first.scale, rank, shared)

    return replace(first, at=first.at.whole, shape=(out, ins), rank=rank, dtype=dtype, read=read)


def _outs(part: Factors, out: int) -> range:
    return part.at.outs if part.at.outs is not None else range(out)


def _share_a(parts: Sequence[Factors]) -> bool:
    import torch

    if len({part.rank for part in parts}) != 1:
        return False
    first = parts[0].read()[0]
    return all(torch.equal(first, part.read()[0]) for part in parts[1:])


def _stacked(
    parts: Sequence[Factors], out: int, scale: float, rank: int, shared: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of the parts together, with the scale of the first in none of them."""
    import torch

    pairs = [part.read() for part in parts]
    kind = torch.promote_types(pairs[0][0].dtype, pairs[-1][1].dtype)
    same = len({part.scale for part in parts}) == 1
    together = torch.zeros(out, rank, dtype=kind if same else torch.float64)
    at = 0
    for part, (_, b) in zip(parts, pairs, strict=True):
        outs = _outs(part, out)
        value = b.to(together.dtype) * (1 if same else part.scale / scale)
        together[outs.start : outs.stop : outs.step, at : at + part.rank] = value
        at += 0 if shared else part.rank
    return pairs[0][0] if shared else torch.cat([a for a, _ in pairs]), together


def _check_copy(copy: Factors, own: Factors | None) -> None:
    import torch

    if own is None:
        check_zero(copy)
        return
    (a, b), (other_a, other_b) = own.exact(), copy.exact()
    if not (torch.equal(a, other_a) and torch.equal(b, other_b)):
        raise _copies_differ(copy, f"{own.name} is another update")


def check_zero(factors: Factors) -> None:
    """Check that an update at a place that the base does not have adds nothing.

    Raises:
        AdapterError: ``adapter-copies-differ``.
    """
    a, b = factors.read()
    if bool(a.any()) and bool(b.any()):
        raise _copies_differ(factors, f"there is no update of {factors.at.parameter} itself")


def _copies_differ(copy: Factors, why: str) -> AdapterError:
    return AdapterError(
        f"the adapter does not repeat its update {copy.at}",
        where=copy.name,
        why=f"{why}, and in the base both are one weight",
        help="convert the original adapter again; this one has no equal on the base as transformers has it",
        code="adapter-copies-differ",
    )


def _does_not_fit(part: Factors, why: str) -> AdapterError:
    return AdapterError(
        "two of the adapter's updates have the same place in the base",
        where=part.name,
        why=why,
        help="convert the original adapter again",
        code="adapter-does-not-fit",
    )
