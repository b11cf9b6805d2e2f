"""``merge()``: write the merged checkpoint from files, tensor by tensor, without building the model."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from graftkit._version import __version__
from graftkit.adapters.file import AdapterFile, read_adapter
from graftkit.adapters.record import RECORD_NAME, write_record
from graftkit.errors import MergeError, reraise_as
from graftkit.files import check_replaceable, overlap, write_text
from graftkit.merging.checkpoint.base import read_base
from graftkit.merging.checkpoint.tied_weights import untied_config
from graftkit.merging.errors import adapter_unreadable, base_unreadable
from graftkit.merging.io.read import Unreadable, copy_file, opened
from graftkit.merging.io.shard_layout import ShardLayout, layout_of
from graftkit.merging.io.shard_writer import WorkerPools, wait_for_all, worker_pools, write_shard
from graftkit.merging.io.staging import REPORT_NAME, StagingDir, check_space, merge_stopped, staging_dir
from graftkit.merging.merged_record import merged_record
from graftkit.merging.plan import MergePlan, WeightedAdapter, make_plan
from graftkit.merging.report import MergeReport
from graftkit.merging.verify import Evidence, new_index, recorded_choice, verify_folder, verify_shard
from graftkit.progress import Progress
from graftkit.surveying.checkpoint.headers import INDEX

# At most ten progress reports a second.
_REPORT_SECONDS = 0.1

Adapters = str | Path | Mapping[str, float] | Mapping[Path, float]


def merge(
    base: str | Path,
    adapter: Adapters,
    out: str | Path,
    *,
    tied: str | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Merge adapters into a checkpoint, file by file.

    The output has the base's files, names, order, dtypes and metadata; only what an adapter changes differs. Each
    changed element is computed in double precision and rounded once to the base's dtype: it is the value nearest
    to the exact result, also where base and update nearly cancel, unless two values are equally near within the
    rounding errors of double precision. Memory holds a few megabytes per thread and the adapter's tensors in use,
    whatever the size of the model.

    An adapter's ``graftkit.json`` is taken along, as that of a merged model (``graft probe`` reads it).
    The output appears at the end, complete. After an interrupt the same call resumes after the last finished file.

    Args:
        base: a folder that ``save_pretrained`` wrote, or a hub id.
        adapter: a PEFT adapter's folder; or a mapping of folders to weights: the sum of their updates, each times
            its weight.
        out: a folder that does not exist, is empty, or contains an earlier merge.
        tied: for an adapter on one of several modules that share a weight: ``"untie"`` gives each its own in the
            result, ``"share"`` changes the shared one; None refuses such an adapter.
        verify: before publishing, compare what must not change with the base, and a sample of each changed tensor
            with a second computation.
        trust_remote_code: run model code that comes with the base.
        revision: branch, tag or commit of a hub id.
        on_progress: called a few times a second with the file and the bytes written; from any thread, one call at
            a time.

    Raises:
        SourceError, BuildError, AdapterError: the base or an adapter cannot be read, or no longer; finished files
            are kept for the next run.
        MergeError: an adapter cannot be merged, or does not fit: the code gives the reason;
            ``merge-not-verified``: the result is wrong, and was not published.
        OutputError: the output cannot be written, or would replace files that are not from a merge.
    """
    started = time.perf_counter()
    target = Path(out).expanduser().resolve()
    _check_apart(target, [Path(path).expanduser().resolve() for path in (base, *_weights(adapter))])
    check_replaceable(target, REPORT_NAME)
    plan = plan_merge(base, adapter, out, tied=tied, trust_remote_code=trust_remote_code, revision=revision)
    with staging_dir(target) as staging, reraise_as(merge_stopped, target):
        fingerprint = _fingerprint(plan, tied, verify)
        finished = staging.start(fingerprint)
        companions = plan.base.companions
        needed = plan.bytes + sum(_stat(path, base_unreadable)[0] for path in companions)
        check_space(target, needed - sum((staging.files / name).stat().st_size for name in finished))
        run = _Run(plan, staging, fingerprint, verify, dict(finished), _ProgressMeter(plan.bytes, on_progress))
        run.shards()
        evidence = run.evidence() if verify else None
        _write_companions(companions, plan, staging)
        seconds = time.perf_counter() - started
        report = MergeReport(plan, target, tied, seconds, tuple(sorted(finished)), evidence)
        write_text(staging.files / REPORT_NAME, json.dumps(report.to_dict(), indent=2) + "\n")
        staging.publish()
    return report


