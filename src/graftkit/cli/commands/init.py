"""``graft init``: a first recipe for a model and a data file."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from graftkit.cli import options
from graftkit.cli.output import Format, only_data_on_stdout
from graftkit.cli.progress import working
from graftkit.errors import GraftError, OutputError
from graftkit.recipes.trainers import TrainerName


def init(
    model: Annotated[
        str | None, typer.Option("--model", help="A hub id, a local directory, a config.json, or a model type.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="A JSON, JSONL, CSV or Parquet file, a folder, or a hub id.")
    ] = None,
    goal: Annotated[
        TrainerName | None, typer.Option("--goal", help="Default: the one whose columns the data has.")
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option("--gpu-memory", min=1, help="GiB of the GPU: the base is quantized where it has to be."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The recipe to write.")] = Path("recipe.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing recipe.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    revision: options.Revision = None,
    output_format: options.FormatOption = Format.HUMAN,
    json: options.JsonOption = False,
) -> None:
    """Write a first recipe: from the model, the columns of the data and the GPU's memory. Asks in a terminal."""
    if out.exists() and not overwrite:
        raise OutputError(
            "a recipe already exists",
            where=str(out),
            why="it would be replaced",
            help="--overwrite replaces it; --out FILE writes another",
            code="output-exists",
        )
    model = model or _asked("--model", "Model (a hub id or a folder)")
    data = _from(out.parent, data or _asked("--data", "Data (a file or a folder of rows)"))
    with only_data_on_stdout(output_format, json=json) as output:
        from graftkit.files import write_text
        from graftkit.training.first_recipe import first_recipe

        with working(f"looking at {model} and {data}"):
            made = first_recipe(
                model,
                data,
                home=out.parent,
                trainer=goal,
                gpu_memory=gpu_memory,
                trust_remote_code=trust_remote_code,
                revision=revision,
            )
        write_text(out, made.text)
        name = shlex.quote(str(out))
        steps = [f"graft doctor --recipe {name}", f"graft verify --recipe {name} --twin", f"graft train {name}"]
        lines = [f"wrote {out}", *(f"  {reason}" for reason in made.reasons), "next:", *(f"  {s}" for s in steps)]
        output.result({**made.to_dict(), "file": str(out), "next": steps}, human=lambda: "\n".join(lines))


def _from(folder: Path, data: str) -> str:
    """Return where the data is, seen from the recipe's folder: a recipe's paths are relative to it."""
    place = Path(data).expanduser()
    if place.is_absolute() or not place.exists():
        return data
    return os.path.relpath(place, folder)


def _asked(option: str, question: str) -> str:
    """Ask for what was not given. Without a terminal nobody can answer: that is an error, not a wait."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        why = "there is no terminal to ask in"
        raise GraftError(
            f"{option} is needed",
            where="graft init",
            why=why,
            help="graft init --model MODEL --data FILE",
            code="usage",
        )
    return str(typer.prompt(question, err=True))
