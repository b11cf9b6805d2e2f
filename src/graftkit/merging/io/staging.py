"""The folder beside the output that a merge is written in: locked, resumable, and renamed when it is whole.

``.NAME.partial/`` holds ``files/`` (what becomes the output), ``ledger.json`` (which files are whole, and of
which merge) and ``lock``. Nothing but a rename ever touches the output's own name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from graftkit.errors import MergeError, OutputError, reraise_as
from graftkit.files import check_replaceable, refuse_read_only, write_text

REPORT_NAME = "merge_report.json"
_LEDGER, _LOCK, _OLD = "ledger.json", "lock", "old"
# Room for the report, the ledger and the folders.
_SPARE_BYTES = 2**20


@dataclass(frozen=True)
class Workplace:
    """The folder that is written in.

    Attributes:
        target: the output.
        root: the folder beside it.
    """

    target: Path
    root: Path

    @property
    def files(self) -> Path:
        """What becomes the output."""
        return self.root / "files"

    def whole(self, fingerprint: str) -> dict[str, Any]:
        """File -> what was noted of it, for the files that an earlier run of the same merge has finished."""
        whose, noted = self._ledger()
        return noted if whose == fingerprint else {}

    def _ledger(self) -> tuple[str | None, dict[str, Any]]:
        """A merge's fingerprint, and what was noted of its files, without those that are gone."""
        try:
            ledger = json.loads((self.root / _LEDGER).read_bytes())
            noted = {name: note for name, note in ledger["whole"].items() if (self.files / name).is_file()}
            return str(ledger["fingerprint"]), noted
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None, {}

    def start(self, fingerprint: str, whole: Mapping[str, Any]) -> None:
        """Keep the files that are whole, and clear away all else."""
        self.files.mkdir(exist_ok=True)
        self._keep(whole)
        self.note(fingerprint, whole)

    def _keep(self, whole: Mapping[str, Any]) -> None:
        for path in self.files.iterdir():
            if path.name not in whole:
                path.unlink()

    def note(self, fingerprint: str, whole: Mapping[str, Any]) -> None:
        """Write down which files are whole."""
        write_text(self.root / _LEDGER, json.dumps({"fingerprint": fingerprint, "whole": dict(whole)}))

    def part(self, name: str) -> Path:
        """Where a file lies until it is whole."""
        return self.files / f"{name}.part"

    def finish(self, name: str) -> None:
        """Make a file durable under its own name."""
        sync(self.part(name))
        self.part(name).replace(self.files / name)
        sync(self.files)

    def publish(self) -> None:
        """Make the folder the output. A kill at any moment leaves the output absent, as it was, or whole."""
        for path in self.files.iterdir():
            sync(path)
        sync(self.files)
        if self.target.exists():
            self.target.replace(self.root / _OLD)
        self.files.replace(self.target)
        sync(self.target.parent)
        self.remove()

    def put_back(self) -> None:
        """The earlier output, where a failure or a kill came between the two renames that replace it."""
        old = self.root / _OLD
        if old.exists() and not self.target.exists():
            old.replace(self.target)
        shutil.rmtree(old, ignore_errors=True)

    def tidy(self) -> None:
        """Leave what the next run of the same merge goes on with; where that is nothing, leave nothing.

        The failure that came before is what is told, and not one in here.
        """
        with suppress(OSError):
            self.put_back()
            _, whole = self._ledger()
            if whole:
                self._keep(whole)
            else:
                self.remove()

    def remove(self) -> None:
        """Take the folder away, the lock last: until then no other run can begin in it."""
        with suppress(OSError):
            for path in sorted(self.root.iterdir(), key=lambda path: path.name == _LOCK):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            self.root.rmdir()


@contextmanager
def workplace(out: str | Path) -> Iterator[Workplace]:
    """Open, and lock, the folder beside ``out``.

    What was not published and is whole stays there, so that the next run goes on; after a refusal nothing stays,
    since the same merge would be refused again.

    Raises:
        OutputError: ``output-is-a-file``, ``output-not-empty`` (a folder that no merge wrote), or
            ``output-not-writable``.
        MergeError: ``merge-busy``: another process merges into the same folder.
    """
    target = Path(out).expanduser().resolve()
    place = Workplace(target, target.parent / f".{target.name}.partial")
    check_replaceable(target, REPORT_NAME)
    with reraise_as(merge_stopped, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        refuse_read_only(target)
        place.root.mkdir(exist_ok=True)
        lock = (place.root / _LOCK).open("w")
    with lock:
        _lock(lock, place)
        with reraise_as(merge_stopped, target):
            place.put_back()
        try:
            yield place
        except MergeError:
            place.remove()
            raise
        finally:
            # Once it is published, the folder of that name may be another run's.
            if _is_at(lock, place.root / _LOCK):
                place.tidy()


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[str], place: Workplace) -> None:
    """Take the lock. A run that has ended in this moment has taken the folder away: that is busy as well.

    Raises:
        MergeError: ``merge-busy``.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, place.root / _LOCK):
            return
        why = "it has just ended"
    except OSError as error:
        why = str(error.strerror)
    raise MergeError(
        "another process is merging into this folder",
        where=str(place.target),
        why=why,
        help="wait for it, or name another folder",
        code="merge-busy",
    )


def check_space(target: Path, needed: int) -> None:
    """Refuse before anything is written where the disk is too small.

    Raises:
        OutputError: ``output-no-space``.
    """
    from graftkit.text import size

    free = shutil.disk_usage(target.parent).free
    if needed + _SPARE_BYTES <= free:
        return
    raise OutputError(
        "the disk is too small for the merged checkpoint",
        where=str(target.parent),
        why=f"{size(needed)} are needed and {size(free)} are free",
        help="free space there, or name a folder on another disk",
        code="output-no-space",
    )


def merge_stopped(path: str, why: str) -> OutputError:
    """Make the error for a merge that could not write a file."""
    return OutputError(
        "the merge stopped: a file cannot be written",
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
