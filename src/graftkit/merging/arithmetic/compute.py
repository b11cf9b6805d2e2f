"""The arithmetic of one changed tensor, row by row: read, add, round, write."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graftkit.merging.arithmetic.changes import Added, LowRank, Rows, Whole
from graftkit.merging.arithmetic.dense import update_of
from graftkit.merging.arithmetic.rounding import rounded
from graftkit.merging.arithmetic.terms import (
    AddedTerm,
    DenseTerm,
    DoraTerm,
    LowRankTerm,
    RowsTerm,
    Term,
    WholeTerm,
    Window,
)
from graftkit.merging.checkpoint.shards import torch_dtype
from graftkit.merging.errors import base_unreadable
from graftkit.merging.io.read import Opened, buffer_of, opened
from graftkit.merging.plan import Job, MergePlan, Part

if TYPE_CHECKING:
    import torch


@dataclass
class Terms:
    """A job's terms, made by whichever thread needs them first and freed with the last chunk that uses them.

    Attributes:
        plan: that the job belongs to.
        job: the job.
    """

    plan: MergePlan
    job: Job
    _made: tuple[Term, ...] | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def get(self) -> tuple[Term, ...]:
        with self._lock:
            if self._made is None:
                self._made = tuple(self._term(part) for part in self.job.parts)
            return self._made

    def _term(self, part: Part) -> Term:
        change, tensors = part.change, part.effects.tensors
        if part.blocks is None:
            return DenseTerm(update_of(self.plan, self.job, part), part.weight)
        if isinstance(change, LowRank) and change.magnitude is not None:
            return DoraTerm.of(change, tensors, part.blocks[0], part.weight, self._read)
        if isinstance(change, LowRank):
            return LowRankTerm.of(change, tensors, part.blocks, part.weight)
        if isinstance(change, Added):
            return AddedTerm.of(change, tensors, part.blocks, part.weight)
        if isinstance(change, Rows):
            return RowsTerm.of(change, tensors, part.weight)
        assert isinstance(change, Whole)
        return WholeTerm(change, tensors, part.stacked, part.blocks, part.weight)

    def _read(self, begin: int, end: int) -> torch.Tensor:
        with opened(self.plan.base.weights.shard_of[self.job.source].path, base_unreadable) as file:
            return read_rows(file, self.job, begin, end).double()


def row_bytes(job: Job) -> int:
    """Bytes of one row of a job's matrix."""
    return job.stored.nbytes // job.rows


def read_rows(file: Opened, job: Job, begin: int, end: int, at: int | None = None) -> torch.Tensor:
    """Rows of a job's matrix, (end - begin, columns), as stored.

    Args:
        file: the base's shard, or the output's.
        job: whose rows.
        begin, end: which.
        at: where the tensor begins in the file, if not where the base has it.
    """
    width = row_bytes(job)
    raw = buffer_of((end - begin) * width)
    file.read_into(raw, (job.stored.begin if at is None else at) + begin * width)
    return raw.view(torch_dtype(job.stored.dtype)).view(end - begin, job.columns)


def exact_rows(terms: tuple[Term, ...], base: torch.Tensor, first: int) -> torch.Tensor:
    """The merged rows in double precision, of terms that were made for it."""
    original = base.double()
    result = original.clone()
    for term in terms:
        term.add(Window(result, original, first))
    return result


@dataclass
class Scratch(threading.local):
    """Each thread's buffers, kept for the next chunk: fresh memory costs more than the arithmetic.

    Attributes:
        elements: of a chunk, as a rule; a matrix with longer rows takes one row at a time.
    """

    elements: int

    def __post_init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, use: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised vector, the same memory for the same use."""
        import torch

        held = self._held.get((use, dtype))
        if held is None or held.numel() < count:
            held = self._held[use, dtype] = torch.empty(count, dtype=dtype)
        return held[:count]


@dataclass(frozen=True)
class Chunk:
    """Some rows of a job.

    Attributes:
        terms: of the job.
        begin, end: which rows.
    """

    terms: Terms
    begin: int
    end: int

    def merge(self, source: Opened, scratch: Scratch) -> torch.Tensor:
        """The merged rows' bytes, in a buffer that the thread's next chunk will reuse."""
        import torch

        job = self.terms.job
        shape = self.end - self.begin, job.columns
        raw = scratch.take("raw", shape[0] * row_bytes(job), torch.uint8)
        source.read_into(raw, job.stored.begin + self.begin * row_bytes(job))
        values = raw.view(torch_dtype(job.stored.dtype)).view(shape)
        dtype = torch.float64 if job.in_double else torch.float32
        base = sums = scratch.take("sums", values.numel(), dtype).view(shape).copy_(values)
        if not job.is_plain:
            base = scratch.take("base", values.numel(), dtype).view(shape).copy_(values)
        for term in self.terms.get():
            term.add(Window(sums, base, self.begin))
        # torch goes from double precision to 16 bits by way of 32: too near for a type of 11 bits.
        values.copy_(rounded(sums, values.dtype) if values.dtype is torch.float16 else sums)
        return raw


def chunks_of(plan: MergePlan, job: Job, elements: int) -> list[Chunk]:
    """A job cut into runs of rows of about that many elements."""
    if not job.rows:
        return []
    terms = Terms(plan, job)
    step = max(1, elements // job.columns)
    return [Chunk(terms, at, min(at + step, job.rows)) for at in range(0, job.rows, step)]
