"""``graft merge``: merge adapters into a checkpoint, file by file, and verify the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from graftkit.cli import options
from graftkit.cli.output import Format, Output, only_data_on_stdout
from graftkit.cli.progress import progress_bar
from graftkit.errors import GraftError


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
        Literal["share", "untie"] | None,
        typer.Option("--tied", help="For an adapter on one of the modules that share a weight."),
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
    """Merge adapters into their base, file by file, in little memory; the result is verified."""
    with only_data_on_stdout(output_format, json=json) as output:
        from graftkit.adapters.file import RECORD_NAME
        from graftkit.merging.merge import merge as run_merge
        from graftkit.merging.merge import plan_merge

        adapters, out = _folders(folders, adapter)
        how: dict[str, Any] = {
            "tied": tied,
            "trust_remote_code": trust_remote_code,
            "revision": revision,
        }
        if dry_run:
            output.result(plan_merge(base, adapters, out, **how))
            return
        with progress_bar(in_bytes=True) as on_progress:
            report = run_merge(base, adapters, out, verify=verify, on_progress=on_progress, **how)
        output.result(report)
        if (report.out / RECORD_NAME).is_file():
            _check_shipped(output, report.out, adapters)


def _check_shipped(output: Output, out: Path, adapters: dict[str, float]) -> None:
    """Say where the tokenizer or the chat template beside the merged weights is not that of training."""
    from graftkit.checks.check_merged import check_shipped
    from graftkit.cli.findings_text import findings_text
    from graftkit.findings import Severity

    shipped = check_shipped(out, adapters)
    if shipped.at_or_above(Severity.WARNING):
        output.note(findings_text(shipped))


def _folders(folders: list[str], adapter: list[str] | None) -> tuple[dict[str, float], str]:
    """Return the adapters with their weights, and the output.

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
        why="with --adapter, one folder follows the base; without it two do",
        help="graft merge BASE ADAPTER OUT; or graft merge BASE OUT --adapter A:0.7 --adapter B:0.3",
        code="usage",
    )
