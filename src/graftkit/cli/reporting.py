"""What the checking commands share: which rules, in which form, what is mended, and how they end."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftkit.cli.options import FailLevel, split
from graftkit.cli.output import Format, Output, progress_console

if TYPE_CHECKING:
    from graftkit.findings import Finding, Report
    from graftkit.recipes.recipe import Recipe
    from graftkit.recipes.settings import CheckSettings

Select = Annotated[
    list[str] | None,
    typer.Option("--select", help="Run only rules whose code begins so: GK2, GK601. Repeat it or use commas."),
]
Ignore = Annotated[
    list[str] | None, typer.Option("--ignore", help="Leave out rules whose code begins so. Repeat or use commas.")
]
FixOption = Annotated[
    bool, typer.Option("--fix", help="Write the mechanical fixes into the recipe or the adapter's configuration.")
]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", help="The training recipe, a YAML file.", show_default=False)
]


def settings_for(
    select: list[str] | None, ignore: list[str] | None, recipe: Recipe | None = None
) -> CheckSettings:
    """The options over the recipe's settings over those of the project in the current folder.

    Raises:
        RecipeError: ``settings``: they cannot be read, or name what is no rule.
    """
    from graftkit.checks.rules import check_settings
    from graftkit.recipes.settings import CheckSettings, project_settings

    given = CheckSettings(select=tuple(split(select) or ()), ignore=tuple(split(ignore) or ()))
    settings = given.over(recipe.fields.checks if recipe else CheckSettings()).over(project_settings())
    check_settings(settings)
    return settings


def run_and_fix(
    check: Callable[[], Report], fix: bool, *, recipe: Path | None = None, adapter: Path | None = None
) -> Report:
    """Run the checks; with ``fix``, write what can be mended, say so on stderr, and run them again."""
    if not fix:
        return check()
    from graftkit.checks.engine.fixing import fix_all

    report, mended = fix_all(check, recipe=recipe, adapter=adapter)
    _tell(mended, {"recipe": recipe, "adapter": adapter})
    return report


def _tell(mended: Iterable[Finding], files: dict[str, Path | None]) -> None:
    console = progress_console()
    for finding in mended:
        assert finding.fix is not None
        console.print(f"fixed {finding.code} in {files[finding.fix.file]}: {finding.fix}", soft_wrap=True)


def conclude(output: Output, report: Report, title: str, fail_level: FailLevel) -> None:
    """Write the report in the format asked for, and end with status 1 where something counts at ``fail_level``."""
    from graftkit.cli.findings_text import findings_text
    from graftkit.findings import Severity
    from graftkit.report.annotations import to_annotations
    from graftkit.report.findings_page import findings_page
    from graftkit.report.sarif import to_sarif

    output.result(
        report,
        findings_text(report),
        page=findings_page(title, shlex.join(["graft", *sys.argv[1:]])),
        other={
            Format.SARIF: lambda found: json.dumps(to_sarif(found), indent=2),
            Format.GITHUB: to_annotations,
        },
    )
    if report.at_or_above(Severity(fail_level.value)):
        raise typer.Exit(1)
