"""Where everything goes in one output file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from graftkit.merging.checkpoint.shards import Shard
from graftkit.merging.plan import Job, MergePlan
from graftkit.surveying.checkpoint.safetensors_header import header_bytes

# Unchanged bytes are copied and compared in ranges of at most this size, so that several threads share the work.
_RANGE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ShardLayout:
    """One output file: the base's file, with some tensors changed in place and some added at its end.

    Attributes:
        shard: the base's file.
        header: the output's bytes up to its data; the base's own unless tensors are added.
        shift: how many bytes later the base's tensors lie in the output.
        jobs: changed tensors, in file order.
        at: changed tensor -> its first byte in the output.
        size: of the output, in bytes.
    """

    shard: Shard
    header: bytes = field(repr=False)
    shift: int
    jobs: tuple[Job, ...] = field(repr=False)
    at: Mapping[str, int] = field(repr=False)
    size: int

    @property
    def unchanged(self) -> list[tuple[int, int]]:
        """Byte ranges of the base's file that are copied as they are."""
        changed = {job.name for job in self.jobs}
        kept = [t for name, t in self.shard.tensors.items() if name not in changed and t.nbytes]
        runs: list[list[int]] = []
        for stored in sorted(kept, key=lambda t: t.begin):
            if runs and runs[-1][1] == stored.begin:
                runs[-1][1] = stored.end
            else:
                runs.append([stored.begin, stored.end])
        return [(at, min(at + _RANGE_BYTES, end)) for begin, end in runs for at in range(begin, end, _RANGE_BYTES)]


def layout_of(plan: MergePlan, shard: Shard) -> ShardLayout:
    """Lay out the output of one of the base's files."""
    jobs = tuple(sorted(plan.jobs_of(shard), key=lambda job: (job.stored.begin, job.name)))
    end = shard.size
    added = {}
    for job in jobs:
        if job.name in plan.ties.untied:
            added[job.name] = replace(job.stored, begin=end, end=end + job.stored.nbytes)
            end += job.stored.nbytes
    base = shard.header
    header = header_bytes({**base.tensors, **added}, base.metadata, len(base.raw)) if added else base.raw
    shift = len(header) - len(base.raw)
    at = {job.name: added.get(job.name, job.stored).begin + shift for job in jobs}
    return ShardLayout(shard, header, shift, jobs, MappingProxyType(at), end + shift)
