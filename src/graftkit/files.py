"""Atomic writes: a file or folder is completed beside its target and then renamed into place."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from graftkit.errors import OutputError, reraise_as


def write_text(path: Path | str, text: str) -> Path:
    """Write ``text`` (UTF-8) to ``path`` through a temporary file beside it.

    Raises:
        OutputError: ``output-not-writable``. An existing file is then untouched.
    """
    return write_bytes(path, text.encode())


def write_bytes(path: Path | str, content: bytes) -> Path:
    """Write ``content`` to ``path`` through a temporary file beside it.

    Raises:
        OutputError: ``output-not-writable``. An existing file is then untouched.
    """
    target = Path(path)
    with as_output_error(target):
        target = target.resolve()
        if target.exists() and not target.is_file():
            # A device or a pipe (/dev/stdout) is written to; it must never be renamed over.
            with target.open("wb") as stream:
                stream.write(content)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        _replace_file(target, content, mode)
    return target


def _replace_file(target: Path, content: bytes, mode: int) -> None:
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    beside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(mode)
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path | str, *, marker: str) -> Iterator[Path]:
    """Yield a new folder beside ``path``, which is renamed to ``path`` when the block ends without an error.

    After an exception (also Ctrl-C) the new folder is removed, and ``path`` is unchanged.

    Args:
        path: the folder to write. An existing folder is replaced only if it is empty or contains ``marker``.
        marker: the name of a file that marks folders written for this purpose.

    Raises:
        OutputError: before the block runs: ``output-not-writable``, ``output-is-a-file`` or ``output-not-empty``
            (a folder with other files is never replaced).
    """
    import shutil

    target = Path(path).resolve()
    check_replaceable(target, marker)
    with as_output_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        refuse_read_only(target)
        beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield beside
        with as_output_error(target):
            beside.chmod(0o777 & ~_umask())
            _swap(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_replaceable(target: Path, marker: str) -> None:
    """Check that writing a folder replaces no other files than an earlier result.

    Args:
        target: the folder to write. An existing folder may be replaced if it is empty or contains ``marker``.
        marker: the name of a file that marks folders written for this purpose.

    Raises:
        OutputError: ``output-is-a-file``, ``output-not-empty``, ``output-not-writable`` (it cannot be listed).
    """
    if target.exists() and not target.is_dir():
        raise OutputError(
            "the output must be a folder",
            where=str(target),
            why="a file of that name exists",
            help="name another folder",
            code="output-is-a-file",
        )
    with as_output_error(target):
        foreign = target.is_dir() and any(target.iterdir()) and not (target / marker).is_file()
    if foreign:
        raise OutputError(
            "the output folder contains files that are not from an earlier run",
            where=str(target),
            why=f"it has no {marker}, and replacing it would lose what is there",
            help="name a new folder, or empty this one",
            code="output-not-empty",
        )


def _swap(beside: Path, target: Path) -> None:
    """Replace ``target`` with ``beside``; restore the old folder if that fails or is interrupted."""
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


def overlap(one: Path, other: Path) -> bool:
    """Check whether two resolved paths are the same, or one lies inside the other."""
    return one == other or one in other.parents or other in one.parents


def refuse_read_only(target: Path) -> None:
    """Refuse a target marked read-only, even where a rename, or root, could replace it.

    Raises:
        OutputError: ``output-not-writable``: the target or its parent folder is read-only.
    """
    with as_output_error(target):
        for place in (target, target.parent):
            if place.exists() and not place.stat().st_mode & stat.S_IWUSR:
                raise PermissionError(errno.EACCES, f"{place} is read-only", str(place))


def as_output_error(target: Path) -> AbstractContextManager[None]:
    """Raise any ``OSError`` of the block as an ``OutputError``, ``output-not-writable``."""
    return reraise_as(_not_writable, target)


def _not_writable(path: str, why: str) -> OutputError:
    return OutputError(
        "the output cannot be written",
        where=path,
        why=why,
        help="choose a folder you can write to",
        code="output-not-writable",
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def why_no_folder(path: Path) -> str:
    """Say what is at a path that should be a folder and is not."""
    return "it is a file" if path.exists() else "there is no file or folder of that name"
