"""What a merge will do to each tensor on disk: made from headers alone, before a byte is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from graftkit.adapters.file import AdapterFile
from graftkit.errors import MergeError
from graftkit.merging.adapter.effects import Effects, read_effects
from graftkit.merging.adapter.layerwise import LayerShop
from graftkit.merging.arithmetic.changes import Added, Change, Layer, LowRank, Rows, Whole
from graftkit.merging.arithmetic.terms import covers
from graftkit.merging.checkpoint.base import Base
from graftkit.merging.checkpoint.block_map import Block, Placed, matrix_shape, place
from graftkit.merging.checkpoint.shards import FLOATS, Shard
from graftkit.merging.checkpoint.tied_weights import Ties, settle
from graftkit.merging.checkpoint.weight_conversion import Group
from graftkit.surveying.checkpoint.safetensors_header import StoredTensor
from graftkit.text import percent, size, table

# Single precision has 16 bits to spare over bfloat16. With so many products an element, less than one element in
# 10,000 is misrounded even where the update is as large as the weight (measured: 7e-5 at 16, 1.1e-4 at 64); where
# it is a tenth of that, as is usual, 2e-5.
SAFE_PRODUCTS = 32


@dataclass(frozen=True)
class Weighted:
    """An adapter and its share.

    Attributes:
        file: the adapter.
        weight: what its update is multiplied by.
    """

    file: AdapterFile
    weight: float


@dataclass(frozen=True)
class Part:
    """One change of one adapter, on one disk tensor.

    Attributes:
        change: what is done.
        param: the parameter it is done to.
        effects: the adapter's.
        weight: the adapter's.
        blocks: where the parameter lies in the disk tensor; None where only the whole update can be placed.
        stacked: whether the blocks are one an expert.
    """

    change: Change
    param: str
    effects: Effects = field(repr=False)
    weight: float
    blocks: tuple[Block, ...] | None = field(repr=False)
    stacked: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it adds a product of two matrices, and does nothing else."""
        change = self.change
        return isinstance(change, LowRank) and change.magnitude is None and self.blocks is not None

    @property
    def products(self) -> int:
        """How many products each element of the update adds up."""
        change = self.change
        ranks = self.effects.tensors.shapes
        return ranks[change.a][0] // max(1, change.experts) if isinstance(change, LowRank) else 0


@dataclass(frozen=True)
class Job:
    """One disk tensor that changes.

    Attributes:
        name: in the checkpoint.
        source: the disk tensor that it starts from: itself, except for one that is untied.
        stored: how the source lies on disk.
        columns: of its matrix.
        group: the disk tensors and parameters that are converted together.
        parts: all changes, the replacements first.
    """

    name: str
    source: str
    stored: StoredTensor
    columns: int
    group: Group = field(repr=False)
    parts: tuple[Part, ...] = field(repr=False)

    @property
    def rows(self) -> int:
        return self.stored.numel // self.columns if self.columns else 0

    @property
    def is_plain(self) -> bool:
        """Whether it only adds products of two matrices."""
        return all(part.is_plain for part in self.parts)

    @property
    def in_double(self) -> bool:
        """Whether it has to be computed in double precision to be rounded correctly."""
        products = sum(part.products for part in self.parts)
        return self.stored.dtype != "BF16" or not self.is_plain or products > SAFE_PRODUCTS


@dataclass(frozen=True)
class MergePlan:
    """A merge, not yet done.

    Attributes:
        base: what is merged into.
        adapters: what is merged, with weights.
        jobs: disk name -> what changes there.
        ties: what happens to weights that several modules share.
        shop: for what only PEFT can merge.
    """

    base: Base = field(repr=False)
    adapters: tuple[Weighted, ...]
    jobs: Mapping[str, Job] = field(repr=False)
    ties: Ties
    shop: LayerShop = field(default_factory=LayerShop, repr=False)

    @cached_property
    def bytes(self) -> int:
        """What will be written, without the small files."""
        return self.base.weights.file_bytes + sum(self.jobs[name].stored.nbytes for name in self.ties.untied)

    @property
    def changed_bytes(self) -> int:
        return sum(job.stored.nbytes for job in self.jobs.values())

    def jobs_of(self, shard: Shard) -> tuple[Job, ...]:
        """The changes in one shard; a tensor that is untied goes where the one it was tied to lies."""
        shard_of = self.base.weights.shard_of
        return tuple(job for job in self.jobs.values() if shard_of[job.source] is shard)

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": str(self.base.folder),
            "adapters": [{"path": str(w.file.folder), "weight": w.weight} for w in self.adapters],
            "shards": [
                {"file": s.name, "bytes": s.size, "changed": len(self.jobs_of(s)), "tensors": len(s.tensors)}
                for s in self.base.weights.shards
            ],
            "bytes": self.bytes,
            "changed_bytes": self.changed_bytes,
            "changed": len(self.jobs),
            "tensors": len(self.base.weights.shard_of),
            "through_peft": sum(any(isinstance(p.change, Layer) for p in job.parts) for job in self.jobs.values()),
            "unknown_keys": len(self.base.groups.unknown),
            "untied": list(self.ties.untied),
        }

    def __str__(self) -> str:
        fields = self.to_dict()
        rows = [(s["file"], size(s["bytes"]), s["tensors"], s["changed"]) for s in fields["shards"]]
        share = percent(self.changed_bytes / self.bytes) if self.bytes else "0 %"
        summary = (
            f"{fields['changed']} of {fields['tensors']} tensors change, {size(self.changed_bytes)} ({share}); "
            f"{size(self.bytes)} will be written"
        )
        return table(("file", ">size", ">tensors", ">changed"), rows) + f"\n\n{summary}"


