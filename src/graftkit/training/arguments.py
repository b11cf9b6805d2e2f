"""TRL's configuration of a trainer, made of a recipe's ``args``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import RecipeError
from graftkit.recipes.arguments import config_class, unknown_arguments
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.training import checkpointing_argument

if TYPE_CHECKING:
    from transformers import TrainingArguments


def trainer_arguments(recipe: Recipe) -> TrainingArguments:
    """Return TRL's configuration with the recipe's arguments.

    By default, activation checkpointing is not re-entrant, and the output goes to ``out/`` and the recipe's name.

    Raises:
        RecipeError: ``recipe-invalid``, with the line of an unknown argument, or why a value is refused.
        MissingDependencyError: TRL is not installed.
    """
    _check_names(recipe)
    made = config_class(recipe.fields.trainer)
    given = {**_defaults(recipe), **recipe.args}
    given.pop("model_init_kwargs", None)
    try:
        return made(**given)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise RecipeError(
            f"{made.__name__} refuses the recipe's arguments",
            where=recipe.document.where(("args",)),
            why=f"{type(error).__name__}: {str(error).strip()}",
            code="recipe-invalid",
        ) from error


def _check_names(recipe: Recipe) -> None:
    unknown = next(iter(unknown_arguments(recipe)), None)
    if unknown is not None:
        raise RecipeError(
            f"{recipe.fields.trainer.config_class} has no argument {unknown.name!r}",
            where=recipe.document.where(("args", unknown.name)),
            help=unknown.advice,
            code="recipe-invalid",
        )


def _defaults(recipe: Recipe) -> dict[str, Any]:
    defaults: dict[str, Any] = {"output_dir": str(Path("out") / recipe.path.stem), "report_to": "none"}
    # TRL sets its default under the name that transformers deprecates, with a warning. Options are left out:
    # without any, transformers takes the non-re-entrant kind; from any, TRL makes the re-entrant one under ZeRO-3.
    if checkpointing_argument(recipe.args, "checkpointing", None)[0] is None:
        defaults["activation_checkpointing"] = True
    return defaults
