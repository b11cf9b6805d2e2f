"""Verify a merge: unchanged tensors equal the base's bit for bit, and changed ones are the exact result, rounded.

Each element is judged by the error that is possible there. Where base and update nearly cancel, their sum is small
and its possible error is not: there the nearest value cannot be demanded of a sum in single precision.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import SourceError, reraise_as
from graftkit.merging.arithmetic.compute import Terms, error_rows, exact_rows, read_rows
from graftkit.merging.arithmetic.rounding import rounded
from graftkit.merging.arithmetic.terms import Term
from graftkit.merging.errors import base_unreadable, output_unreadable
from graftkit.merging.io.direct_reader import opened_direct, same_bytes
from graftkit.merging.io.read import bytes_of, opened
from graftkit.merging.io.shard_layout import ShardLayout, layout_of
from graftkit.merging.io.shard_writer import chunk_elements, workers
from graftkit.merging.plan import Job, MergePlan
from graftkit.surveying.checkpoint.headers import INDEX
from graftkit.text import percent, size

if TYPE_CHECKING:
    import torch

# Rows of each changed tensor that a sample has; one of each block is added.
_ROWS = 4
# Layers of each file that PEFT merges a second time: each costs as much as the first time.
_LAYERS = 2
# Rounding errors: no element may be farther off than the first explains; any that is farther off than the second
# is misrounded.
_SINGLE, _DOUBLE = 2.0**-24, 2.0**-53
# The share of all elements that may be misrounded. A sample may have more by chance: this many standard
# deviations, and a few where the sample is small.
MISROUNDED = 1e-4
_DEVIATIONS = 6
_FEW = 3


@dataclass(frozen=True)
class Evidence:
    """What a verification compared, and what it found.

    Attributes:
        unchanged_bytes: bytes that were compared with the base.
        tensors: changed tensors of which rows were recomputed.
        elements: number of elements in those rows.
        misrounded: elements that are not the value nearest to the exact result, but within the possible error of
            single precision.
        moved: elements that the update changes in exact arithmetic.
        swallowed: those of ``moved`` that are unchanged because the checkpoint's dtype is too coarse.
        overflown: infinite elements whose exact result is too large for the checkpoint's dtype.
        problems: what is wrong, for people.
    """

    unchanged_bytes: int = 0
    tensors: int = 0
    elements: int = 0
    misrounded: int = 0
    moved: int = 0
    swallowed: int = 0
    overflown: int = 0
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def judged(self) -> Evidence:
        """Return this evidence, with a problem added if more elements are misrounded than chance explains."""
        usual = MISROUNDED * self.elements
        if self.misrounded <= usual + _DEVIATIONS * usual**0.5 + _FEW:
            return self
        return self + Evidence(problems=(f"{self.misrounded} of {self.elements} elements are misrounded",))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "problems": list(self.problems)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Evidence:
        return cls(**{**given, "problems": tuple(given["problems"])})

    def __str__(self) -> str:
        if self.problems:
            return "\n".join(("not a correct merge:", *(f"  {problem}" for problem in self.problems)))
        lost = percent(self.swallowed / self.moved) if self.moved else "0 %"
        return (
            f"verified: {size(self.unchanged_bytes)} equal the base bit for bit; {self.elements:,} "
            f"elements of {self.tensors} tensors recomputed, {self.misrounded} misrounded; "
            f"{lost} of the update is below the checkpoint's precision"
        )


# Says which rows of which changed tensors are recomputed.
Selection = Callable[[ShardLayout], Iterable[tuple[Job, Sequence[range]]]]


def sampled(layout: ShardLayout) -> Iterator[tuple[Job, list[range]]]:
    """Select a few rows of all tensors that can be recomputed by rows, and of a few that need the whole update."""
    dense = 0
    for job in layout.jobs:
        is_dense = any(part.blocks is None for part in job.parts)
        dense += is_dense
        if job.rows and not (is_dense and dense > _LAYERS):
            yield job, [range(row, row + 1) for row in _sample(job)]


def every_element(layout: ShardLayout) -> Iterator[tuple[Job, list[range]]]:
    """Select all rows of every changed tensor."""
    for job in layout.jobs:
        step = max(1, chunk_elements() // job.columns) if job.rows else 1
        yield job, [range(at, min(at + step, job.rows)) for at in range(0, job.rows, step)]


def verify_shard(
    plan: MergePlan, layout: ShardLayout, path: Path, pool: Executor, selection: Selection = sampled
) -> Evidence:
    """Check one output file against the base and the adapters, on the threads of ``pool``.

    Args:
        plan: of the merge.
        layout: of this file.
        path: the file.
        pool: the threads to use.
        selection: what is recomputed; all bytes that do not change are compared in any case.

    Raises:
        SourceError, AdapterError, OutputError: a file cannot be read.
    """
    with (
        opened(layout.shard.path, base_unreadable) as base,
        opened(path, output_unreadable) as out,
        opened_direct(path, output_unreadable) as on_disk,
    ):
        if out.size != layout.size:
            return Evidence(problems=(f"{path.name}: {out.size} bytes, {layout.size} expected",))
        if bytes_of(out.read(0, len(layout.header))) != layout.header:
            return Evidence(problems=(f"{path.name}: its header differs from the base's",))

        def unchanged(span: tuple[int, int]) -> Evidence:
            same = same_bytes(base, on_disk, *span, layout.shift)
            problems = () if same else (f"{path.name}: bytes outside the changed tensors differ from the base",)
            return Evidence(unchanged_bytes=span[1] - span[0], problems=problems)

        def changed(selected: tuple[Job, Sequence[range]]) -> Evidence:
            job, ranges = selected
            evidence, terms = Evidence(tensors=1), Terms(plan, job).get()
            for rows in ranges:
                before = read_rows(base, job, rows.start, rows.stop)
                after = read_rows(out, job, rows.start, rows.stop, layout.at[job.name])
                evidence += _judge(_Rows(job, terms, rows.start, before, after))
            wrong = tuple(dict.fromkeys(evidence.problems))
            return replace(evidence, problems=wrong)

        evidence = [*pool.map(unchanged, layout.unchanged), *pool.map(changed, selection(layout))]
    return sum(evidence, Evidence())


def _sample(job: Job) -> list[int]:
    """Return a few rows spread over the tensor, and one of each block, the same ones every time."""
    offset = zlib.crc32(job.name.encode())
    count = min(_ROWS, job.rows)
    stride = job.rows // count
    spread = {i * stride + (offset >> i) % stride for i in range(count)}
    blocks = [block for part in job.parts for block in part.blocks or ()]
    return sorted(spread | {block.row + offset % block.height for block in blocks})


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of a tensor, as they were and as they are.

    Attributes:
        first: index of the first one.
        before, after: (n, columns), in the stored dtype.
    """

    job: Job
    terms: tuple[Term, ...]
    first: int
    before: torch.Tensor
    after: torch.Tensor


