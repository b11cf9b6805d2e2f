"""Files and folders appear complete, and a failure never loses what was there before."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graftkit.errors import OutputError
from graftkit.files import atomic_folder, write_text


def test_text_is_written(tmp_path: Path) -> None:
    target = write_text(tmp_path / "new" / "a.txt", "grün\n")
    assert target.read_text(encoding="utf-8") == "grün\n"
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "\ud800")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_target_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        write_text(tmp_path / "file" / "a.txt", "x")
    assert caught.value.code == "output-not-writable"


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target, marker="mark") as folder:
        (folder / "mark").write_text("1")
        assert not target.exists()
    assert (target / "mark").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_earlier_folder_of_ours_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("first", "second"):
        with atomic_folder(target, marker="mark") as folder:
            (folder / "mark").write_text(text)
    assert (target / "mark").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_folder_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "out"
    with atomic_folder(target, marker="mark") as folder:
        (folder / "mark").write_text("first")
    with pytest.raises(error), atomic_folder(target, marker="mark") as folder:
        (folder / "half").write_text("")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (target / "mark").read_text() == "first"


def test_somebody_else_s_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(OutputError) as caught, atomic_folder(tmp_path, marker="mark"):
        pass
    assert caught.value.code == "output-not-empty"
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_a_file_in_the_way_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError) as caught, atomic_folder(tmp_path / "out", marker="mark"):
        pass
    assert caught.value.code == "output-is-a-file"


def test_a_read_only_place_is_refused_before_any_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError) as caught, atomic_folder(tmp_path / "out", marker="mark"):
            pytest.fail("the block must not run")
    finally:
        tmp_path.chmod(0o755)
    assert caught.value.code == "output-not-writable"


_SLOW_WRITER = """
import sys, time
from pathlib import Path
from graftkit.files import atomic_folder
with atomic_folder(Path(sys.argv[1]), marker="mark") as folder:
    (folder / "half").write_text("")
    print("started", flush=True)
    time.sleep(60)
"""


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW_WRITER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 20
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    assert process.returncode not in (None, 0)
    assert not list(tmp_path.iterdir())


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    import stat
    import threading

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join(timeout=20)
    assert read == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_link_is_followed_and_a_mode_kept(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_swap_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mark").write_text("first")
    real, failed = os.replace, []

    def fails_once(source: Path, destination: Path) -> None:
        if Path(destination) == target and not failed:
            failed.append(source)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, destination)

    monkeypatch.setattr(os, "replace", fails_once)
    with pytest.raises(OutputError), atomic_folder(target, marker="mark") as folder:
        (folder / "mark").write_text("second")
    assert failed
    assert (target / "mark").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
