"""A commented recipe to start from, and the schema that editors check recipes against."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from graftkit.files import write_text
from graftkit.recipes.recipe import RecipeFields
from graftkit.recipes.trainers import TrainerName

_USUAL_DATA = {
    TrainerName.SFT: "train.jsonl",
    TrainerName.DPO: "preferences.jsonl",
    TrainerName.GRPO: "prompts.jsonl",
}


@dataclass(frozen=True)
class Start:
    """What a recipe begins with.

    Attributes:
        model: as ``graftkit.plan`` takes it.
        data: where the rows are; None for the usual name for a trainer.
        columns: the trainer's column -> the data's, where these differ.
        scope: towers to adapt; None for those that every batch feeds.
        quantization: "4bit", or None.
        reward: for grpo.
        eval_share: of the rows that are kept out of training; None for none.
        other_modalities: whether rows have images or sounds.
    """

    model: str = "google/gemma-4-E2B-it"
    data: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    scope: Sequence[str] | None = ("language",)
    quantization: str | None = None
    reward: str = "number_match"
    eval_share: float | None = 0.05
    other_modalities: bool = False


def initial_recipe(trainer: TrainerName, start: Start = Start()) -> str:
    """Return a commented recipe for a trainer."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graftkit.recipes"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template("recipe.yaml.j2")
    given = replace(
        start, data=start.data or _USUAL_DATA[trainer], scope=list(start.scope) if start.scope else None
    )
    return template.render(trainer=trainer, config_class=trainer.config_class, start=given)


def recipe_schema() -> str:
    """Return the recipe's JSON Schema (2020-12), as text."""
    fields = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **RecipeFields.model_json_schema(),
        "title": "graftkit recipe",
    }
    return json.dumps(fields, indent=2) + "\n"


def main(arguments: list[str]) -> int:
    """Write the schema to the file named, or with ``--check`` return 1 if that is out of date."""
    file = Path(next(argument for argument in arguments if not argument.startswith("-")))
    if "--check" not in arguments:
        write_text(file, recipe_schema())
        return 0
    if file.is_file() and file.read_text(encoding="utf-8") == recipe_schema():
        return 0
    sys.stderr.write(f"{file} is out of date; run `make docs`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
