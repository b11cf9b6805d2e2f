"""Read back what was written, from the disk itself where the file system allows it.

What is in the page cache need not be on the disk. Reading past it also costs a fraction: each page that is cached
costs more than comparing it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.errors import reraise_as
from graftkit.merging.io.direct import ALIGNMENT, aligned_buffer, falls_back, open_direct
from graftkit.merging.io.read import Opened, Unreadable, bytes_of

if TYPE_CHECKING:
    import torch

_STEP_BYTES = 4 * 2**20


@contextmanager
def opened_direct(path: Path, unreadable: Unreadable) -> Iterator[Opened]:
    """Open a file for :func:`same_bytes`.

    Raises:
        GraftError: it cannot be opened.
    """
    with reraise_as(unreadable, path):
        fd = open_direct(path, os.O_RDONLY)
    try:
        yield Opened(fd, path, unreadable)
    finally:
        os.close(fd)


def same_bytes(one: Opened, other: Opened, begin: int, end: int, shift: int = 0) -> bool:
    """Check whether a range of one file equals that of the other, where it begins ``shift`` bytes later.

    Args:
        one: a file that is read through the page cache.
        other: from :func:`opened_direct`.

    Raises:
        GraftError: a file cannot be read, or ends within the range.
    """
    import torch

    step = min(end - begin, _STEP_BYTES)
    left, right = torch.empty(step, dtype=torch.uint8), aligned_buffer(step + 2 * ALIGNMENT)
    for at in range(begin, end, step or 1):
        count = min(step, end - at)
        one.read_into(left[:count], at)
        if not _equal(left[:count], _read_direct(other, right, at + shift, count)):
            return False
    return True


def _read_direct(file: Opened, buffer: torch.Tensor, offset: int, count: int) -> torch.Tensor:
    """Return ``count`` bytes from ``offset`` of a file: a part of ``buffer``, which gets all of their blocks."""
    before = offset % ALIGNMENT
    wanted = before + count
    view = bytes_of(buffer)[: wanted + -wanted % ALIGNMENT]
    done = 0
    with reraise_as(file.unreadable, file.path):
        while done < wanted:
            try:
                got = os.preadv(file.fd, [view[done:]], offset - before + done)
            except OSError as error:
                if falls_back(file.fd, error):
                    continue
                raise
            if got == 0:
                raise OSError(f"the file ended {wanted - done} bytes early")
            done += got
    return buffer[before:wanted]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bytes eight at a time: torch compares single ones six times more slowly."""
    import torch

    words = len(one) - len(one) % 8
    if other.storage_offset() % 8:
        other = other.clone()
    same = torch.equal(one[:words].view(torch.int64), other[:words].view(torch.int64))
    return same and torch.equal(one[words:], other[words:])
