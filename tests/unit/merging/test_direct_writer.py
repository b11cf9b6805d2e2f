"""Files written past the page cache: every byte in its place, and the real reason of a failure."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftkit.merging.io.direct_writer import direct_writer, write_buffers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BUFFER = 8 * 2**20
# Around the sizes of a disk's block and of a buffer, and far from them.
sizes = st.one_of(st.integers(0, 70), st.integers(4090, 4100), st.integers(BUFFER - 3, BUFFER + 3))


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write(path: Path, parts: list[torch.Tensor]) -> None:
    with direct_writer(path, write_buffers()) as target:
        for part in parts:
            target.append(part)


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(sizes, max_size=7))
def test_the_file_is_what_was_appended(counts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("stream") / "file"
    parts = [noise(count, seed) for seed, count in enumerate(counts)]
    write(path, parts)
    assert path.read_bytes() == b"".join(part.numpy().tobytes() for part in parts)


def test_memory_may_be_used_again_at_once(tmp_path: Path) -> None:
    with direct_writer(tmp_path / "file", write_buffers()) as target:
        buffer = torch.empty(BUFFER // 2 + 1, dtype=torch.uint8)
        for value in range(9):
            target.append(buffer.fill_(value))
    expected = b"".join(bytes([value]) * len(buffer) for value in range(9))
    assert (tmp_path / "file").read_bytes() == expected


def test_a_longer_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    write(tmp_path / "file", [noise(5)])
    assert (tmp_path / "file").stat().st_size == 5


@pytest.mark.usefixtures("only_page_cache")
def test_a_file_system_without_direct_writes(tmp_path: Path) -> None:
    write(tmp_path / "file", [noise(BUFFER + 5)])
    assert (tmp_path / "file").read_bytes() == noise(BUFFER + 5).numpy().tobytes()


def test_a_write_that_stops_within_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest does not begin at a multiple of a block, which only the page cache accepts."""
    true = os.pwrite
    monkeypatch.setattr(os, "pwrite", _first_write_through_the_cache(true))
    write(tmp_path / "file", [noise(3 * BUFFER + 5)])
    assert (tmp_path / "file").read_bytes() == noise(3 * BUFFER + 5).numpy().tobytes()


def _first_write_through_the_cache(true: Any) -> Any:
    import fcntl

    left = [1]

    def stops(fd: int, data: memoryview, offset: int) -> int:
        if not left or offset:
            return int(true(fd, data, offset))
        left.clear()
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        try:
            return int(true(fd, data[:1000], offset))
        finally:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)

    return stops


@contextmanager
def _largest_file(count: int) -> Iterator[None]:
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("limit", [1000, BUFFER + 1000, 2 * BUFFER])
def test_the_error_has_the_real_reason(tmp_path: Path, limit: int) -> None:
    with pytest.raises(OSError) as caught, _largest_file(limit):
        write(tmp_path / "file", [noise(BUFFER) for _ in range(4)])
    assert caught.value.errno == errno.EFBIG
