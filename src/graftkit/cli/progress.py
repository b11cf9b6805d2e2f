"""Progress on stderr: a bar or a spinner in a terminal, else a line now and then."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from graftkit.text import size

if TYPE_CHECKING:
    from rich.console import Console

    from graftkit.progress import Progress

# What is done within so many seconds needs no line; later lines are further apart.
_SHORT = 2.0
_BETWEEN_LINES = 15.0
# The same for runs of hours.
_BETWEEN_LINES_OF_HOURS = 60.0


@contextmanager
def progress_bar(
    *, in_bytes: bool = False, first: float = _SHORT, between: float = _BETWEEN_LINES
) -> Iterator[Callable[[Progress], None]]:
    """Show the step and how much is done: in a terminal as a bar, which disappears, else in lines.

    Args:
        in_bytes: what is counted are bytes; the bar then has the rate and the time left.
        first: seconds after which the first line is written where there is no terminal.
        between: seconds between two lines; a line that would repeat the one before is left out.
    """
    console = _terminal()
    shown = _lines(size if in_bytes else str, first, between) if console is None else _bar(console, in_bytes)
    with shown as show:
        yield show


@contextmanager
def _bar(console: Console, in_bytes: bool) -> Iterator[Callable[[Progress], None]]:
    from rich import progress as bars

    counted = (bars.DownloadColumn(), bars.TransferSpeedColumn()) if in_bytes else (bars.MofNCompleteColumn(),)
    columns = (bars.TextColumn("{task.description}", markup=False), bars.BarColumn(), *counted)
    timed = bars.TimeRemainingColumn() if in_bytes else bars.TimeElapsedColumn()
    # Bytes are reported often enough to draw the bar at each report. A thread that draws it in between would keep
    # a merge from copying its process.
    drawn = bars.Progress(*columns, timed, console=console, transient=True, auto_refresh=not in_bytes)
    with drawn as bar:
        task = bar.add_task("starting", total=None)

        def show(progress: Progress) -> None:
            done, total = progress.done, progress.total
            bar.update(task, description=progress.step, completed=done, total=total, refresh=in_bytes)

        yield show


@contextmanager
def _lines(count: Callable[[int], str], first: float, between: float) -> Iterator[Callable[[Progress], None]]:
    """Write the latest step from a thread, so that a step which takes long is named while it runs.

    The thread starts with the first step, so that a process without steps so far has one thread.
    """
    latest: deque[Progress] = deque(maxlen=1)
    ended = threading.Event()

    def write() -> None:
        wait, said = first, ""
        while not ended.wait(wait):
            line = _line(latest[0], count)
            if line != said:
                sys.stderr.write(f"{line}\n")
            wait, said = between, line

    writer = threading.Thread(target=write, daemon=True)

    def show(progress: Progress) -> None:
        latest.append(progress)
        if writer.ident is None:
            writer.start()

    try:
        yield show
    finally:
        ended.set()
        if writer.ident is not None:
            writer.join()


def _line(progress: Progress, count: Callable[[int], str]) -> str:
    if progress.total is None:
        return progress.step
    return f"{progress.step}: {count(progress.done)} of {count(progress.total)}"


def _terminal() -> Console | None:
    """Return stderr where it is a terminal; rich is imported only where it could take it for one."""
    if not sys.stderr.isatty() and os.environ.keys().isdisjoint(("FORCE_COLOR", "TTY_COMPATIBLE")):
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_terminal else None


@contextmanager
def working(step: str, after: float = _SHORT) -> Iterator[None]:
    """Say what is being done while the block runs: at once in a terminal, else in a line if it takes long.

    Args:
        step: as in "surveying llama".
        after: seconds after which the line is written where there is no terminal.
    """
    console = _terminal()
    if console is not None:
        from rich.text import Text

        with console.status(Text(step)):
            yield
        return
    line = threading.Timer(after, sys.stderr.write, [f"{step}\n"])
    line.daemon = True
    line.start()
    try:
        yield
    finally:
        line.cancel()


@contextmanager
def timed_progress(expected: float, *, first: float = _SHORT) -> Iterator[Callable[[Progress], None]]:
    """Show how far a run of hours is and how long it will still take.

    Args:
        expected: seconds that the whole run was estimated to take; what was done so far corrects it.
        first: seconds after which the first line is written where there is no terminal.
    """
    began = time.monotonic()
    with progress_bar(first=first, between=_BETWEEN_LINES_OF_HOURS) as on_progress:

        def show(progress: Progress) -> None:
            left = _left(expected, time.monotonic() - began, progress)
            on_progress(replace(progress, step=f"{progress.step}, {left} left"))

        yield show


def _left(expected: float, passed: float, progress: Progress) -> str:
    """Return the time that is left, as "1:05 h": the estimate counts less, the more is done."""
    share = progress.done / progress.total if progress.total else 0.0
    by_pace = passed / share if share else expected
    seconds = max(0.0, (1 - share) * (share * by_pace + (1 - share) * expected))
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02} h"
