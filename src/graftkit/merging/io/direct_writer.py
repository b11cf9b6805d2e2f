"""A file written from its first byte to its last, past the system's page cache where the disk allows it.

Nobody reads the output while it is made, and it is larger than what a cache could keep: a page for each 4 KiB of
it costs several times as much as handing the bytes to the disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Past the cache, addresses, offsets and lengths are multiples of the disk's block: of this, on all that are made.
_ALIGNMENT = 4096
# Long writes, and two of them under way, keep a disk busy; more only takes memory.
_ROOM_BYTES = 8 * 2**20
_UNDER_WAY = 2


@dataclass(frozen=True)
class Room:
    """Memory that begins on a page.

    Attributes:
        tensor: its bytes (uint8).
        memory: the same bytes.
    """

    tensor: torch.Tensor
    memory: memoryview

    @classmethod
    def of(cls, count: int) -> Room:
        """Uninitialised memory of that many bytes."""
        import torch

        whole = torch.empty(count + _ALIGNMENT, dtype=torch.uint8)
        begin = -whole.data_ptr() % _ALIGNMENT
        tensor = whole[begin : begin + count]
        return cls(tensor, memoryview(tensor.numpy()))  # type: ignore[arg-type]


def rooms() -> tuple[Room, ...]:
    """What one stream needs: a room to fill, and one for each write that is under way."""
    return tuple(Room.of(_ROOM_BYTES) for _ in range(_UNDER_WAY + 1))


@contextmanager
def stream(path: Path, rooms: tuple[Room, ...]) -> Iterator[Stream]:
    """Create, or empty, a file and write it in order. It is whole after the block, but not yet durable.

    Args:
        path: of the file.
        rooms: to use; no other stream may use them at the same time.

    Raises:
        OSError: it cannot be created or written.
    """
    fd = _created(path)
    try:
        with ThreadPoolExecutor(_UNDER_WAY) as writers:
            made = Stream(fd, writers, rooms)
            yield made
            made.end()
    finally:
        os.close(fd)


class Stream:
    """The growing end of a file; one thread at a time may use it."""

    def __init__(self, fd: int, writers: Executor, rooms: tuple[Room, ...]) -> None:
        self._fd, self._writers, self._rooms = fd, writers, rooms
        self._writing: list[Future[None] | None] = [None] * len(rooms)
        # The room that is being filled, how far it is, and where its first byte goes.
        self._turn, self._held, self._at = 0, 0, 0

    def append(self, data: torch.Tensor) -> None:
        """Add ``data`` (uint8, one axis) to the file; the caller may use its memory again.

        Raises:
            OSError: something could not be written: this, or what was appended before.
        """
        while len(data):
            if not self._held:
                self._wait(self._turn)
            part = data[: _ROOM_BYTES - self._held]
            self._rooms[self._turn].tensor[self._held : self._held + len(part)].copy_(part)
            self._held, data = self._held + len(part), data[len(part) :]
            if self._held == _ROOM_BYTES:
                self._hand_over(_ROOM_BYTES)

    def end(self) -> None:
        """Write what is left, and wait for all of it.

        Raises:
            OSError: as :meth:`append`.
        """
        size = self._at + self._held
        if self._held:
            self._hand_over(self._held + -self._held % _ALIGNMENT)
        for number in range(len(self._rooms)):
            self._wait(number)
        os.ftruncate(self._fd, size)

    def _hand_over(self, count: int) -> None:
        data = self._rooms[self._turn].memory[:count]
        self._writing[self._turn] = self._writers.submit(_write, self._fd, data, self._at)
        self._turn, self._held, self._at = (self._turn + 1) % len(self._rooms), 0, self._at + count

    def _wait(self, number: int) -> None:
        writing = self._writing[number]
        if writing is not None:
            writing.result()
            self._writing[number] = None


def _created(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags | _direct(), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)  # a file system without a way past the cache


def _direct() -> int:
    return getattr(os, "O_DIRECT", 0)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        try:
            count = os.pwrite(fd, data, offset)
        except OSError as error:
            # A disk of larger blocks; or the last write stopped within one, and the next says why.
            if error.errno == errno.EINVAL and _back_to_cache(fd):
                continue
            raise
        data, offset = data[count:], offset + count


def _back_to_cache(fd: int) -> bool:
    """Let a file go through the cache from now on; False where it did already."""
    import fcntl

    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~_direct())
    return bool(flags & _direct())
