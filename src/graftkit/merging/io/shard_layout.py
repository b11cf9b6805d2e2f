"""Where everything goes in one output file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from graftkit.merging.checkpoint.shards import Shard
from graftkit.merging.plan import Job, MergePlan

_ALIGNMENT = 8
# Unchanged bytes are copied and compared in ranges of at most this size, so that several threads share the work.
_RANGE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Layout:
    """One output file: the base's file, with some tensors changed in place and some added at its end.

    Attributes:
        shard: the base's file.
        header: the output's first bytes; the base's own unless tensors are added.
        shift: how much further on the base's tensors lie in the output.
        jobs: changed tensors, in file order.
        at: changed tensor -> where it begins in the output.
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
        """The ranges of the base's file that are copied as they are."""
        changed = {job.name for job in self.jobs}
        kept = [t for name, t in self.shard.tensors.items() if name not in changed and t.nbytes]
        runs: list[list[int]] = []
        for stored in sorted(kept, key=lambda t: t.begin):
            if runs and runs[-1][1] == stored.begin:
                runs[-1][1] = stored.end
            else:
                runs.append([stored.begin, stored.end])
        return [(at, min(at + _RANGE_BYTES, end)) for begin, end in runs for at in range(begin, end, _RANGE_BYTES)]


def lay_out(plan: MergePlan, shard: Shard) -> Layout:
    """Lay out the output of one of the base's files."""
    jobs = tuple(sorted(plan.jobs_of(shard), key=lambda job: (job.stored.begin, job.name)))
    added = [job for job in jobs if job.name in plan.ties.untied]
    header = _header(shard, added) if added else shard.header
    shift = len(header) - len(shard.header)
    at = {job.name: job.stored.begin + shift for job in jobs if job.name not in plan.ties.untied}
    end = shard.size + shift
    for job in added:
        at[job.name] = end
        end += job.stored.nbytes
    return Layout(shard, header, shift, jobs, MappingProxyType(at), end)


def _header(shard: Shard, added: list[Job]) -> bytes:
    """The base's header with more tensors at its end."""
    entries = json.loads(shard.header[8:])
    end = shard.size - len(shard.header)
    for job in added:
        offsets = [end, end + job.stored.nbytes]
        entries[job.name] = {"dtype": job.stored.dtype, "shape": list(job.stored.shape), "data_offsets": offsets}
        end += job.stored.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