def make_plan(base: Base, adapters: Sequence[Weighted], tied: str | None) -> MergePlan:
    """Resolve every adapter tensor to places on disk.

    Args:
        base: what is merged into.
        adapters: one or more.
        tied: what to do where an adapter changes one of several modules that share a weight: None to refuse,
            ``"share"`` to change them all, ``"untie"`` to give the adapted one a weight of its own.

    Raises:
        MergeError: as :func:`graftkit.merging.adapter.effects.read_effects` and
            :func:`graftkit.merging.checkpoint.tied_weights.settle`;
            ``merge-missing-weight`` where the base's files do not hold a weight that is adapted, and
            ``merge-dtype`` where they hold it in a type that is not floating-point.
    """
    effects = [(read_effects(adapter.file, base.model), adapter.weight) for adapter in adapters]
    ties = settle(base, effects, tied)
    jobs: dict[str, Job] = {}
    for param in sorted({p for e, _ in effects for p in e.changes}):
        for target in ties.targets(param):
            for job in _jobs(base, param, target, effects, ties):
                jobs[job.name] = _joined(jobs[job.name], job) if job.name in jobs else job
    for name in ties.untied:
        jobs.setdefault(name, _copy(base, name, ties))
    return MergePlan(base, tuple(adapters), MappingProxyType(jobs), ties)


def _copy(base: Base, name: str, ties: Ties) -> Job:
    """A weight that gets a tensor of its own and stays as it is."""
    group = base.groups.of_param[ties.untied[name]]
    source = next(iter(group.disk))
    stored = base.weights.stored(source)
    return Job(name, source, stored, matrix_shape(stored.shape, stacked=False)[2], group, ())


def _joined(one: Job, other: Job) -> Job:
    """Two parameters that share a disk tensor (a fused one)."""
    parts = _ordered((*one.parts, *other.parts))
    columns = one.columns if one.columns == other.columns else other.columns
    return Job(one.name, one.source, one.stored, columns, one.group, parts)


def _ordered(parts: Iterable[Part]) -> tuple[Part, ...]:
    return tuple(sorted(parts, key=lambda part: not isinstance(part.change, Whole | Rows)))


def _jobs(
    base: Base, param: str, target: str, effects: Sequence[tuple[Effects, float]], ties: Ties
) -> Iterable[Job]:
    """The jobs that one parameter's changes make; ``target`` is the name under which its weight is on disk."""
    target = ties.untied.get(target, target)
    group = base.groups.of_param.get(target)
    if group is None:
        raise MergeError(
            "the base's files do not hold a weight that the adapter changes",
            where=param,
            why="the class starts it at random, or it is saved under a name that the class does not know",
            help="save the base with save_pretrained() after checking it, and merge onto that",
            code="merge-missing-weight",
        )
    changes = [(c, e, weight) for e, weight in effects for c in e.changes.get(param, ())]
    disk = {name: base.weights.stored(name).shape for name in group.disk}
    placed = _place(base, group, disk, [change for change, _, _ in changes])
    for name in group.disk:
        stored = base.weights.stored(name)
        _check_dtype(name, stored)
        found = placed[name] if placed else None
        blocks = tuple(b for b in found.blocks if b.param == target) if found else None
        if blocks is not None and not blocks:
            continue
        columns = found.columns if found else matrix_shape(stored.shape, len(stored.shape) == 3)[2]
        parts = [_part(base, c, target, e, weight, blocks, name) for c, e, weight in changes]
        made = param if param in ties.untied else name
        yield Job(made, name, stored, columns, group, _ordered(parts))


def _place(
    base: Base, group: Group, disk: Mapping[str, tuple[int, ...]], changes: Sequence[Change]
) -> Mapping[str, Placed] | None:
    stacked = any(_stacked(change, group, base.shapes[group.params[0]]) for change in changes)
    shapes = {name: base.shapes[name] for name in group.params}
    return place(group, base.model, disk, shapes, stacked)


def _stacked(change: Change, group: Group, shape: tuple[int, ...]) -> bool:
    """Whether the parameter is one matrix an expert; a one-dimensional convolution has three axes as well."""
    if isinstance(change, LowRank):
        return bool(change.experts)
    return group.converter is not None and len(shape) == 3


def _part(
    base: Base,
    change: Change,
    param: str,
    effects: Effects,
    weight: float,
    blocks: tuple[Block, ...] | None,
    disk: str,
) -> Part:
    shape = base.shapes[param]
    stacked = _stacked(change, base.groups.of_param[param], shape)
    alone = base.weights.stored(disk).numel == math.prod(shape)
    if blocks is not None and not _fits(change, blocks, alone and covers(blocks[0], shape)):
        blocks = None
    return Part(change, param, effects, weight, blocks, stacked)


def _fits(change: Change, blocks: tuple[Block, ...], one: bool) -> bool:
    """Whether a change can be done on blocks: some need the parameter in ``one``, and nothing beside it."""
    if isinstance(change, LowRank):
        return change.magnitude is None or one
    if isinstance(change, Rows):
        return one and not blocks[0].transposed
    return isinstance(change, Added | Whole)


def _check_dtype(name: str, stored: StoredTensor) -> None:
    if stored.dtype in FLOATS:
        return
    raise MergeError(
        f"a weight that the adapter changes is stored as {stored.dtype}",
        where=name,
        why="an update would be lost in its rounding",
        help="merge into a 16-bit or 32-bit version of the base",
        code="merge-dtype",
    )
