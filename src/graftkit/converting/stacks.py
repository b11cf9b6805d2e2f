"""What llama.cpp and mlx-lm share: one tensor for all experts of a layer, and so factors of one rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas, Factors, Slice
from graftkit.surveying import kinds
from graftkit.surveying.ties import tied_names

if TYPE_CHECKING:
    import torch

_EXPERT = re.compile(r"(?P<holder>.*\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)")
_WEIGHT = ".weight"


@dataclass(frozen=True)
class Place:
    """What of the base a tensor of an engine holds.

    Attributes:
        slices: one matrix, or one of each expert.
        shape: (out, in) of each.
        stacked: whether it has an axis of experts.
        embedding: whether it holds a row for each token.
    """

    slices: tuple[Slice, ...]
    shape: tuple[int, int]
    stacked: bool
    embedding: bool

    @classmethod
    def of(cls, slices: Iterable[Slice], base: ConvertBase) -> Place:
        ordered = tuple(sorted(slices, key=lambda at: at.expert or 0))
        first = ordered[0]
        outs, ins = base.matrix(first.parameter)
        site = base.site(first.parameter)
        return cls(
            ordered,
            (outs if first.outs is None else len(first.outs), ins),
            stacked=first.expert is not None,
            embedding=site is not None and site.kind == kinds.EMBEDDING,
        )

    def expert(self, number: int) -> int | None:
        """Return the index in the engine's tensor of one of the slices."""
        return number if self.stacked else None

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A (r, in) and B (out, r), with an axis of experts where there is one."""
        outs, ins = self.shape
        experts = (len(self.slices),) if self.stacked else ()
        return (*experts, rank, ins), (*experts, outs, rank)


def stored_slices(base: ConvertBase) -> Iterator[tuple[str, Slice]]:
    """Yield every matrix that an adapter may change, with the module that holds it in the published checkpoint.

    The number of an expert is left out: ``model.layers.0.mlp.experts.up_proj``.
    """
    for stored, slices in base.on_disk.items():
        module = stored.removesuffix(_WEIGHT)
        one = _EXPERT.fullmatch(module)
        for at in slices:
            if base.site(at.parameter) is not None:
                yield (module if one is None else f"{one['holder']}.{one['leaf']}"), at


def halves(at: Slice, base: ConvertBase) -> tuple[Slice, Slice]:
    """Return gate and up of a fused projection of experts: one after the other, or in turn.

    Source: ``is_concatenated`` as ``transformers.integrations.moe`` reads it.
    """
    outs = base.matrix(at.parameter)[0]
    experts = base.model.get_submodule(at.parameter.rpartition(".")[0])
    if getattr(experts, "is_concatenated", True):
        return replace(at, outs=range(outs // 2)), replace(at, outs=range(outs // 2, outs))
    return replace(at, outs=range(0, outs, 2)), replace(at, outs=range(1, outs, 2))


def unplaced(deltas: Deltas, places: Iterable[Place], base: ConvertBase, engine: str) -> dict[str, str]:
    """Return what an engine has no tensor for, or would apply twice: parameter or field -> the reason."""
    refused = {other.name: f"its form cannot hold {other.feature.words}" for other in deltas.others}
    placed = {at.whole for place in places for at in place.slices}
    tied = {name for names in tied_names(base.model) for name in names}
    for factors in deltas:
        parameter = factors.at.parameter
        if parameter in tied:
            refused[parameter] = f"{engine} would use it in the output layer too, which is tied to the embeddings"
        elif factors.at.whole not in placed:
            refused[parameter] = f"{engine} has no tensor for it, or adds no adapter to that tensor"
    return refused


@dataclass(frozen=True)
class Updates:
    """The updates of one place, by expert; None where an expert has none.

    Attributes:
        rank: the largest.
    """

    place: Place
    factors: tuple[Factors | None, ...] = field(repr=False)
    rank: int

    @property
    def given(self) -> tuple[Factors, ...]:
        """The updates that there are."""
        return tuple(factors for factors in self.factors if factors is not None)

    def stacked(self, scale: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read A and B in the shapes of :meth:`Place.shapes`, float64, filled up with zeros.

        Args:
            scale: what the engine will multiply their product by; B makes up for another one.
            rank: at least that of the updates.
        """
        import torch

        pairs = [self._padded(factors, scale, rank) for factors in self.factors]
        if not self.place.stacked:
            return pairs[0]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])

    def _padded(self, factors: Factors | None, scale: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        outs, ins = self.place.shape
        a = torch.zeros(rank, ins, dtype=torch.float64)
        b = torch.zeros(outs, rank, dtype=torch.float64)
        if factors is not None:
            own_a, own_b = factors.read()
            a[: factors.rank] = own_a
            b[:, : factors.rank] = own_b.double() * (factors.scale / scale)
        return a, b


def updates_by_place(deltas: Deltas, places: Mapping[str, Place]) -> dict[str, Updates]:
    """Return the updates of each place that has any.

    Args:
        deltas: of whole matrices.
    """
    by_matrix = {factors.at: factors for factors in deltas}
    found = {}
    for name, place in places.items():
        factors = tuple(_part(by_matrix.get(at.whole), at) for at in place.slices)
        rank = max((one.rank for one in factors if one is not None), default=0)
        if rank:
            found[name] = Updates(place, factors, rank)
    return found


def _part(whole: Factors | None, at: Slice) -> Factors | None:
    return whole if whole is None or at.outs is None else whole.cut(at.outs)
