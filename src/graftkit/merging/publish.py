"""The folder beside the output that a merge is written in: locked, resumable, and renamed when it is whole.

``.NAME.partial/`` holds ``files/`` (what becomes the output), ``ledger.json`` (which files are whole, and of
which merge) and ``lock``. Nothing but a rename ever touches the output's own name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from graftkit.errors import OutputError
from graftkit.files import check_replaceable, write_text
from graftkit.merging.errors import MergeError

REPORT_NAME = "merge_report.json"
_LEDGER = "ledger.json"
# Room for the small files, whose sizes nobody has to know.
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
        try:
            ledger = json.loads((self.root / _LEDGER).read_bytes())
            noted = ledger["whole"] if ledger["fingerprint"] == fingerprint else {}
            return {name: note for name, note in noted.items() if (self.files / name).is_file()}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def start(self, fingerprint: str, whole: Mapping[str, Any]) -> None:
        """Keep the files that are whole, and clear away all else."""
        self.files.mkdir(exist_ok=True)
        for path in self.files.iterdir():
            if path.name not in whole:
                path.unlink()
        self.note(fingerprint, whole)

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
        old = self.root / "old"
        if self.target.exists():
            self.target.replace(old)
        try:
            self.files.replace(self.target)
        except BaseException:
            if old.exists() and not self.target.exists():
                old.replace(self.target)
            raise
        sync(self.target.parent)
        shutil.rmtree(self.root, ignore_errors=True)


@contextmanager
def workplace(out: str | Path) -> Iterator[Workplace]:
    """Open, and lock, the folder beside ``out``. It is left behind unless it was published: the next run goes on.

    Raises:
        OutputError: ``output-is-a-file``, ``output-not-empty`` (a folder that no merge wrote), or
            ``output-not-writable``.
        MergeError: ``merge-busy``: another process merges into the same folder.
    """
    target = Path(out).expanduser().resolve()
    place = Workplace(target, target.parent / f".{target.name}.partial")
    check_replaceable(target, REPORT_NAME)
    with told_where(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_writable(target)
        place.root.mkdir(exist_ok=True)
        lock = (place.root / "lock").open("w")
    with lock:
        _lock(lock, target)
        _put_back(place)
        yield place


def _lock(file: IO[str], target: Path) -> None:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise MergeError(
            "another process is merging into this folder",
            where=str(target),
            why=error.strerror,
            help="wait for it, or name another folder",
            code="merge-busy",
        ) from error


def _put_back(place: Workplace) -> None:
    """A kill between the two renames of a replacement left the old output aside."""
    old = place.root / "old"
    if old.exists() and not place.target.exists():
        old.replace(place.target)
    shutil.rmtree(old, ignore_errors=True)


def _check_writable(target: Path) -> None:
    """A folder whose mode forbids writing is meant to stay as it is, even where root could."""
    for path in (target, target.parent):
        if path.exists() and not path.stat().st_mode & 0o200:
            raise PermissionError(13, "the folder is read-only", str(path))


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


@contextmanager
def told_where(target: Path) -> Iterator[None]:
    """Turn a failure of the system into an error that says what to do.

    Raises:
        OutputError: ``output-not-writable``.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            "the merge stopped: a file cannot be written, or read",
            where=str(target),
            why=error.strerror or str(error),
            help="mend that and run it again: it goes on after the last file that is whole",
            code="output-not-writable",
        ) from error


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
