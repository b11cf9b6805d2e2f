"""``merge()``: write the merged checkpoint from files, tensor by tensor, without building the model."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftkit._version import __version__
from graftkit.adapters.file import AdapterFile, read_adapter
from graftkit.errors import MergeError, reraise_as
from graftkit.files import check_replaceable, write_text
from graftkit.merging.checkpoint.base import read_base
from graftkit.merging.checkpoint.tied_weights import untied_config
from graftkit.merging.errors import adapter_unreadable, base_unreadable
from graftkit.merging.io.read import Unreadable, copy_file, opened
from graftkit.merging.io.shard_layout import ShardLayout, layout_of
from graftkit.merging.io.shard_writer import Crew, crew, finish, write_shard
from graftkit.merging.io.staging import REPORT_NAME, Workplace, check_space, merge_stopped, workplace
from graftkit.merging.plan import MergePlan, Weighted, make_plan
from graftkit.merging.report import MergeReport, Progress
from graftkit.merging.verify import Evidence, new_index, read_choice, verify_folder, verify_shard
from graftkit.surveying.checkpoint.headers import INDEX

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
    progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Merge adapters into a checkpoint, file by file.

    The output has the base's files, names, order, types and metadata; only what an adapter changes differs, and
    each changed element is the exact result rounded to the base's type, in all but less than one of 10,000
    elements, which is then the second-nearest value. Memory holds a few megabytes a thread, and the tensors of
    the adapter that are in use; nothing grows with the model.

    The output appears, whole, at the end. After an interrupt of any kind the same call goes on after the last file
    that was finished.

    Args:
        base: a folder that ``save_pretrained`` wrote, or a hub id.
        adapter: a PEFT adapter's folder; or folders with weights: the sum of their updates, each times its weight.
        out: a folder that does not exist, is empty, or holds an earlier merge.
        tied: for an adapter on one of several modules that share a weight: ``"untie"`` gives each its own in the
            result, ``"share"`` changes the shared one; None refuses.
        verify: compare the result with the base and with a computation in double precision before publishing it.
        trust_remote_code: let code that the base brings run.
        revision: branch, tag or commit of a hub id.
        progress: called from time to time with how far it is, from any thread, one call at a time.

    Raises:
        SourceError, BuildError, AdapterError: the base or an adapter cannot be read, or no longer: what is whole
            by then stays for the next run.
        MergeError: an adapter cannot be merged, or does not fit: the code says why, the help what to do instead;
            ``merge-not-verified``: the result is wrong, and was not published.
        OutputError: the output cannot be written, or would replace files that are not a merge's.
    """
    started = time.perf_counter()
    target = Path(out).expanduser().resolve()
    _check_apart(target, [Path(path).expanduser().resolve() for path in (base, *_weights(adapter))])
    check_replaceable(target, REPORT_NAME)
    plan = plan_merge(base, adapter, out, tied=tied, trust_remote_code=trust_remote_code, revision=revision)
    with workplace(target) as place, reraise_as(merge_stopped, target):
        fingerprint = _fingerprint(plan, tied, verify)
        whole = place.whole(fingerprint)
        place.start(fingerprint, whole)
        companions = plan.base.companions
        check_space(target, plan.bytes + _sizes(companions) - sum(_size(place.files / name) for name in whole))
        run = _Run(plan, place, fingerprint, verify, dict(whole), _Meter(plan.bytes, progress))
        run.shards()
        evidence = run.evidence() if verify else None
        _take_along(companions, plan, place)
        seconds = time.perf_counter() - started
        report = MergeReport(plan, target, tied, seconds, tuple(sorted(whole)), evidence)
        write_text(place.files / REPORT_NAME, json.dumps(report.to_dict(), indent=2) + "\n")
        place.publish()
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
    """What :func:`merge` would do, from headers alone. Nothing is written.

    Raises:
        As :func:`merge`; MergeError ``merge-same-place`` where ``out`` is the base or an adapter.
    """
    weighted = tuple(Weighted(read_adapter(path), weight) for path, weight in _weights(adapter).items())
    read = read_base(base, trust_remote_code=trust_remote_code, revision=revision)
    if out is not None:
        _check_apart(Path(out).expanduser().resolve(), [read.folder, *(w.file.folder.resolve() for w in weighted)])
    return make_plan(read, weighted, tied)