def plan_merge(
    base: str | Path,
    adapter: Adapters,
    out: str | Path | None = None,
    *,
    tied: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> MergePlan:
    """Plan what :func:`merge` would do, from headers alone, without writing anything.

    Raises:
        As :func:`merge`; MergeError ``merge-same-place`` where ``out`` is the base or an adapter.
    """
    weighted = tuple(WeightedAdapter(read_adapter(path), weight) for path, weight in _weights(adapter).items())
    source = read_base(base, trust_remote_code=trust_remote_code, revision=revision)
    if out is not None:
        inputs = [source.folder, *(adapter.file.folder.resolve() for adapter in weighted)]
        _check_apart(Path(out).expanduser().resolve(), inputs)
    return make_plan(source, weighted, tied)


def verify_merge(
    base: str | Path,
    adapter: Adapters,
    out: str | Path,
    *,
    tied: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Evidence:
    """Check whether an existing checkpoint is what merging these adapters into this base gives: every element.

    No element may be farther from the exact result than its rounding and the errors of a sum in single precision
    explain, and fewer than one in 10,000 farther than those of one in double precision.

    Args:
        base, adapter, trust_remote_code, revision: as for :func:`merge`.
        out: the merged checkpoint.
        tied: the choice that was made for tied weights; by default the one in the output's report.

    Raises:
        As :func:`plan_merge`. What is wrong with the output is not an error: see ``Evidence.problems``.
    """
    folder = Path(out).expanduser()
    chosen = tied or recorded_choice(folder / REPORT_NAME)
    plan = plan_merge(base, adapter, tied=chosen, trust_remote_code=trust_remote_code, revision=revision)
    return verify_folder(plan, folder)


def _weights(adapter: Adapters) -> dict[Path, float]:
    if isinstance(adapter, str | Path):
        return {Path(adapter): 1.0}
    if not adapter:
        raise MergeError("no adapter to merge", help="name at least one", code="merge-no-adapter")
    return {Path(path): float(weight) for path, weight in adapter.items()}


def _check_apart(out: Path, inputs: list[Path]) -> None:
    for path in inputs:
        if overlap(out, path):
            raise MergeError(
                "the output overlaps with an input",
                where=str(out),
                why=f"{path} is read while the output is written, and must not change",
                help="name another folder",
                code="merge-same-place",
            )


def _fingerprint(plan: MergePlan, tied: str | None, verify: bool) -> str:
    """Hash what a merge depends on: files of an interrupted run are reused only for the same merge."""
    base = [
        (str(s.path), _stat(s.path, base_unreadable), hashlib.sha256(s.header.raw).hexdigest())
        for s in plan.base.weights.shards
    ]
    adapters = [(_adapter_fingerprint(w.file), w.weight) for w in plan.adapters]
    return hashlib.sha256(json.dumps([__version__, base, adapters, tied, verify]).encode()).hexdigest()


def _adapter_fingerprint(file: AdapterFile) -> list[Any]:
    return [
        str(file.folder.resolve()),
        _stat(file.weights_path, adapter_unreadable),
        json.dumps(dict(file.config), sort_keys=True),
    ]


def _stat(path: Path, unreadable: Unreadable) -> tuple[int, int]:
    with reraise_as(unreadable, path):
        stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class _ProgressMeter:
    """Adds up the bytes that the threads write, and reports them a few times a second."""

    def __init__(self, total: int, on_progress: Callable[[Progress], None] | None) -> None:
        self._total, self._on_progress = total, on_progress
        self._done, self._reported = 0, 0.0
        self._lock = threading.Lock()

    def add(self, shard: str, count: int) -> None:
        if self._on_progress is None:
            return
        with self._lock:
            self._done += count
            now = time.perf_counter()
            if now - self._reported >= _REPORT_SECONDS or self._done == self._total:
                self._reported = now
                self._on_progress(Progress(shard, self._done, self._total))


@dataclass
class _Run:
    """One run over all files: while one is synced and verified, the next is computed.

    Attributes:
        finished: file name -> its evidence as JSON, for files that are done.
    """

    plan: MergePlan
    staging: StagingDir
    fingerprint: str
    verify: bool
    finished: dict[str, Any] = field(repr=False)
    meter: _ProgressMeter

    def shards(self) -> None:
        """Write every file that is not finished."""
        finishing: list[Future[None]] = []
        with worker_pools() as pools, ThreadPoolExecutor(1) as finisher:
            try:
                for shard in self.plan.base.weights.shards:
                    layout = layout_of(self.plan, shard)
                    on_bytes = partial(self.meter.add, shard.name)
                    if shard.name in self.finished:
                        on_bytes(layout.size)
                        continue
                    write_shard(self.plan, layout, self.staging.unfinished(shard.name), pools, on_bytes)
                    wait_for_all(f for f in finishing if f.done())
                    finishing.append(finisher.submit(self._finish, layout, pools))
            finally:
                wait_for_all(finishing)

    def _finish(self, layout: ShardLayout, pools: WorkerPools) -> None:
        name = layout.shard.name
        evidence = Evidence()
        if self.verify:
            evidence = verify_shard(self.plan, layout, self.staging.unfinished(name), pools.verifiers)
            self._check(evidence)
        self.staging.finish(name)
        self.finished[name] = evidence.to_dict()
        self.staging.record(self.fingerprint, self.finished)

    def evidence(self) -> Evidence:
        """Return what the verification of all files found.

        Raises:
            MergeError: ``merge-not-verified``.
        """
        evidence = sum((Evidence.from_dict(record) for record in self.finished.values()), Evidence()).judged()
        self._check(evidence)
        return evidence

    def _check(self, evidence: Evidence) -> None:
        if evidence.ok:
            return
        raise MergeError(
            "the merged checkpoint did not pass its verification, and was not published",
            where=str(self.staging.target),
            why="; ".join(evidence.problems[:3]),
            help="run it again; if it fails again, report it with the output of `graft env`",
            code="merge-not-verified",
        )


def _write_companions(companions: Iterable[Path], plan: MergePlan, staging: StagingDir) -> None:
    """Copy the base's configuration, tokenizer and other small files; write the output's own index and record."""
    for path in companions:
        if path.name not in (REPORT_NAME, RECORD_NAME):
            with opened(path, base_unreadable) as file:
                copy_file(file, staging.files / path.name)
    if plan.ties.untied:
        path = staging.files / "config.json"
        config = untied_config(plan.base.model, json.loads(path.read_bytes()))
        write_text(path, json.dumps(config, indent=2) + "\n")
    if plan.base.weights.index is not None:
        write_text(staging.files / INDEX, json.dumps(new_index(plan), indent=2) + "\n")
    record = merged_record([(adapter.file.folder, adapter.weight) for adapter in plan.adapters])
    if record is not None:
        write_record(staging.files, record)
