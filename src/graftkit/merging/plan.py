"""Plan what a merge does to each tensor on disk, from headers alone, before a byte is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from graftkit.adapters.file import AdapterFile
from graftkit.errors import MergeError
from graftkit.merging.adapter.effects import Effects, read_effects
from graftkit.merging.adapter.layerwise import LayerMerger
from graftkit.merging.arithmetic.changes import Change, PeftLayer, SavedWeight
from graftkit.merging.checkpoint.base import Base
from graftkit.merging.checkpoint.block_map import Block, find_blocks, matrix_shape
from graftkit.merging.checkpoint.shards import FLOATS, Shard
from graftkit.merging.checkpoint.tied_weights import Ties, resolve_ties
from graftkit.merging.checkpoint.weight_conversion import Group
from graftkit.merging.unsupported import refuse_other_bounds
from graftkit.surveying.checkpoint.safetensors_header import StoredTensor
from graftkit.text import percent, size, table


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter, and the factor of its update."""

    file: AdapterFile
    weight: float


@dataclass(frozen=True)
class Part:
    """One change of one adapter, on one disk tensor.

    Attributes:
        param: the parameter that is changed.
        effects: of the adapter.
        blocks: where the parameter lies in the disk tensor; None where only the whole update can be computed.
        stacked: whether the parameter is one matrix per expert.
        saved: the parameter as the adapter holds it whole, where it does: what the change was trained on.
    """

    change: Change
    param: str
    effects: Effects = field(repr=False)
    blocks: tuple[Block, ...] | None = field(repr=False)
    stacked: bool = False
    saved: SavedWeight | None = None


@dataclass(frozen=True)
class Job:
    """One disk tensor that changes.

    Attributes:
        name: in the output.
        source: the base's tensor that it starts from: of the same name, unless it is untied.
        stored: how the source lies on disk.
        columns: of its matrix.
        group: the disk tensors and parameters that are converted together.
        parts: all changes, replacements first.
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
    def row_bytes(self) -> int:
        """Size in bytes of one row of its matrix."""
        return self.stored.nbytes // self.rows

    @property
    def is_plain(self) -> bool:
        """Whether it only adds products of two matrices."""
        return all(part.change.is_plain and part.blocks is not None for part in self.parts)


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        jobs: name in the output -> the changes to that tensor.
        ties: what happens to weights that several modules share.
        unknown_keys: number of the base's tensors that its class does not use.
        missing_buffers: number of the class's saved buffers that are in no file.
        merger: merges the layers that only PEFT can merge.
    """

    base: Base = field(repr=False)
    adapters: tuple[WeightedAdapter, ...]
    jobs: Mapping[str, Job] = field(repr=False)
    ties: Ties
    unknown_keys: int = 0
    missing_buffers: int = 0
    merger: LayerMerger = field(default_factory=LayerMerger, repr=False)

    @cached_property
    def bytes(self) -> int:
        """Bytes that will be written, without the small files."""
        return self.base.weights.file_bytes + sum(self.jobs[name].stored.nbytes for name in self.ties.untied)

    @property
    def changed_bytes(self) -> int:
        return sum(job.stored.nbytes for job in self.jobs.values())

    def jobs_of(self, shard: Shard) -> tuple[Job, ...]:
        """Return the changes in one shard; an untied tensor goes beside the one that it was tied to."""
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
            "through_peft": sum(
                any(isinstance(p.change, PeftLayer) for p in job.parts) for job in self.jobs.values()
            ),
            "unknown_keys": self.unknown_keys,
            "missing_buffers": self.missing_buffers,
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


