"""The merge of one changed tensor, in chunks of rows: read, add, round."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from graftkit.merging.arithmetic.changes import PeftLayer
from graftkit.merging.arithmetic.dense import update_of
from graftkit.merging.arithmetic.rounding import round_into
from graftkit.merging.arithmetic.terms import DenseTerm, OnSavedTerm, Target, Term, Window
from graftkit.merging.checkpoint.shards import torch_dtype
from graftkit.merging.errors import base_unreadable
from graftkit.merging.io.read import Opened, opened
from graftkit.merging.plan import Job, MergePlan, Part

if TYPE_CHECKING:
    import torch


@dataclass
class Terms:
    """A job's terms, created by the first thread that needs them and freed with the last chunk that uses them."""

    plan: MergePlan
    job: Job
    _terms: tuple[Term, ...] | None = field(default=None, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def get(self) -> tuple[Term, ...]:
        with self._lock:
            if self._terms is None:
                self._terms = tuple(self._term(part) for part in self.job.parts)
            return self._terms

    def _term(self, part: Part) -> Term:
        if part.blocks is None or isinstance(part.change, PeftLayer):
            return DenseTerm(update_of(self.plan, self.job, part), part.effects.weight)
        target = Target(part.blocks, part.stacked, self._read)
        tensors, weight = part.effects.tensors, part.effects.weight
        if part.saved is None:
            return part.change.term(tensors, target, weight)
        saved = part.saved.term(tensors, target, weight)
        on_saved = replace(target, read=lambda begin, end: saved.in_place_of(self._read(begin, end), begin))
        return OnSavedTerm(part.change.term(tensors, on_saved, weight), saved)

    def _read(self, begin: int, end: int) -> torch.Tensor:
        with opened(self.plan.base.weights.shard_of[self.job.source].path, base_unreadable) as file:
            return read_rows(file, self.job, begin, end).double()


def read_rows(file: Opened, job: Job, begin: int, end: int, at: int | None = None) -> torch.Tensor:
    """Read rows ``begin`` to ``end`` of a job's matrix, (end - begin, columns), in the stored dtype.

    Args:
        file: the base's shard, or the output's.
        at: position of the tensor's first byte in the file; None: as in the base.
    """
    first = (job.stored.begin if at is None else at) + begin * job.row_bytes
    raw = file.read(first, (end - begin) * job.row_bytes)
    return raw.view(torch_dtype(job.stored.dtype)).view(end - begin, job.columns)


def exact_rows(terms: tuple[Term, ...], base: torch.Tensor, first: int) -> torch.Tensor:
    """Return the merged rows in double precision.

    Args:
        terms: of the job.
        base: the base's rows, (n, columns).
        first: index of the first row.
    """
    original = base.double()
    result = original.clone()
    for term in terms:
        term.add(Window(result, original, first))
    return result


def error_rows(terms: tuple[Term, ...], base: torch.Tensor, first: int) -> torch.Tensor:
    """Return the largest error that computing merged rows can make, whoever does it, before they are stored.

    Args:
        terms, base, first: as for :func:`exact_rows`.

    Returns:
        (n, columns), float64, in units of the rounding error: 2**-24 where it is done in single precision.
    """
    import torch

    original = base.double()
    result, units = original.clone(), torch.zeros_like(original)
    for term in terms:
        window = Window(result, original, first)
        term.errors(window, units)
        term.add(window)
    # Each term is added to a sum that is at most the final one and all terms; these are in `units` 4 times.
    sums = len(terms) * (result.abs() + units / 4)
    return torch.where(units > 0, units + sums, 0.0)


@dataclass
class Scratch(threading.local):
    """Each thread's buffers, reused for the next chunk: new memory costs more than the arithmetic.

    Attributes:
        elements: the usual size of a chunk; a matrix with longer rows takes one row at a time.
    """

    elements: int

    def __post_init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, use: str, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized vector; the same use gets the same memory."""
        import torch

        buffer = self._buffers.get((use, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[use, dtype] = torch.empty(count, dtype=dtype)
        return buffer[:count]


@dataclass(frozen=True)
class Chunk:
    """Rows ``begin`` to ``end`` of a job."""

    terms: Terms
    begin: int
    end: int

    def merge(self, source: Opened, scratch: Scratch) -> torch.Tensor:
        """Return the merged rows' bytes, in a buffer that the thread's next chunk will reuse."""
        import torch

        job = self.terms.job
        shape = self.end - self.begin, job.columns
        raw = scratch.take("raw", shape[0] * job.row_bytes, torch.uint8)
        source.read_into(raw, job.stored.begin + self.begin * job.row_bytes)
        values = raw.view(torch_dtype(job.stored.dtype)).view(shape)
        base = sums = scratch.take("sums", values.numel(), torch.float64).view(shape).copy_(values)
        if not job.is_plain:
            base = scratch.take("base", values.numel(), torch.float64).view(shape).copy_(values)
        for term in self.terms.get():
            term.add(Window(sums, base, self.begin))
        round_into(sums, values)
        return raw


def chunks_of(plan: MergePlan, job: Job, elements: int) -> list[Chunk]:
    """Cut a job into chunks of about that many elements."""
    if not job.rows:
        return []
    terms = Terms(plan, job)
    step = max(1, elements // job.columns)
    return [Chunk(terms, at, min(at + step, job.rows)) for at in range(0, job.rows, step)]
