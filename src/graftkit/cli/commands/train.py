"""``graft train``: SFT, DPO and GRPO through TRL, guarded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftkit.cli import options
from graftkit.cli.output import INTERRUPTED, Format, Output, only_data_on_stdout
from graftkit.errors import GraftError
from graftkit.recipes.trainers import TrainerName

if TYPE_CHECKING:
    from graftkit.progress import Progress
    from graftkit.recipes.recipe import Recipe
    from graftkit.training.result import TrainingResult


def train(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False)
    ] = None,
    init: Annotated[
        TrainerName | None, typer.Option("--init", help="Print a commented recipe for this trainer instead.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last complete checkpoint.")] = False,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace a value of the recipe: args.max_steps=10. Repeat it."),
    ] = None,
    launch: Annotated[
        int | None, typer.Option("--launch", min=1, help="Number of processes to start through accelerate.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    output_format: options.FormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Train an adapter from a recipe, and check what was saved."""
    with only_data_on_stdout(output_format, json=json) as output:
        if init is not None:
            from graftkit.recipes.write import initial_recipe

            text = initial_recipe(init)
            output.result({"recipe": text}, human=lambda: text.rstrip("\n"))
            return
        if recipe is None:
            raise GraftError(
                "nothing to train",
                where="graft train",
                why="no recipe was named",
                help="graft train RECIPE; graft init writes a first one",
                code="usage",
            )
        from graftkit.recipes.recipe import read_recipe

        read = read_recipe(recipe, change or ())
        if launch is not None and launch > 1:
            raise typer.Exit(_launched(launch))
        result = _train(output, read, resume=resume, trust_remote_code=trust_remote_code)
        if _rank():
            return
        output.result(result)
        if result.interrupted:
            raise typer.Exit(INTERRUPTED)


def _train(output: Output, recipe: Recipe, *, resume: bool, trust_remote_code: bool) -> TrainingResult:
    """Train; of several processes, only the first writes progress, and the others write their error alone."""
    from graftkit.training.run import train as run

    def show(progress: Progress) -> None:
        if not _rank():
            output.note(progress.step)

    try:
        return run(recipe, resume=resume, trust_remote_code=trust_remote_code, on_progress=show)
    except Exception as error:
        if not _rank():
            raise
        output.note(f"process {_rank()}: {error}")
        raise typer.Exit(2) from error


def _launched(processes: int) -> int:
    """Run the same command without ``--launch`` in several processes, and return its exit status."""
    from graftkit.cli.launch import launch, without_launch

    return launch(without_launch(sys.argv[1:]), processes)


def _rank() -> int:
    """Return this process's number among those that train together, as every launcher sets it."""
    return int(os.environ.get("RANK", "0"))
