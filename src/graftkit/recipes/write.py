"""A commented recipe to start from, and the schema that editors check recipes against."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from graftkit.files import write_text
from graftkit.recipes.recipe import RecipeFields
from graftkit.recipes.trainers import TrainerName


def initial_recipe(trainer: TrainerName) -> str:
    """Return a commented recipe for a trainer."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graftkit.recipes"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template("recipe.yaml.j2")
    return template.render(trainer=trainer, config_class=trainer.config_class)


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
