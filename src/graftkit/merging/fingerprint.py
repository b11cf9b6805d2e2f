"""What decides every byte that a merge writes, in a few characters."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from graftkit._version import __version__
from graftkit.adapters.file import AdapterFile
from graftkit.errors import reraise_as
from graftkit.merging.adapter.effects import Effects
from graftkit.merging.errors import adapter_unreadable, base_unreadable
from graftkit.merging.io.read import Unreadable
from graftkit.merging.plan import Job, MergePlan


def fingerprint(plan: MergePlan) -> str:
    """Hash a plan with its inputs: two plans of the same fingerprint write the same weight files.

    Raises:
        SourceError, AdapterError: an input no longer exists.
    """
    base = [
        (str(s.path), size_and_time(s.path, base_unreadable), hashlib.sha256(s.header.raw).hexdigest())
        for s in plan.base.weights.shards
    ]
    adapters = [(_of_adapter(w.file), w.weight) for w in plan.adapters]
    jobs = [_of_job(plan.jobs[name]) for name in sorted(plan.jobs)]
    compared = [__version__, base, adapters, jobs, sorted(plan.ties.untied.items())]
    return hashlib.sha256(json.dumps(compared).encode()).hexdigest()


def size_and_time(path: Path, unreadable: Unreadable) -> tuple[int, int]:
    """Return a file's size in bytes, and when it was last written, in nanoseconds.

    Raises:
        GraftError: the file no longer exists.
    """
    with reraise_as(unreadable, path):
        stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _of_adapter(file: AdapterFile) -> list[Any]:
    return [
        str(file.folder.resolve()),
        size_and_time(file.weights_path, adapter_unreadable),
        json.dumps(dict(file.config), sort_keys=True),
    ]


def _of_job(job: Job) -> list[Any]:
    parts = [[repr(p.change), p.param, repr(p.blocks), p.stacked, repr(p.saved)] for p in job.parts]
    effects = [_of_effects(p.effects) for p in job.parts]
    return [job.name, job.source, repr(job.stored), job.columns, parts, effects]


def _of_effects(effects: Effects) -> list[Any]:
    tensors = effects.tensors
    return [str(tensors.file.folder), effects.weight, sorted(tensors.replaced), sorted(tensors.converted)]
