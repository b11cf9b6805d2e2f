"""A progress bar on stderr for long commands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    with bars.Progress(*columns, timed, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(progress: Progress) -> None:
            bar.update(task, description=progress.step, completed=progress.done, total=progress.total)

        yield show
