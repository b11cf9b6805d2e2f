"""Files that are read and written past the page cache, where the file system allows it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DIRECT = getattr(os, "O_DIRECT", 0)
# With O_DIRECT, addresses, offsets and lengths are multiples of the disk's block: of this, on all common disks.
ALIGNMENT = 4096


def aligned_buffer(nbytes: int) -> torch.Tensor:
    """Allocate a buffer, (nbytes,), uint8, at an address that O_DIRECT takes."""
    import torch

    memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
    begin = -memory.data_ptr() % ALIGNMENT
    return memory[begin : begin + nbytes]


def open_direct(path: Path, flags: int) -> int:
    """Open a file past the page cache; through it on a file system that knows no other way.

    Raises:
        OSError: the file cannot be opened.
    """
    flags |= getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def falls_back(fd: int, error: OSError) -> bool:
    """Go through the page cache from now on, where that may help against an error of a read or a write.

    Returns:
        Whether the call is worth another try. A disk with larger blocks refuses what is not a multiple of them.
    """
    import fcntl

    if error.errno != errno.EINVAL:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~_DIRECT)
    return bool(flags & _DIRECT)
