"""One run of a merge: every file written, verified, synced and published, whatever the plan."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from graftkit.adapters.file import RECORD_NAME
from graftkit.errors import MergeError, reraise_as
from graftkit.files import write_text
from graftkit.merging.checkpoint.tied_weights import untied_config
from graftkit.merging.confirmation import Confirmation, RejectedError
from graftkit.merging.errors import base_unreadable
from graftkit.merging.fingerprint import fingerprint, size_and_time
from graftkit.merging.io.read import copy_file, opened
from graftkit.merging.io.shard_layout import ShardLayout, layout_of
from graftkit.merging.io.shard_writer import WorkerPools, wait_for_all, worker_pools, write_shard
from graftkit.merging.io.staging import REPORT_NAME, StagingDir, check_space, merge_stopped, staging_dir
from graftkit.merging.plan import MergePlan
from graftkit.merging.report import MergeReport
from graftkit.merging.verify import Evidence, new_index, verify_shard
from graftkit.progress import Progress
from graftkit.surveying.checkpoint.headers import INDEX

# At most ten progress reports a second.
_REPORT_SECONDS = 0.1


@dataclass(frozen=True)
class MergeWriter:
    """What is written, and how, whatever the plan.

    Attributes:
        target: the folder to write.
        started: when the call began.
    """

    target: Path
    tied: str | None
    verify: bool
    on_progress: Callable[[Progress], None] | None
    started: float

    def write(self, plan: MergePlan, confirmation: Confirmation | None) -> MergeReport:
        """Write and publish a plan's output.

        Args:
            confirmation: of a draft; it is published only once it is the plan.

        Raises:
            RejectedError: it is not; nothing is left.
            GraftError: as :func:`merge`.
        """
        with staging_dir(self.target) as staging, reraise_as(merge_stopped, self.target):
            try:
                return self._write(plan, staging, confirmation)
            except RejectedError:
                staging.remove()
                raise

    def _write(self, plan: MergePlan, staging: StagingDir, confirmation: Confirmation | None) -> MergeReport:
        key = f"{fingerprint(plan)} {'verified' if self.verify else 'not verified'}"
        finished = staging.start(key)
        companions = plan.base.companions
        needed = plan.bytes + sum(size_and_time(path, base_unreadable)[0] for path in companions)
        check_space(self.target, needed - sum((staging.files / name).stat().st_size for name in finished))
        meter = _ProgressMeter(plan.bytes, self.on_progress)
        check = (lambda: None) if confirmation is None else confirmation.check
        run = _Run(plan, staging, key, self.verify, dict(finished), meter, check)
        run.shards()
        evidence = run.evidence() if self.verify else None
        if confirmation is not None:
            plan = confirmation.plan()
        _write_companions(companions, plan, staging)
        seconds = time.perf_counter() - self.started
        report = MergeReport(plan, self.target, self.tied, seconds, tuple(sorted(finished)), evidence)
        write_text(staging.files / REPORT_NAME, json.dumps(report.to_dict(), indent=2) + "\n")
        staging.publish()
        return report


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
        key: which merge it is: files that an earlier run of the same one has finished are done.
        finished: file name -> its evidence as JSON, for files that are done.
        check: raises where there is no point in going on.
    """

    plan: MergePlan
    staging: StagingDir
    key: str
    verify: bool
    finished: dict[str, Any] = field(repr=False)
    meter: _ProgressMeter
    check: Callable[[], None]

    def shards(self) -> None:
        """Write every file that is not finished."""
        finishing: list[Future[None]] = []
        with worker_pools() as pools, ThreadPoolExecutor(1) as finisher:
            try:
                for shard in self.plan.base.weights.shards:
                    layout = layout_of(self.plan, shard)
                    on_bytes = partial(self._written, shard.name)
                    if shard.name in self.finished:
                        on_bytes(layout.size)
                        continue
                    write_shard(self.plan, layout, self.staging.unfinished(shard.name), pools, on_bytes)
                    wait_for_all(f for f in finishing if f.done())
                    finishing.append(finisher.submit(self._finish, layout, pools))
            finally:
                wait_for_all(finishing)

    def _written(self, shard: str, count: int) -> None:
        self.check()
        self.meter.add(shard, count)

    def _finish(self, layout: ShardLayout, pools: WorkerPools) -> None:
        name = layout.shard.name
        evidence = Evidence()
        if self.verify:
            evidence = verify_shard(self.plan, layout, self.staging.unfinished(name), pools.verifiers)
            self._check(evidence)
        self.staging.finish(name)
        self.finished[name] = evidence.to_dict()
        self.staging.record(self.key, self.finished)

    def evidence(self) -> Evidence:
        """Return what the verification of all files found.

        Raises:
            MergeError: ``merge-not-verified`` or ``merge-overflow``.
        """
        evidence = sum((Evidence.from_dict(record) for record in self.finished.values()), Evidence()).judged()
        self._check(evidence)
        return evidence

    def _check(self, evidence: Evidence) -> None:
        if evidence.ok:
            return
        where, why = str(self.staging.target), "; ".join(evidence.problems[:3])
        if evidence.overflown:
            raise MergeError(
                "the merged values do not fit into the checkpoint's dtype, and nothing was published",
                where=where,
                why=why,
                help="check the adapter's lora_alpha and values: training gives none of this size; where they are "
                "right, merge into a copy of the base in bfloat16 or float32",
                code="merge-overflow",
            )
        raise MergeError(
            "the merged checkpoint did not pass its verification, and was not published",
            where=where,
            why=why,
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
    if any((adapter.file.folder / RECORD_NAME).exists() for adapter in plan.adapters):
        _write_record(plan, staging)


def _write_record(plan: MergePlan, staging: StagingDir) -> None:
    from graftkit.adapters.record import write_record
    from graftkit.merging.merged_record import merged_record

    record = merged_record([(adapter.file.folder, adapter.weight) for adapter in plan.adapters])
    if record is not None:
        write_record(staging.files, record)
