"""What long steps say on stderr: the step, at once in a terminal, else in a line if it is not over soon."""

from __future__ import annotations

import io
import sys
import time

import pytest

from graftkit.cli.progress import working


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
