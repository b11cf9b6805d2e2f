"""What the commands that run rules share: their options, the settings, the fixes and the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftkit.cli.options import FailLevel, split
from graftkit.cli.output import Output
from graftkit.errors import GraftError

if TYPE_CHECKING:
    from graftkit.findings import Report
    from graftkit.recipes.recipe import Recipe
    from graftkit.recipes.settings import CheckSettings
    from graftkit.twins.description import TwinDescription

Select = Annotated[
    list[str] | None,
    typer.Option(
        "--select", help="Run only rules whose code begins with this: GK2, GK601. Repeat it or use commas."
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option("--ignore", help="Leave out rules whose code begins with this. Repeat it or use commas."),
]
Fix = Annotated[
    bool, typer.Option("--fix", help="Write the mechanical fixes into the recipe or the adapter's configuration.")
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="The training recipe, a YAML file.", show_default=False)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="List what passed, and every rule that could not decide.")
]


def settings_for(
    select: list[str] | None, ignore: list[str] | None, recipe: Recipe | None = None
) -> CheckSettings:
    """Return the options over the recipe's settings over those of the project in the current folder.

    Raises:
        RecipeError: ``settings``: they cannot be read, or name a rule that does not exist.
    """
    from graftkit.checks.rules import check_settings
    from graftkit.recipes.settings import CheckSettings, project_settings

    given = CheckSettings(select=tuple(split(select) or ()), ignore=tuple(split(ignore) or ()))
    settings = given.over(recipe.fields.checks if recipe else CheckSettings()).over(project_settings())
    check_settings(settings)
    return settings


def run_and_fix(output: Output, check: Callable[[], Report], fix: bool, **files: Path | None) -> Report:
    """Run the checks; with ``fix``, write the mechanical fixes, note them, and run the checks again.

    Args:
        files: ``recipe=`` and ``adapter=``, what may be fixed.

    Raises:
        GraftError: ``usage``: there is no file to fix.
    """
    if not fix:
        return check()
    if not any(files.values()):
        raise GraftError(
            "--fix has nothing to write to",
            where="--fix",
            why="only a recipe and the configuration of a saved adapter can be fixed, and neither was named",
            help="name one: --recipe FILE, or --adapter FOLDER of graft doctor",
            code="usage",
        )
    from graftkit.checks.engine.fixing import fix_all

    report, fixed = fix_all(check, **files)
    for finding in fixed:
        if finding.fix is not None:
            output.note(f"fixed {finding.code} in {files[finding.fix.file]}: {finding.fix}")
    return report


def conclude(
    output: Output,
    report: Report,
    title: str,
    fail_level: FailLevel,
    *,
    verbose: bool,
    twin: TwinDescription | None = None,
) -> None:
    """Write the report in the format asked for, and exit with 1 if a finding counts at ``fail_level``.

    Args:
        twin: what was checked instead of the model, if that was a twin.
    """
    from graftkit.cli.findings_text import findings_text
    from graftkit.findings import Severity
    from graftkit.report.annotations import to_annotations
    from graftkit.report.findings_page import findings_page
    from graftkit.report.html import render_report
    from graftkit.report.sarif import to_sarif

    output.result(
        report.to_dict() | ({"twin": twin.to_dict()} if twin else {}),
        human=lambda: (f"{twin}\n\n" if twin else "") + findings_text(report, verbose=verbose),
        html=lambda: render_report(findings_page(report, title, output.command)),
        sarif=lambda: json.dumps(to_sarif(report), indent=2),
        github=lambda: to_annotations(report),
    )
    if report.at_or_above(Severity(fail_level)):
        raise typer.Exit(1)
