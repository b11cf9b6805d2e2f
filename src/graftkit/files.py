"""Publishing files: beside, whole, then renamed, so that nothing half-written ever looks finished."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graftkit.errors import OutputError


def write_text(path: Path | str, text: str) -> Path:
    """Write ``text`` (UTF-8) to ``path`` through a temporary file beside it.

    Raises:
        OutputError: ``output-not-writable``. An existing file is then untouched.
    """
    target = Path(path)
    with _told_where(target):
        target = target.resolve()
        if target.exists() and not target.is_file():
            # A device or a pipe (/dev/stdout) is written to; it must never be renamed over.
            with target.open("w", encoding="utf-8") as stream:
                stream.write(text)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        _replace_file(target, text, mode)
    return target


def _replace_file(target: Path, text: str, mode: int) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    beside = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(mode)
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def folder_when_whole(path: Path | str, *, ours: str) -> Iterator[Path]:
    """A new folder beside ``path`` to fill; it becomes ``path`` when the block ends without an error.

    After an exception, Ctrl-C included, nothing of the new folder is left and ``path`` is as it was.

    Args:
        path: the folder to publish. One that exists is replaced only if it is empty or holds ``ours``.
        ours: a file name that every folder written for this purpose holds.

    Raises:
        OutputError: before the block runs: ``output-not-writable``, ``output-is-a-file`` or
            ``output-not-empty`` (somebody else's files are never replaced).
    """
    import shutil

    target = Path(path).resolve()
    check_replaceable(target, ours)
    with _told_where(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        refuse_read_only(target)
        beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield beside
        with _told_where(target):
            beside.chmod(0o777 & ~_umask())
            _swap(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_replaceable(target: Path, ours: str) -> None:
    """Refuse a folder to write that would replace somebody's files.

    Args:
        target: the folder; one that exists may be replaced if it is empty or holds ``ours``.
        ours: a file name that every folder written for this purpose holds.

    Raises:
        OutputError: ``output-is-a-file``, ``output-not-empty``, ``output-not-writable`` (not listable).
    """
    if target.exists() and not target.is_dir():
        raise OutputError(
            "the output must be a folder",
            where=str(target),
            why="a file of that name exists",
            help="name another folder",
            code="output-is-a-file",
        )
    with _told_where(target):
        foreign = target.is_dir() and any(target.iterdir()) and not (target / ours).is_file()
    if foreign:
        raise OutputError(
            "the output folder holds files that are not from an earlier run",
            where=str(target),
            why=f"it has no {ours}, and replacing it would lose what is there",
            help="name a new folder, or empty this one",
            code="output-not-empty",
        )


def _swap(beside: Path, target: Path) -> None:
    """Put ``beside`` where ``target`` is; a failure or an interrupt in between puts the old folder back."""
    import shutil

    if not target.exists():
        beside.replace(target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    old = aside / target.name
    try:
        target.replace(old)
        beside.replace(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.replace(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_read_only(target: Path) -> None:
    """Refuse a place marked read-only: it is meant to stay as it is, even where a rename or root could replace it.

    Raises:
        OutputError: ``output-not-writable``: the place itself or the folder it lies in is, where they exist.
    """
    with _told_where(target):
        for place in (target, target.parent):
            if place.exists() and not place.stat().st_mode & stat.S_IWUSR:
                raise PermissionError(errno.EACCES, f"{place} is read-only", str(place))


@contextmanager
def _told_where(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            "the output cannot be written",
            where=str(target),
            why=error.strerror or str(error),
            help="choose a folder you can write to",
            code="output-not-writable",
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
