"""``merge()``: write the merged checkpoint from files, tensor by tensor, without building the model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from graftkit.adapters.file import read_adapter
from graftkit.errors import GraftError, MergeError
from graftkit.files import check_replaceable, overlap
from graftkit.merging.checkpoint.base import local_base, read_base
from graftkit.merging.confirmation import RejectedError, can_confirm, confirming
from graftkit.merging.draft import draft_plan
from graftkit.merging.io.shard_writer import workers
from graftkit.merging.io.staging import (
    REPORT_NAME,
    staging_of,
)
from graftkit.merging.plan import MergePlan, WeightedAdapter, make_plan
from graftkit.merging.report import MergeReport
from graftkit.merging.run import MergeWriter
from graftkit.merging.verify import Evidence, recorded_choice, verify_folder
from graftkit.progress import Progress

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
            ``merge-not-verified``: the result is wrong, and was not published; ``merge-overflow``: it has values
            that the base's dtype cannot hold.
        OutputError: the output cannot be written, or would replace files that are not from a merge.
    """
    started = time.perf_counter()
    target = Path(out).expanduser().resolve()
    _check_apart(target, [Path(path).expanduser().resolve() for path in (base, *_weights(adapter))])
    check_replaceable(target, REPORT_NAME)
    writer = MergeWriter(target, tied, verify, on_progress, started)
    if tied is None and not trust_remote_code and _can_draft(target):
        with suppress(_NoDraftError):
            return _merge_draft(writer, base, adapter, revision)
    plan = plan_merge(base, adapter, out, tied=tied, trust_remote_code=trust_remote_code, revision=revision)
    return writer.write(plan, None)


def _can_draft(target: Path) -> bool:
    """Check whether writing may begin before the plan is made.

    Not where that saves no time, as in a program that has imported transformers already; nor where a refusal would
    have removed what an earlier run left.
    """
    fresh = target.parent.is_dir() and not staging_of(target).root.exists()
    return fresh and "transformers" not in sys.modules and workers() > 1 and can_confirm()


def _merge_draft(writer: MergeWriter, base: str | Path, adapter: Adapters, revision: str | None) -> MergeReport:
    """Write what the names suggest, while another process makes the plan.

    Raises:
        _NoDraftError: they suggest nothing, or something else than the plan; nothing is left of it.
        GraftError: as :func:`merge`.
    """
    draft = _draft(writer.target, base, adapter, revision)
    if draft is None:
        raise _NoDraftError
    try:
        with confirming(draft, str(base), revision) as confirmation:
            try:
                return writer.write(draft, confirmation)
            except GraftError:
                confirmation.plan()  # what is wrong with the plan goes first
                raise
    except RejectedError as rejected:
        if rejected.refusal is not None:
            raise rejected.refusal from None
        raise _NoDraftError from rejected


class _NoDraftError(Exception):
    """The plan has to be made before anything is written."""


def _draft(target: Path, base: str | Path, adapter: Adapters, revision: str | None) -> MergePlan | None:
    try:
        weighted = [WeightedAdapter(read_adapter(path), weight) for path, weight in _weights(adapter).items()]
        source = local_base(base, revision)
        if source is None or overlap(target, source.folder):
            return None
        return draft_plan(source, weighted)
    except GraftError:
        return None  # making the plan says what is wrong, in the order of its steps


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