def verify_merge(
    base: str | Path,
    adapter: Adapters,
    out: str | Path,
    *,
    tied: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Evidence:
    """Check an existing output again: it is what merging these adapters into this base gives.

    Args:
        base, adapter, trust_remote_code, revision: as for :func:`merge`.
        out: the merged checkpoint.
        tied: the choice that was made; by default the one that the output's report names.

    Raises:
        As :func:`plan_merge`. What is wrong with the output is no error: see ``Evidence.problems``.
    """
    folder = Path(out).expanduser()
    chosen = tied or read_choice(folder, REPORT_NAME)
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
        if out == path or path in out.parents or out in path.parents:
            raise MergeError(
                "the output lies in the same place as an input",
                where=str(out),
                why=f"{path} is read while the output is written, and stays as it is",
                help="name a folder of its own",
                code="merge-same-place",
            )


def _fingerprint(plan: MergePlan, tied: str | None, verify: bool) -> str:
    """What a merge depends on: a file from an interrupted run is used again only for the very same merge."""
    base = [
        (str(s.path), _stat(s.path, base_unreadable), hashlib.sha256(s.header.raw).hexdigest())
        for s in plan.base.weights.shards
    ]
    adapters = [(_adapter_print(w.file), w.weight) for w in plan.adapters]
    return hashlib.sha256(json.dumps([__version__, base, adapters, tied, verify]).encode()).hexdigest()


def _adapter_print(file: AdapterFile) -> list[Any]:
    return [
        str(file.folder.resolve()),
        _stat(file.weights_path, adapter_unreadable),
        json.dumps(dict(file.config), sort_keys=True),
    ]


def _stat(path: Path, unreadable: Unreadable) -> tuple[int, int]:
    with reraise_as(unreadable, path):
        stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _sizes(companions: Iterable[Path]) -> int:
    return sum(_stat(path, base_unreadable)[0] for path in companions)


def _size(path: Path) -> int:
    return path.stat().st_size


class _Meter:
    """Adds up what the threads have written, and reports it a few times a second."""

    def __init__(self, total: int, report: Callable[[Progress], None] | None) -> None:
        self._total, self._report = total, report
        self._done, self._started, self._told = 0, time.perf_counter(), 0.0
        self._lock = threading.Lock()

    def tick(self, shard: str, count: int) -> None:
        if self._report is None:
            return
        with self._lock:
            self._done += count
            now = time.perf_counter() - self._started
            if now - self._told >= _TELL_SECONDS or self._done == self._total:
                self._told = now
                self._report(Progress(shard, self._done, self._total, now))


_TELL_SECONDS = 0.1


@dataclass
class _Run:
    """One run over all files: while one is made durable and verified, the next is computed.

    Attributes:
        plan, place, fingerprint, verify: of the merge.
        whole: file -> what was noted of it, for files that are done.
        meter: for progress.
    """

    plan: MergePlan
    place: Workplace
    fingerprint: str
    verify: bool
    whole: dict[str, Any] = field(repr=False)
    meter: _Meter

    def shards(self) -> None:
        """Write every file that is not whole."""
        finishing: list[Future[None]] = []
        with crew() as threads, ThreadPoolExecutor(1) as finisher:
            try:
                for shard in self.plan.base.weights.shards:
                    layout = layout_of(self.plan, shard)
                    if shard.name in self.whole:
                        self.meter.tick(shard.name, layout.size)
                        continue
                    self._write(layout, threads)
                    finish(f for f in finishing if f.done())
                    finishing.append(finisher.submit(self._finish, layout, threads))
            finally:
                finish(finishing)

    def _write(self, layout: ShardLayout, threads: Crew) -> None:
        name = layout.shard.name
        write_shard(self.plan, layout, self.place.part(name), threads, lambda n: self.meter.tick(name, n))

    def _finish(self, layout: ShardLayout, threads: Crew) -> None:
        name = layout.shard.name
        evidence = Evidence()
        if self.verify:
            evidence = verify_shard(self.plan, layout, self.place.part(name), threads.checkers)
            self._check(evidence)
        self.place.finish(name)
        self.whole[name] = evidence.to_dict()
        self.place.note(self.fingerprint, self.whole)

    def evidence(self) -> Evidence:
        """All that the files' verification found.

        Raises:
            MergeError: ``merge-not-verified``.
        """
        evidence = sum((Evidence.from_dict(note) for note in self.whole.values()), Evidence()).judged()
        self._check(evidence)
        return evidence

    def _check(self, evidence: Evidence) -> None:
        if evidence.ok:
            return
        raise MergeError(
            "the merged checkpoint did not pass its verification, and was not published",
            where=str(self.place.target),
            why="; ".join(evidence.problems[:3]),
            help="run it again; if it stays, report it with the output of `graft env`",
            code="merge-not-verified",
        )


def _take_along(companions: Iterable[Path], plan: MergePlan, place: Workplace) -> None:
    """Configuration, tokenizer and the like as the base has them, and an index that tells the truth."""
    for path in companions:
        if path.name != REPORT_NAME:
            with opened(path, base_unreadable) as file:
                copy_file(file, place.files / path.name)
    if plan.ties.untied:
        path = place.files / "config.json"
        config = untied_config(plan.base.model, json.loads(path.read_bytes()))
        write_text(path, json.dumps(config, indent=2) + "\n")
    if plan.base.weights.index is not None:
        write_text(place.files / INDEX, json.dumps(new_index(plan), indent=2) + "\n")
