"""The folder beside the output that a merge or a conversion writes in: locked, resumable, renamed when complete.

``.NAME.partial/`` contains ``files/`` (what becomes the output), ``ledger.json`` (which files are finished, and of
which call) and ``lock``. The output itself is only ever created by a rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from graftkit.errors import GraftError, MergeError, OutputError, reraise_as
from graftkit.files import check_replaceable, refuse_read_only, write_text
from graftkit.text import size

REPORT_NAME = "merge_report.json"
_LEDGER, _LOCK, _OLD = "ledger.json", "lock", "old"
# For the report, the ledger and the folders.
_SPARE_BYTES = 2**20


@dataclass(frozen=True)
class StagingDir:
    """The folder that a merge writes in.

    Attributes:
        target: the output.
        root: the folder beside it.
    """

    target: Path
    root: Path

    @property
    def files(self) -> Path:
        """The folder that becomes the output."""
        return self.root / "files"

    def _ledger(self) -> tuple[str | None, dict[str, Any]]:
        """Return the ledger's fingerprint and its files, without those that have been removed since."""
        try:
            ledger = json.loads((self.root / _LEDGER).read_bytes())
            files = {name: record for name, record in ledger["finished"].items() if (self.files / name).is_file()}
            return str(ledger["fingerprint"]), files
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, {}

    def start(self, fingerprint: str) -> dict[str, Any]:
        """Keep the files that an earlier run of the same merge has finished, and remove all others.

        Returns:
            The kept files -> what was recorded of them.
        """
        recorded, files = self._ledger()
        finished = files if recorded == fingerprint else {}
        self.files.mkdir(exist_ok=True)
        self._keep(finished)
        self.record(fingerprint, finished)
        return finished

    def _keep(self, finished: Mapping[str, Any]) -> None:
        for path in self.files.iterdir():
            if path.name not in finished:
                path.unlink()

    def record(self, fingerprint: str, finished: Mapping[str, Any]) -> None:
        """Write the ledger: which files are finished, and of which merge."""
        write_text(self.root / _LEDGER, json.dumps({"fingerprint": fingerprint, "finished": dict(finished)}))

    def unfinished(self, name: str) -> Path:
        """Return the path of a file until it is finished."""
        return self.files / f"{name}.part"

    def finish(self, name: str) -> None:
        """Sync a file and give it its own name."""
        sync(self.unfinished(name))
        self.unfinished(name).replace(self.files / name)
        sync(self.files)

    def publish(self) -> None:
        """Rename the folder to the output. A kill at any time leaves the output absent, as it was, or complete."""
        for path in self.files.iterdir():
            sync(path)
        sync(self.files)
        if self.target.exists():
            self.target.replace(self.root / _OLD)
        self.files.replace(self.target)
        sync(self.target.parent)
        self.remove()

    def restore_earlier(self) -> None:
        """Put the earlier output back, where a run ended between the two renames that replace it."""
        old = self.root / _OLD
        if old.exists() and not self.target.exists():
            old.replace(self.target)
        shutil.rmtree(old, ignore_errors=True)

    def clean_up(self) -> None:
        """Keep only what the next run of the same merge can use; remove the folder if that is nothing."""
        # A failure in here must not hide the one that came before.
        with suppress(OSError):
            self.restore_earlier()
            _, finished = self._ledger()
            if finished:
                self._keep(finished)
            else:
                self.remove()

    def remove(self) -> None:
        """Remove the folder, the lock last: until then no other run can begin in it."""
        with suppress(OSError):
            for path in sorted(self.root.iterdir(), key=lambda path: path.name == _LOCK):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            self.root.rmdir()


def staging_of(target: Path) -> StagingDir:
    """Return where an output is written, whether or not the folder exists."""
    return StagingDir(target, target.parent / f".{target.name}.partial")


@contextmanager
def staging_dir(
    out: str | Path, marker: str = REPORT_NAME, refusal: type[GraftError] = MergeError
) -> Iterator[StagingDir]:
    """Create or reopen, and lock, the folder beside ``out``.

    Finished files that were not published stay there for the next run; after a refusal nothing stays, since the
    same call would be refused again.

    Args:
        marker: the name of the file that marks an earlier output, which may be replaced.
        refusal: the class of errors that are refusals.

    Raises:
        OutputError: ``output-is-a-file``, ``output-not-empty`` (a folder without the marker), or
            ``output-not-writable``.
        GraftError: a refusal, ``merge-busy`` or the like: another process writes the same folder.
    """
    target = Path(out).expanduser().resolve()
    staging = staging_of(target)
    check_replaceable(target, marker)
    with reraise_as(merge_stopped, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        refuse_read_only(target)
        staging.root.mkdir(exist_ok=True)
    with _locked(staging, refusal) as lock:
        with reraise_as(merge_stopped, target):
            staging.restore_earlier()
        try:
            yield staging
        except refusal:
            staging.remove()
            raise
        finally:
            # Once the output is published, a folder of this name may belong to another run.
            if _is_at(lock, staging.root / _LOCK):
                staging.clean_up()


@contextmanager
def _locked(staging: StagingDir, refusal: type[GraftError]) -> Iterator[os.stat_result]:
    """Lock the folder; yields the lock file's status, which tells it from a later run's."""
    path = staging.root / _LOCK
    lock = FileLock(path)
    with reraise_as(merge_stopped, staging.target):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise refusal(
                "another process is writing this folder",
                where=str(staging.target),
                why=f"it holds {path}",
                help="wait for it, or name another folder",
                code=f"{refusal.code}-busy",
            ) from error
        status = path.stat()
    try:
        yield status
    finally:
        lock.release()


def _is_at(status: os.stat_result, path: Path) -> bool:
    try:
        return os.path.samestat(status, path.stat())
    except FileNotFoundError:
        return False


def check_space(target: Path, needed: int) -> None:
    """Refuse a merge for which the disk is too small, before anything is written.

    Raises:
        OutputError: ``output-no-space``.
    """
    free = shutil.disk_usage(target.parent).free
    if needed + _SPARE_BYTES <= free:
        return
    raise OutputError(
        "the disk is too small for the output",
        where=str(target.parent),
        why=f"{size(needed)} are needed and {size(free)} are free",
        help="free space there, or name a folder on another disk",
        code="output-no-space",
    )


def merge_stopped(path: str, why: str) -> OutputError:
    """Make the error for a merge or a conversion that could not write a file."""
    return OutputError(
        "writing stopped: a file cannot be written",
        where=path,
        why=why,
        help="fix the cause and rerun: finished files are reused",
        code="output-not-writable",
    )


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
