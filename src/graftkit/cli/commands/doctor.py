"""``graft doctor``: everything that can be checked before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftkit.cli import options, reporting
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.cli.progress import progress_bar

if TYPE_CHECKING:
    from graftkit.findings import Report
    from graftkit.recipes.recipe import Recipe


def doctor(
    model: options.RecipesModel = None,
    recipe: reporting.RecipeFile = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="A folder with an adapter_config.json: check its targets instead."),
    ] = None,
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
    """Check the environment and, if given, a model, a recipe and an adapter's configuration.

    Without --recipe, the recipe.yaml of the current folder is checked if there is one.
    """
    with only_data_on_stdout(output_format, json=json) as output:
        from graftkit.checks.doctor import doctor as examine
        from graftkit.recipes.recipe import find_recipe, read_recipe

        file = recipe or find_recipe()

        def check() -> Report:
            read: Recipe | None = read_recipe(file) if file else None
            with progress_bar() as on_progress:
                return examine(
                    model,
                    recipe=read,
                    adapter=adapter,
                    settings=reporting.settings_for(select, ignore, read),
                    trust_remote_code=trust_remote_code,
                    revision=revision,
                    on_progress=on_progress,
                )

        report = reporting.run_and_fix(output, check, fix, recipe=file, adapter=adapter)
        reporting.conclude(output, report, "graft doctor", fail_level, verbose=verbose)