def make_plan(base: Base, adapters: Sequence[WeightedAdapter], tied: str | None) -> MergePlan:
    """Resolve every adapter tensor to byte ranges on disk.

    Args:
        base: what is merged into.
        adapters: one or more.
        tied: what to do where an adapter changes one of several modules that share a weight: None refuses,
            ``"share"`` changes them all, ``"untie"`` gives the adapted one its own weight.

    Raises:
        MergeError: as :func:`graftkit.merging.adapter.effects.read_effects`,
            :func:`graftkit.merging.unsupported.refuse_other_bounds` and
            :func:`graftkit.merging.checkpoint.tied_weights.resolve_ties`;
            ``merge-missing-weight``: the base's files lack a weight that is adapted; ``merge-dtype``: its dtype is
            not floating-point.
    """
    effects = [read_effects(adapter.file, base.model, adapter.weight) for adapter in adapters]
    for adapter, effect in zip(adapters, effects, strict=True):
        refuse_other_bounds(adapter.file, base, effect.changes)
    ties = resolve_ties(base, effects, tied)
    jobs: dict[str, Job] = {}
    for param in sorted({p for e in effects for p in e.changes}):
        for target in ties.targets(param):
            for job in _jobs(base, param, target, effects, ties):
                jobs[job.name] = _combined(jobs[job.name], job) if job.name in jobs else job
    for name in ties.untied:
        jobs.setdefault(name, _copy(base, name, ties))
    unknown, buffers = len(base.groups.unknown), len(base.compared.absent.buffers)
    return MergePlan(base, tuple(adapters), MappingProxyType(jobs), ties, unknown, buffers)


def _copy(base: Base, name: str, ties: Ties) -> Job:
    """Make the job of a weight that gets its own tensor, with the same values."""
    group = base.groups.of_param[ties.untied[name]]
    source = next(iter(group.disk))
    stored = base.weights.stored(source)
    return Job(name, source, stored, matrix_shape(stored.shape, stacked=False)[2], group, ())


def _combined(one: Job, other: Job) -> Job:
    """Combine the jobs of two parameters that share a (fused) disk tensor."""
    return replace(one, columns=other.columns, parts=_replacements_first((*one.parts, *other.parts)))


def _replacements_first(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Return the parts with those first that set values, and of these the ones that set all."""
    return tuple(sorted(parts, key=lambda part: (not part.change.replaces, part.saved is not None)))


def _jobs(base: Base, param: str, target: str, effects: Sequence[Effects], ties: Ties) -> Iterable[Job]:
    """Yield the jobs that one parameter's changes make; its weight is on disk under the name ``target``."""
    target = ties.untied.get(target, target)
    group = base.groups.of_param.get(target)
    if group is None:
        raise MergeError(
            "the base's files do not contain a weight that the adapter changes",
            where=param,
            why="the model class initializes it at random, or the files have it under an unknown name",
            help="save the base with save_pretrained() after checking it, and merge onto that",
            code="merge-missing-weight",
        )
    shape = base.shapes[target]
    # A one-dimensional convolution has three axes as well.
    is_stacked = group.converter is not None and len(shape) == 3
    parts = [
        Part(change, target, effect, None, is_stacked if change.stacked is None else change.stacked, saved)
        for effect in effects
        for change, saved in _on_saved(effect.changes.get(param, ()))
    ]
    disk = {name: base.weights.stored(name).shape for name in group.disk}
    params = {name: base.shapes[name] for name in group.params}
    layouts = find_blocks(group, base.model, disk, params, any(part.stacked for part in parts))
    for name in group.disk:
        stored = base.weights.stored(name)
        _check_dtype(name, stored)
        layout = layouts[name] if layouts else None
        blocks = tuple(b for b in layout.blocks if b.param == target) if layout else None
        if blocks is not None and not blocks:
            continue
        columns = layout.columns if layout else matrix_shape(stored.shape, len(stored.shape) == 3)[2]
        placed = _replacements_first(_on_blocks(part, blocks, stored, shape) for part in parts)
        yield Job(param if param in ties.untied else name, name, stored, columns, group, placed)


def _on_saved(changes: Sequence[Change]) -> Iterable[tuple[Change, SavedWeight | None]]:
    """Yield one adapter's changes to a parameter, each with the saved weight that it starts from.

    PEFT saves the embeddings whole when they were resized, beside what was trained on them, and loads them first.
    Source: ``peft.utils.save_and_load.get_peft_model_state_dict``.
    """
    whole = next((change for change in changes if isinstance(change, SavedWeight)), None)
    for change in changes:
        yield change, whole if change is not whole and change.needs_base else None


def _on_blocks(part: Part, blocks: tuple[Block, ...] | None, stored: StoredTensor, shape: tuple[int, ...]) -> Part:
    """Return a part with the blocks that the parameter, of this shape, has in a disk tensor, if these suffice."""
    change = part.change
    if blocks is None or isinstance(change, PeftLayer) or (change.by_rows and blocks[0].transposed):
        return part
    is_whole = stored.numel == math.prod(shape) and blocks[0].covers(shape)
    return replace(part, blocks=blocks) if is_whole or change.takes_any_blocks else part


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
