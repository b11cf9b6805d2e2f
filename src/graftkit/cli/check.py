"""``graft check``: whether a saved adapter is whole, and whether it fits its base."""

from __future__ import annotations

from typing import Annotated

import typer

from graftkit.cli import options
from graftkit.cli.output import Format, only_data_on_stdout


def check(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="The model it is for: as MODEL of the other commands.")
    ] = None,
    fail_level: options.FailLevelOption = options.FailLevel.ERROR,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.FormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Check a saved adapter: is it whole, safe to load, and taken by its base?"""
    with only_data_on_stdout(options.chosen(output_format, json)) as output:
        from graftkit.checks.check import check as run_checks
        from graftkit.findings import Severity
        from graftkit.surveying.walk import survey

        fitted = None
        if base is not None:
            fitted = survey(base, trust_remote_code=trust_remote_code, revision=revision)
        report = run_checks(adapter, fitted)
        output.result(report)
    if report.at_or_above(Severity(fail_level.value)):
        raise typer.Exit(1)
