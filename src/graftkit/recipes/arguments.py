"""The arguments of TRL's configuration classes, and those of a recipe that are unknown to them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from graftkit.errors import MissingDependencyError
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.trainers import TrainerName
from graftkit.text import suggest


@dataclass(frozen=True)
class UnknownArgument:
    """An argument of a recipe that its trainer's configuration class does not have.

    Attributes:
        place: line and column in the recipe, from 1, or those of the nearest parent in the file; None without one.
        advice: a known argument that is near, or where to look.
    """

    name: str
    place: tuple[int, int] | None
    advice: str


def config_class(trainer: TrainerName) -> Any:
    """Return TRL's configuration class of a trainer, without importing the trainer.

    Raises:
        MissingDependencyError: TRL is not installed, or cannot be imported.
    """
    try:
        import trl

        return getattr(trl, trainer.config_class)
    except (ImportError, RuntimeError) as error:  # TRL's lazy module raises RuntimeErrors
        raise MissingDependencyError(
            "TRL, which defines a recipe's arguments, cannot be imported",
            why=str(error),
            help='pip install "graftkit[train]"',
        ) from error


def argument_names(trainer: TrainerName) -> tuple[str, ...]:
    """Return the arguments that a trainer's configuration class takes. Raises as :func:`config_class`."""
    return tuple(field.name for field in dataclasses.fields(config_class(trainer)) if field.init)


def unknown_arguments(recipe: Recipe) -> tuple[UnknownArgument, ...]:
    """Return the recipe's arguments that TRL would refuse. Raises as :func:`config_class`."""
    trainer = recipe.fields.trainer
    known = argument_names(trainer)
    fallback = f"python -c 'import trl; help(trl.{trainer.config_class})'"
    return tuple(
        UnknownArgument(name, recipe.document.place(("args", name)), suggest(name, known) or fallback)
        for name in recipe.args
        if name not in known
    )
