"""What long steps say on stderr: the step, at once in a terminal, else in a line if it is not over soon."""

from __future__ import annotations

import io
import sys
import time

import pytest

from graftkit.cli.progress import progress_bar, timed_progress, working
from graftkit.progress import Progress


class Terminal(io.StringIO):
    """A stream that is one."""

    def isatty(self) -> bool:
        return True


def test_a_long_step_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with working("surveying a/[b]", after=0.01):
        time.sleep(0.2)
    assert capsys.readouterr() == ("", "surveying a/[b]\n")


def test_a_short_step_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with working("surveying x", after=0.2):
        pass
    time.sleep(0.4)
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="late"), working("surveying x", after=0.2):
        raise ValueError("late")
    time.sleep(0.4)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_the_step_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with working("surveying a/[b]", after=60):
        time.sleep(0.2)
        assert "surveying a/[b]" in terminal.getvalue()


def test_a_long_step_of_several_is_named_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(first=0.05, between=0.05) as show:
        show(Progress("GK203", 3, 20))
        time.sleep(0.4)
        assert capsys.readouterr().err == "GK203: 3 of 20\n"
        show(Progress("merging", 4, None))
        time.sleep(0.4)
    assert capsys.readouterr() == ("", "merging\n")


def test_bytes_are_counted_in_their_units(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(in_bytes=True, first=0.05) as show:
        show(Progress("model.safetensors", 1_500_000, 8_000_000_000))
        time.sleep(0.3)
    assert capsys.readouterr().err == "model.safetensors: 1.5 MB of 8 GB\n"


def test_short_steps_need_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(first=0.2) as show:
        show(Progress("GK203", 3, 20))
    time.sleep(0.4)
    assert capsys.readouterr() == ("", "")


def test_a_run_of_hours_says_how_long_it_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    with timed_progress(7200.0, first=0.05) as show:
        show(Progress("gemma4", 0, 10))
        time.sleep(0.3)
    assert capsys.readouterr() == ("", "gemma4, 2:00 h left: 0 of 10\n")
