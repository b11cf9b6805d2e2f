"""Positioned reads from files into tensors, without copies in between, by any number of threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.errors import GraftError, reraise_as

if TYPE_CHECKING:
    import torch

# Makes the error for a file (its path, and the reason) that cannot be read.
Unreadable = Callable[[str, str], GraftError]

_STEP_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Opened:
    """A file that is open for positioned reads.

    Attributes:
        fd: its file descriptor.
        path: its name.
        unreadable: makes the error for a failed read.
    """

    fd: int
    path: Path
    unreadable: Unreadable

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        with reraise_as(self.unreadable, self.path):
            return os.fstat(self.fd).st_size

    def read(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return ``nbytes`` bytes (uint8) from ``offset`` of the file.

        Raises:
            GraftError: as :meth:`read_into`.
        """
        import torch

        buffer = torch.empty(nbytes, dtype=torch.uint8)
        self.read_into(buffer, offset)
        return buffer

    def read_into(self, buffer: torch.Tensor, offset: int) -> None:
        """Fill ``buffer`` (uint8, contiguous) from ``offset`` of the file.

        Raises:
            GraftError: the file ends before the buffer is full, or cannot be read.
        """
        with reraise_as(self.unreadable, self.path):
            _read_into(self.fd, buffer, offset)


@contextmanager
def opened(path: Path, unreadable: Unreadable) -> Iterator[Opened]:
    """Open a file for positioned reads.

    Raises:
        GraftError: it cannot be opened.
    """
    with reraise_as(unreadable, path):
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        yield Opened(fd, path, unreadable)
    finally:
        os.close(fd)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a uint8 tensor, to read from or write to."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]


def _read_into(fd: int, buffer: torch.Tensor, offset: int) -> None:
    view = bytes_of(buffer)
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise OSError(f"the file ended {len(view)} bytes early")
        view, offset = view[count:], offset + count


def copy_file(source: Opened, target: Path, *, begin: int = 0, head: bytes = b"") -> None:
    """Write ``head`` and a file's bytes, from ``begin`` on, to ``target``.

    Raises:
        GraftError: the source cannot be read.
        OSError: the target cannot be written.
    """
    end = source.size
    with target.open("wb") as file:
        file.write(head)
        for at in range(begin, end, _STEP_BYTES):
            file.write(bytes_of(source.read(at, min(_STEP_BYTES, end - at))))
