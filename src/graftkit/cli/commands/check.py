"""``graft check``: whether a saved adapter is whole, and whether it fits its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftkit.cli import options, reporting
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.errors import GraftError

if TYPE_CHECKING:
    from graftkit.findings import Report
    from graftkit.recipes.settings import CheckSettings


def check(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="The model it is for: as MODEL of the other commands.")
    ] = None,
    merged_from: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="ADAPTER is a checkpoint merged from --base and this."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="The engine that is to serve it: vllm, sglang or llama.cpp, vllm==0.32."),
    ] = None,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Read no tensor's data: an adapter of any size takes no longer.")
    ] = False,
    select: reporting.Select = None,
    ignore: reporting.Ignore = None,
    fix: reporting.FixOption = False,
    fail_level: options.FailLevelOption = options.FailLevel.ERROR,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.FormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Check a saved adapter: is it whole, safe to load, and taken by its base?"""
    with only_data_on_stdout(options.chosen(output_format, json)) as output:
        from graftkit.checks.check import check as run_checks
        from graftkit.surveying.survey import survey

        settings = reporting.settings_for(select, ignore)
        if merged_from:
            place = {"trust_remote_code": trust_remote_code, "revision": revision}
            report = _merged(adapter, base, merged_from, settings, place)
            reporting.conclude(output, report, f"graft check {adapter}", fail_level)
            return
        fitted = None
        if base is not None:
            fitted = survey(base, trust_remote_code=trust_remote_code, revision=revision)
        report = reporting.run_and_fix(
            lambda: run_checks(adapter, fitted, target=target, data=not headers_only, settings=settings),
            fix,
            adapter=Path(adapter).expanduser(),
        )
        reporting.conclude(output, report, f"graft check {adapter}", fail_level)


def _merged(
    merged: str, base: str | None, adapters: list[str], settings: CheckSettings, place: dict[str, Any]
) -> Report:
    from graftkit.checks.check_merged import check_merged

    if base is None:
        raise GraftError(
            "a merged checkpoint is compared with its base, and none is named", help="--base MODEL", code="usage"
        )
    return check_merged(merged, base, dict(map(options.weighted, adapters)), settings=settings, **place)