def _judge(rows: _Rows) -> Evidence:
    before, after = rows.before, rows.after
    exact = exact_rows(rows.terms, before, rows.first)
    off = rounded(exact, after.dtype) != after
    moved = exact != before.double()
    misrounded = 0
    overflown = int((after.isinf() & exact.isfinite()).sum())
    kind = str(after.dtype).removeprefix("torch.")
    problems: tuple[str, ...] = (f"{rows.job.name}: values larger than {kind} can hold",) if overflown else ()
    if bool(off.any()):
        misrounded, further = _misrounded(rows, exact)
        problems += further
    return Evidence(
        elements=after.numel(),
        misrounded=misrounded,
        moved=int(moved.sum()),
        swallowed=int((moved & (after == before)).sum()),
        overflown=overflown,
        problems=problems,
    )


def _misrounded(rows: _Rows, exact: torch.Tensor) -> tuple[int, tuple[str, ...]]:
    """Count the elements that are off by more than double precision explains; say if any is off by even more."""
    before, after = rows.before, rows.after
    if not bool(after.isfinite().all()) and bool(before.isfinite().all()):
        return int((~after.isfinite()).sum()), (f"{rows.job.name}: values that are not finite",)
    units = error_rows(rows.terms, before, rows.first)
    misrounded, wrong = (int(_outside(after, exact, units * unit).sum()) for unit in (_DOUBLE, _SINGLE))
    if not wrong:
        return misrounded, ()
    return misrounded, (f"{rows.job.name}: values differ from the merged ones",)


def _outside(after: torch.Tensor, exact: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Find the values that are not a rounding of any number within ``error`` of the exact one."""
    lowest, highest = rounded(exact - error, after.dtype), rounded(exact + error, after.dtype)
    return ~((lowest <= after) & (after <= highest)) & ~(exact.isnan() & after.isnan())


def verify_folder(plan: MergePlan, folder: Path) -> Evidence:
    """Check a whole output folder: its files, its index, and every element of every shard."""
    evidence = Evidence(problems=tuple(_files(plan, folder)))
    with ThreadPoolExecutor(workers()) as pool:
        for shard in plan.base.weights.shards:
            path = folder / shard.name
            if path.is_file():
                evidence += verify_shard(plan, layout_of(plan, shard), path, pool, every_element)
    return evidence.judged()


def _files(plan: MergePlan, folder: Path) -> Iterable[str]:
    weights = plan.base.weights
    expected = {shard.name for shard in weights.shards}
    found = {path.name for path in folder.glob("*.safetensors")}
    yield from (f"{name} is missing" for name in sorted(expected - found))
    yield from (f"{name} is not in the base" for name in sorted(found - expected))
    if weights.index is None:
        return
    index = folder / INDEX
    if not index.is_file():
        yield f"{INDEX} is missing"
    elif _json(index) != new_index(plan):
        yield f"{INDEX} does not describe the files"


def _json(path: Path) -> Any:
    """Return a file's content, or None if it is not valid JSON."""
    with reraise_as(output_unreadable, path):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except ValueError:
        return None


def new_index(plan: MergePlan) -> dict[str, Any]:
    """Return the output's index: the base's, with the actual size of all tensors and those that were added."""
    weights = plan.base.weights
    assert weights.index is not None
    index = dict(weights.index)
    weight_map, metadata = index["weight_map"], index.get("metadata")
    assert isinstance(weight_map, dict)
    added = {name: weights.shard_of[plan.jobs[name].source].name for name in plan.ties.untied}
    total = weights.total_size + sum(plan.jobs[name].stored.nbytes for name in added)
    known = metadata if isinstance(metadata, dict) else {}
    return {**index, "metadata": {**known, "total_size": total}, "weight_map": {**weight_map, **added}}


def recorded_choice(path: Path) -> str | None:
    """Return the choice for tied weights in a merge's report, or None where there is none.

    Raises:
        SourceError: ``merge-report``: there is a report, and it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        choice = json.loads(path.read_bytes()).get("tied")
    except (ValueError, AttributeError) as error:
        raise SourceError(
            "the merge's report cannot be read",
            where=str(path),
            why=str(error),
            help="pass the choice for tied weights (tied=), or remove the file if none was made",
            code="merge-report",
        ) from error
    return choice if isinstance(choice, str) else None
