"""``graft check-merged``: is a checkpoint the exact merge of these adapters into this base?"""

from __future__ import annotations

from typing import Annotated

import typer

from graftkit.cli import options, reporting
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.cli.progress import working


def check_merged(
    merged: Annotated[
        str, typer.Argument(metavar="MERGED", help="The merged checkpoint's folder.", show_default=False)
    ],
    base: Annotated[
        str,
        typer.Option("--base", help="The folder or hub id that was merged into.", show_default=False),
    ],
    adapter: Annotated[
        list[str],
        typer.Option(
            "--adapter",
            "-a",
            help="An adapter's folder, with its weight as DIR:0.7. Repeat it.",
            show_default=False,
        ),
    ],
    select: reporting.Select = None,
    ignore: reporting.Ignore = None,
    fail_level: options.FailLevelOption = "error",
    verbose: reporting.Verbose = False,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.ReportFormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Check whether a checkpoint is the exact merge of its base and adapters, whoever wrote it."""
    with only_data_on_stdout(output_format, json=json) as output:
        from graftkit.checks.check_merged import check_merged as run_checks

        settings = reporting.settings_for(select, ignore)
        with working(f"comparing {merged} with the merge of {base} and what was merged into it"):
            report = run_checks(
                merged,
                base,
                options.weighted(adapter),
                settings=settings,
                trust_remote_code=trust_remote_code,
                revision=revision,
            )
        reporting.conclude(output, report, f"graft check-merged {merged}", fail_level, verbose=verbose)
