"""A progress bar on stderr for long commands."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graftkit.progress import Progress


@contextmanager
def progress_bar(*, in_bytes: bool = False) -> Iterator[Callable[[Progress], None]]:
    """Show a bar with the step and how much is done; for bytes also the rate and the time left.

    It disappears when the block ends, and is only shown in a terminal.
    """
    from rich import progress as bars
    from rich.console import Console

    counted = (bars.DownloadColumn(), bars.TransferSpeedColumn()) if in_bytes else (bars.MofNCompleteColumn(),)
    columns = (bars.TextColumn("{task.description}", markup=False), bars.BarColumn(), *counted)
    timed = bars.TimeRemainingColumn() if in_bytes else bars.TimeElapsedColumn()
    console = Console(stderr=True)
    with bars.Progress(*columns, timed, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def show(progress: Progress) -> None:
            bar.update(task, description=progress.step, completed=progress.done, total=progress.total)

        yield show


# What is done before that needs no word about it.
_SHORT = 2.0


@contextmanager
def working(step: str, after: float = _SHORT) -> Iterator[None]:
    """Say what is being done while the block runs: at once in a terminal, else in a line if it takes long.

    Args:
        step: as in "surveying llama".
        after: seconds after which the line is written where there is no terminal.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if console.is_terminal:
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


# Without a terminal, how many seconds lie between two lines on how far a run is.
_BETWEEN_LINES = 60.0


@contextmanager
def timed_progress(expected: float) -> Iterator[Callable[[Progress], None]]:
    """Show how far a long run is and how long it will still take: a bar in a terminal, else a line a minute.

    Args:
        expected: seconds that the whole run was estimated to take; what was done so far corrects it.
    """
    began = last = time.monotonic()
    with progress_bar() as on_progress:

        def show(progress: Progress) -> None:
            nonlocal last
            now = time.monotonic()
            left = _left(expected, now - began, progress)
            on_progress(replace(progress, step=f"{progress.step}, {left} left"))
            if not sys.stderr.isatty() and now - last >= _BETWEEN_LINES:
                last = now
                sys.stderr.write(f"{progress.done} of {progress.total}, {left} left\n")

        yield show


def _left(expected: float, passed: float, progress: Progress) -> str:
    """Return the time that is left, as "1:05 h": the estimate counts less, the more is done."""
    share = progress.done / progress.total if progress.total else 0.0
    by_pace = passed / share if share else expected
    seconds = max(0.0, (1 - share) * (share * by_pace + (1 - share) * expected))
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02} h"
