"""Proof of a merge: what should be the base's is so bit for bit, and sampled rows are the exact result."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import SourceError, reraise_as
from graftkit.merging.arithmetic.compute import Terms, exact_rows, read_rows
from graftkit.merging.arithmetic.rounding import rounded
from graftkit.merging.errors import base_unreadable, output_unreadable
from graftkit.merging.io.read import Opened, buffer_of, opened, same_bytes
from graftkit.merging.io.shard_layout import ShardLayout, layout_of
from graftkit.merging.io.shard_writer import workers
from graftkit.merging.plan import Job, MergePlan
from graftkit.surveying.checkpoint.headers import INDEX
from graftkit.text import percent, size

if TYPE_CHECKING:
    import torch

# Rows of each changed tensor that are computed again.
_ROWS = 4
# Layers of each file that go through PEFT again: each costs as much as merging it did.
_LAYERS = 2
# So large a share of all elements may be the second-nearest value. A sample may have more of them by chance: so
# many standard deviations, and a handful where the sample is small.
MISROUNDED = 1e-4
_DEVIATIONS = 6
_HANDFUL = 3


@dataclass(frozen=True)
class Evidence:
    """What was looked at, and what was found.

    Attributes:
        unchanged_bytes: compared with the base, all of them.
        tensors: changed tensors of which rows were computed again.
        elements: of those rows.
        misrounded: of them, not the value nearest to the exact result.
        moved: of them, those that the update moves at all in exact arithmetic.
        swallowed: of those, unchanged because the checkpoint's type is too coarse for the update.
        problems: what is wrong, in words.
    """

    unchanged_bytes: int = 0
    tensors: int = 0
    elements: int = 0
    misrounded: int = 0
    moved: int = 0
    swallowed: int = 0
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def judged(self) -> Evidence:
        """With a problem where more elements are misrounded than chance explains."""
        usual = MISROUNDED * self.elements
        if self.misrounded <= usual + _DEVIATIONS * usual**0.5 + _HANDFUL:
            return self
        return self + Evidence(problems=(f"{self.misrounded} of {self.elements} sampled elements are misrounded",))

    def to_dict(self) -> dict[str, Any]:
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "problems": list(self.problems)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Evidence:
        return cls(**{**given, "problems": tuple(given["problems"])})

    def __str__(self) -> str:
        if self.problems:
            return "\n".join(("not a correct merge:", *(f"  {problem}" for problem in self.problems)))
        lost = percent(self.swallowed / self.moved) if self.moved else "0 %"
        return (
            f"verified: {size(self.unchanged_bytes)} are the base's bit for bit; {self.elements:,} sampled "
            f"elements of {self.tensors} tensors computed again, {self.misrounded} misrounded; "
            f"{lost} of the update is below the checkpoint's precision"
        )


def verify_shard(plan: MergePlan, layout: ShardLayout, path: Path, pool: Executor) -> Evidence:
    """Check one output file against the base and the adapters, on the threads of ``pool``.

    Raises:
        SourceError, AdapterError, OutputError: a file cannot be read.
    """
    with opened(layout.shard.path, base_unreadable) as base, opened(path, output_unreadable) as out:
        if out.size != layout.size:
            return Evidence(problems=(f"{path.name}: {out.size} bytes, {layout.size} expected",))
        header = buffer_of(len(layout.header))
        out.read_into(header, 0)
        if header.numpy().tobytes() != layout.header:
            return Evidence(problems=(f"{path.name}: its header is not the base's",))

        def unchanged(span: tuple[int, int]) -> Evidence:
            same = same_bytes(base, out, *span, layout.shift)
            problems = () if same else (f"{path.name}: bytes that should be the base's are not",)
            return Evidence(unchanged_bytes=span[1] - span[0], problems=problems)

        def changed(job: Job) -> Evidence:
            return _changed(plan, job, base, out, layout.at[job.name])

        evidence = [*pool.map(unchanged, layout.unchanged), *pool.map(changed, _sampled(layout))]
    return sum(evidence, Evidence())


def _sampled(layout: ShardLayout) -> Iterator[Job]:
    """The jobs to compute again: all but those that cost a whole layer, and a few of these."""
    layers = 0
    for job in layout.jobs:
        whole = any(part.blocks is None for part in job.parts)
        layers += whole
        if job.rows and not (whole and layers > _LAYERS):
            yield job


def _changed(plan: MergePlan, job: Job, base: Opened, out: Opened, at: int) -> Evidence:
    terms = Terms(plan, job).get()
    evidence = Evidence(tensors=1)
    for row in _sample(job):
        before = read_rows(base, job, row, row + 1)
        after = read_rows(out, job, row, row + 1, at)
        evidence += _judge(job, before, after, exact_rows(terms, before, row))
    return evidence


def _sample(job: Job) -> list[int]:
    """A few rows, spread over the tensor, the same each time."""
    offset = zlib.crc32(job.name.encode())
    count = min(_ROWS, job.rows)
    stride = job.rows // count
    return [i * stride + (offset >> i) % stride for i in range(count)]


def _judge(job: Job, before: torch.Tensor, after: torch.Tensor, exact: torch.Tensor) -> Evidence:
    expected = rounded(exact, after.dtype)
    off = (_order(expected) - _order(after)).abs()
    moved = exact != before.double()
    problems: tuple[str, ...] = ()
    if not bool(after.isfinite().all()) and bool(before.isfinite().all()):
        problems = (f"{job.name}: values that are not finite",)
    elif bool((off > 1).any()):
        problems = (f"{job.name}: values that are not the merged ones",)
    return Evidence(
        elements=after.numel(),
        misrounded=int((off > 0).sum()),
        moved=int(moved.sum()),
        swallowed=int((moved & (after == before)).sum()),
        problems=problems,
    )


def _order(values: torch.Tensor) -> torch.Tensor:
    """Floating-point numbers as integers in the same order: neighbours differ by 1."""
    import torch

    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.contiguous().view(whole).long()
    magnitude = bits & torch.iinfo(whole).max
    return torch.where(bits < 0, -magnitude, magnitude)


def verify_folder(plan: MergePlan, folder: Path) -> Evidence:
    """Check a whole output folder: its files, its index, and every shard."""
    evidence = Evidence(problems=tuple(_files(plan, folder)))
    with ThreadPoolExecutor(workers()) as pool:
        for shard in plan.base.weights.shards:
            path = folder / shard.name
            if path.is_file():
                evidence += verify_shard(plan, layout_of(plan, shard), path, pool)
    return evidence.judged()


def _files(plan: MergePlan, folder: Path) -> Iterable[str]:
    weights = plan.base.weights
    expected = {shard.name for shard in weights.shards}
    found = {path.name for path in folder.glob("*.safetensors")}
    yield from (f"{name} is missing" for name in sorted(expected - found))
    yield from (f"{name} is not the base's" for name in sorted(found - expected))
    if weights.index is None:
        return
    index = folder / INDEX
    if not index.is_file():
        yield f"{INDEX} is missing"
    elif _json(index) != new_index(plan):
        yield f"{INDEX} does not describe the files"


def _json(path: Path) -> Any:
    """A file's content, None where it is no JSON."""
    with reraise_as(output_unreadable, path):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except ValueError:
        return None


