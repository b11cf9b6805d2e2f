"""``graft check``: is a saved adapter complete, and does it fit its base?"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftkit.cli import options, reporting
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.cli.progress import working
from graftkit.errors import GraftError

if TYPE_CHECKING:
    from graftkit.findings import Report


def check(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter's folder.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="The base model, as MODEL of the other commands.")
    ] = None,
    merged_from: Annotated[list[str] | None, typer.Option("--adapter", "-a", hidden=True)] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="The engine that will serve it: vllm, sglang, llama.cpp or vllm==0.32."),
    ] = None,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Read only the headers: takes equally long for any size.")
    ] = False,
    select: reporting.Select = None,
    ignore: reporting.Ignore = None,
    fix: reporting.Fix = False,
    fail_level: options.FailLevelOption = "error",
    verbose: reporting.Verbose = False,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.ReportFormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Check a saved adapter: is it complete and safe to load, and does it fit its base?"""
    with only_data_on_stdout(output_format, json=json) as output:
        if merged_from:
            raise _another_command(adapter, base, merged_from)
        from graftkit.checks.check import check as run_checks
        from graftkit.surveying.survey import survey

        settings = reporting.settings_for(select, ignore)
        model_map = None
        if base is not None:
            with working(f"surveying {base}"):
                model_map = survey(base, trust_remote_code=trust_remote_code, revision=revision)

        def examine() -> Report:
            with working(f"checking {adapter}"):
                return run_checks(
                    adapter,
                    model_map,
                    target=target,
                    data=not headers_only,
                    settings=settings,
                    trust_remote_code=trust_remote_code,
                    revision=revision,
                )

        report = reporting.run_and_fix(output, examine, fix, adapter=Path(adapter).expanduser())
        reporting.conclude(output, report, f"graft check {adapter}", fail_level, verbose=verbose)


def _another_command(merged: str, base: str | None, adapters: list[str]) -> GraftError:
    args = [merged, "--base", base or "BASE", *(arg for adapter in adapters for arg in ("--adapter", adapter))]
    return GraftError(
        "a merged checkpoint is checked by graft check-merged",
        where="--adapter",
        why="graft check looks at one adapter",
        help=f"graft check-merged {shlex.join(args)}",
        code="usage",
    )
