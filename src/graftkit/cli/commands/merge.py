"""``graft merge``: an adapter merged into a checkpoint, streamed and verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.cli import options
from graftkit.cli.output import Format, only_data_on_stdout, progress_console
from graftkit.errors import GraftError

if TYPE_CHECKING:
    from graftkit.progress import Progress


class Tied(StrEnum):
    """What to do where an adapter changes one of several modules that share a weight."""

    SHARE = "share"
    UNTIE = "untie"


def merge(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model's folder, or a hub id.", show_default=False)
    ],
    folders: Annotated[
        list[str],
        typer.Argument(
            metavar="[ADAPTER] OUT",
            help="The adapter's folder, and the folder to write. With --adapter, the latter alone.",
            show_default=False,
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="An adapter's folder and its weight, as DIR:0.7. Repeat it."),
    ] = None,
    tied: Annotated[
        Tied | None, typer.Option("--tied", help="For an adapter on one of the modules that share a weight.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the result with an exact computation.")
    ] = True,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.FormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Merge an adapter into its base, file by file, in little memory; the result is verified."""
    with only_data_on_stdout(options.chosen(output_format, json)) as output:
        from graftkit.merging.merge import merge as run_merge
        from graftkit.merging.merge import plan_merge

        adapters, out = _places(folders, adapter)
        given: dict[str, Any] = {
            "tied": tied.value if tied is not None else None,
            "trust_remote_code": trust_remote_code,
            "revision": revision,
        }
        if dry_run:
            output.result(plan_merge(base, adapters, out, **given))
            return
        with progress_bar() as on_progress:
            report = run_merge(base, adapters, out, verify=verify, on_progress=on_progress, **given)
        output.result(report)


def _places(folders: list[str], adapter: list[str] | None) -> tuple[dict[str, float], str]:
    """The adapters with their weights, and the output.

    Raises:
        GraftError: ``usage``: there are too few or too many folders, or an adapter is named twice.
    """
    if len(folders) != (1 if adapter else 2):
        raise _usage()
    return options.weighted(adapter) if adapter else {folders[0]: 1.0}, folders[-1]


def _usage() -> GraftError:
    return GraftError(
        "a base, an adapter and an output folder are needed",
        where="graft merge",
        help="graft merge BASE ADAPTER OUT; or graft merge BASE OUT --adapter A:0.7 --adapter B:0.3",
        code="usage",
    )


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Show a progress bar on stderr: the file, bytes, the rate and the time left."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=progress_console(), transient=True) as bar:
        task = bar.add_task("reading headers", total=None)

        def show(state: Progress) -> None:
            bar.update(task, description=state.step, completed=state.done, total=state.total)

        yield show
