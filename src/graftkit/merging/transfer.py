"""Bytes from files into tensors, without copies on the way and by position, so that threads overlap."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def buffer_of(nbytes: int) -> torch.Tensor:
    """An uninitialised buffer of that many bytes."""
    import torch

    return torch.empty(nbytes, dtype=torch.uint8)


def read_into(fd: int, buffer: torch.Tensor, offset: int) -> None:
    """Fill ``buffer`` (uint8, contiguous) from ``offset`` of the file.

    Raises:
        OSError: the file ends before the buffer is full, or cannot be read.
    """
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise OSError(f"the file ended {len(view)} bytes early")
        view, offset = view[count:], offset + count


def same_bytes(one: int, other: int, begin: int, end: int, shift: int = 0) -> bool:
    """Whether a range of one file is the same as that of the other, ``shift`` bytes further on."""
    import torch

    step = min(end - begin, 4 * 2**20)
    left, right = buffer_of(step), buffer_of(step)
    for at in range(begin, end, step or 1):
        count = min(step, end - at)
        read_into(one, left[:count], at)
        read_into(other, right[:count], at + shift)
        # Eight bytes at a time: torch compares single bytes six times more slowly.
        words = count - count % 8
        same = torch.equal(left[:words].view(torch.int64), right[:words].view(torch.int64))
        if not same or not torch.equal(left[words:count], right[words:count]):
            return False
    return True
