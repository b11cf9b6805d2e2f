"""Write a file from its first byte to its last, past the page cache where the file system allows it.

Nobody reads the output while it is written, and it is larger than a cache could keep: caching each of its pages
costs several times as much as handing the bytes to the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.merging.io.direct import ALIGNMENT, aligned_buffer, falls_back, open_direct
from graftkit.merging.io.read import bytes_of

if TYPE_CHECKING:
    import torch

# Two long writes in flight keep a disk busy; more only takes memory.
_BUFFER_BYTES = 8 * 2**20
_IN_FLIGHT = 2


def write_buffers() -> tuple[torch.Tensor, ...]:
    """Allocate what one writer needs: a buffer (uint8) to fill, and one for each write in flight."""
    return tuple(aligned_buffer(_BUFFER_BYTES) for _ in range(_IN_FLIGHT + 1))


@contextmanager
def direct_writer(path: Path, buffers: tuple[torch.Tensor, ...]) -> Iterator[DirectWriter]:
    """Create, or empty, a file and write it in order. After the block it is complete, but not yet synced.

    Args:
        path: the file.
        buffers: from :func:`write_buffers`; no other writer may use them at the same time.

    Raises:
        OSError: the file cannot be created or written.
    """
    fd = open_direct(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        with ThreadPoolExecutor(_IN_FLIGHT) as threads:
            writer = DirectWriter(fd, threads, buffers)
            yield writer
            writer.end()
    finally:
        os.close(fd)


class DirectWriter:
    """Appends to a file; one thread at a time may use it."""

    def __init__(self, fd: int, threads: Executor, buffers: tuple[torch.Tensor, ...]) -> None:
        self._fd, self._threads, self._buffers = fd, threads, buffers
        self._writes: list[Future[None] | None] = [None] * len(buffers)
        # The buffer that is being filled, how many bytes are in it, and where its first byte goes.
        self._current, self._filled, self._offset = 0, 0, 0

    def append(self, data: torch.Tensor) -> None:
        """Add ``data`` (uint8, one axis) to the file; the caller may reuse its memory at once.

        Raises:
            OSError: this, or an earlier write, failed.
        """
        while len(data):
            if not self._filled:
                self._wait(self._current)
            part = data[: _BUFFER_BYTES - self._filled]
            self._buffers[self._current][self._filled : self._filled + len(part)].copy_(part)
            self._filled, data = self._filled + len(part), data[len(part) :]
            if self._filled == _BUFFER_BYTES:
                self._submit(_BUFFER_BYTES)

    def end(self) -> None:
        """Write what is left in the buffer, and wait for all writes.

        Raises:
            OSError: as :meth:`append`.
        """
        size = self._offset + self._filled
        if self._filled:
            self._submit(self._filled + -self._filled % ALIGNMENT)
        for number in range(len(self._buffers)):
            self._wait(number)
        os.ftruncate(self._fd, size)

    def _submit(self, count: int) -> None:
        data = bytes_of(self._buffers[self._current][:count])
        self._writes[self._current] = self._threads.submit(_write, self._fd, data, self._offset)
        self._current, self._filled = (self._current + 1) % len(self._buffers), 0
        self._offset += count

    def _wait(self, number: int) -> None:
        write = self._writes[number]
        if write is not None:
            write.result()
            self._writes[number] = None


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        try:
            count = os.pwrite(fd, data, offset)
        except OSError as error:
            # The last write may have stopped within a block; the next one says why.
            if falls_back(fd, error):
                continue
            raise
        data, offset = data[count:], offset + count
