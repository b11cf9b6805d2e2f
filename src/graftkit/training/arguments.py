"""A recipe's ``args`` -> TRL's own configuration class, unchanged but for what the recipe leaves open."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import RecipeError
from graftkit.recipes.recipe import Recipe

if TYPE_CHECKING:
    from transformers import TrainingArguments

_CLASSES = {"sft": "SFTConfig", "dpo": "DPOConfig", "grpo": "GRPOConfig"}


def trainer_arguments(recipe: Recipe) -> TrainingArguments:
    """TRL's configuration with the recipe's arguments.

    Left open, checkpointing is of the non-re-entrant kind, and the output goes to ``out/`` and the recipe's name.

    Raises:
        RecipeError: ``recipe-invalid``, with the line of an argument that the class does not have, or the reason
            why it refuses a value.
    """
    import trl

    config_class = getattr(trl, _CLASSES[recipe.fields.trainer])
    _check_names(recipe, config_class)
    given = {**_defaults(recipe), **recipe.args}
    given.pop("model_init_kwargs", None)
    try:
        return config_class(**given)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise RecipeError(
            f"{config_class.__name__} refuses the recipe's arguments",
            where=_where(recipe, "args"),
            why=f"{type(error).__name__}: {str(error).strip()}",
            code="recipe-invalid",
        ) from error


def argument_names(trainer: str) -> tuple[str, ...]:
    """The arguments that a trainer's configuration class takes."""
    import trl

    return tuple(f.name for f in dataclasses.fields(getattr(trl, _CLASSES[trainer])) if f.init)


def _check_names(recipe: Recipe, config_class: Any) -> None:
    known = argument_names(recipe.fields.trainer)
    strange = next((name for name in recipe.args if name not in known), None)
    if strange is None:
        return
    near = difflib.get_close_matches(strange, known, n=1)
    raise RecipeError(
        f"{config_class.__name__} has no argument {strange!r}",
        where=_where(recipe, f"args.{strange}"),
        help=f"did you mean {near[0]}?" if near else f"python -c 'import trl; help(trl.{config_class.__name__})'",
        code="recipe-invalid",
    )


def _where(recipe: Recipe, key: str) -> str:
    place = recipe.document.place(tuple(key.split(".")))
    return f"{recipe.path}:{place[0]}:{place[1]}" if place else str(recipe.path)


def _defaults(recipe: Recipe) -> dict[str, Any]:
    defaults: dict[str, Any] = {"output_dir": str(Path("out") / recipe.path.stem), "report_to": "none"}
    # TRL sets its default under the name that transformers deprecates, and everybody is warned of it. Options are
    # left out: without any, transformers takes the non-re-entrant kind; of any, TRL makes the other under ZeRO-3.
    if not any(recipe.args.get(f"{name}_checkpointing") is not None for name in ("activation", "gradient")):
        defaults["activation_checkpointing"] = True
    return defaults
