"""``graft train``: SFT, DPO and GRPO through TRL, guarded."""

from __future__ import annotations

import os
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from graftkit.cli import options
from graftkit.cli.output import Format, only_data_on_stdout, progress_console
from graftkit.errors import GraftError


class Trainer(StrEnum):
    """TRL's trainers that a recipe can name."""

    SFT = "sft"
    DPO = "dpo"
    GRPO = "grpo"


def train(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False)
    ] = None,
    init: Annotated[
        Trainer | None, typer.Option("--init", help="Print a commented recipe for this trainer instead.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace a value of the recipe: args.max_steps=10. Repeat it."),
    ] = None,
    launch: Annotated[
        int | None, typer.Option("--launch", min=1, help="Start so many processes through accelerate.")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    output_format: options.FormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Train an adapter as a recipe says, and read back what was saved."""
    if launch is not None:
        raise typer.Exit(_launched(launch))
    with only_data_on_stdout(options.chosen(output_format, json)) as output:
        if init is not None:
            from graftkit.recipes.write import initial_recipe

            output.result({"recipe": initial_recipe(init.value)}, initial_recipe(init.value).rstrip("\n"))
            return
        if recipe is None:
            raise GraftError(
                "nothing to train", help="graft train RECIPE, or graft train --init sft", code="usage"
            )
        from graftkit.recipes.recipe import read_recipe
        from graftkit.training.run import train as run

        console = progress_console()
        result = run(
            read_recipe(recipe, change or ()),
            resume=resume,
            trust_remote_code=trust_remote_code,
            tell=lambda step: console.print(step),
        )
        if int(os.environ.get("RANK", "0")) == 0:
            output.result(result)


def _launched(processes: int) -> int:
    """The same command without ``--launch``, in so many processes that accelerate starts."""
    words = [word for word in sys.argv[1:] if not word.startswith("--launch=")]
    if "--launch" in words:
        at = words.index("--launch")
        del words[at : at + 2]
    command = ["accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--module", "graftkit.cli.main", *words]
    return subprocess.call([sys.executable, "-m", *command])