def new_index(plan: MergePlan) -> dict[str, Any]:
    """The output's index: the base's, with the true size of all tensors and those that were added."""
    weights = plan.base.weights
    assert weights.index is not None
    index = dict(weights.index)
    homes, metadata = index["weight_map"], index.get("metadata")
    assert isinstance(homes, dict)
    added = {name: weights.shard_of[plan.jobs[name].source].name for name in plan.ties.untied}
    total = weights.total_size + sum(plan.jobs[name].stored.nbytes for name in added)
    known = metadata if isinstance(metadata, dict) else {}
    return {**index, "metadata": {**known, "total_size": total}, "weight_map": {**homes, **added}}


def read_choice(folder: Path, report: str) -> str | None:
    """What a merge chose for tied weights, from the report in its folder; None where that says nothing.

    Raises:
        SourceError: ``merge-report``: there is a report, and it cannot be read.
    """
    path = folder / report
    if not path.is_file():
        return None
    try:
        choice = json.loads(path.read_bytes()).get("tied")
    except (ValueError, AttributeError) as error:
        raise SourceError(
            "the merge's report cannot be read",
            where=str(path),
            why=str(error),
            help="say what was chosen for tied weights (tied=), or remove the file if nothing was",
            code="merge-report",
        ) from error
    return choice if isinstance(choice, str) else None
