"""Ranges of a file read back past the page cache: every byte is compared, wherever the range begins and ends."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graftkit.errors import OutputError
from graftkit.merging.errors import base_unreadable, output_unreadable
from graftkit.merging.io.direct_reader import opened_direct, same_bytes
from graftkit.merging.io.read import opened

STEP = 4 * 2**20
# Around a disk's block and around what is compared at a time.
places = st.one_of(st.integers(0, 20), st.integers(4090, 4100), st.integers(STEP - 9, STEP + 9))
BASE = os.urandom(2 * STEP + 99)


def same(folder: Path, copy: bytes, begin: int, end: int, shift: int) -> bool:
    (folder / "base").write_bytes(BASE)
    (folder / "copy").write_bytes(copy)
    with (
        opened(folder / "base", base_unreadable) as base,
        opened_direct(folder / "copy", output_unreadable) as out,
    ):
        return same_bytes(base, out, begin, end, shift)


@settings(max_examples=40, deadline=None)
@given(begin=places, length=places, shift=st.sampled_from([0, 1, 8, 4096]), data=st.data())
def test_any_byte_of_the_range_counts_and_no_other(
    begin: int, length: int, shift: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, end = tmp_path_factory.mktemp("read"), begin + length
    copy = bytearray(os.urandom(begin + shift) + BASE[begin:end] + os.urandom(9))
    assert same(folder, bytes(copy), begin, end, shift)
    if length:
        copy[data.draw(st.integers(begin, end - 1)) + shift] ^= 1
        assert not same(folder, bytes(copy), begin, end, shift)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught:
        same(tmp_path, BASE[:4999], 100, 5000, 0)
    assert (caught.value.code, caught.value.where) == ("output-not-readable", str(tmp_path / "copy"))


def test_a_disk_with_larger_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no read of these until the file goes through the page cache."""
    import fcntl

    true, refused = os.preadv, []

    def preadv(fd: int, *rest: Any) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return true(fd, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    assert same(tmp_path, BASE, 100, 3 * 4096, 0)
    assert refused


@pytest.mark.usefixtures("only_page_cache")
def test_a_file_system_without_direct_reads(tmp_path: Path) -> None:
    assert same(tmp_path, BASE, 100, 9000, 0)


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = os.preadv

    def preadv(fd: int, *rest: Any) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "copy":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return true(fd, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(OutputError) as caught:
        same(tmp_path, BASE, 0, 9, 0)
    assert "Input/output error" in str(caught.value.why)
