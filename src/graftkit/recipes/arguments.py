"""The arguments that TRL's configuration classes have, and those of a recipe that they do not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from graftkit.errors import MissingDependencyError
from graftkit.recipes.recipe import Recipe
from graftkit.text import suggest

CONFIG_CLASSES = {"sft": "SFTConfig", "dpo": "DPOConfig", "grpo": "GRPOConfig"}


@dataclass(frozen=True)
class UnknownArgument:
    """An argument of a recipe that its trainer's configuration class does not have.

    Attributes:
        name: as it is written.
        place: its line and column in the recipe, from 1, or those of the nearest key that the file has; None
            where it has none.
        advice: what may have been meant, or where to look.
    """

    name: str
    place: tuple[int, int] | None
    advice: str


def config_class(trainer: str) -> Any:
    """TRL's configuration class of a trainer. The trainer itself is not imported with it.

    Raises:
        MissingDependencyError: TRL is not installed, or cannot be imported.
    """
    try:
        import trl

        return getattr(trl, CONFIG_CLASSES[trainer])
    except (ImportError, RuntimeError) as error:  # TRL's lazy module makes RuntimeErrors of those within
        raise MissingDependencyError(
            "TRL, whose arguments a recipe gives, cannot be imported",
            why=str(error),
            help='pip install "graftkit[train]"',
        ) from error


def argument_names(trainer: str) -> tuple[str, ...]:
    """The arguments that a trainer's configuration class takes. Raises as :func:`config_class`."""
    return tuple(field.name for field in dataclasses.fields(config_class(trainer)) if field.init)


def unknown_arguments(recipe: Recipe) -> tuple[UnknownArgument, ...]:
    """The recipe's arguments that TRL would refuse, as they are written. Raises as :func:`config_class`."""
    trainer = recipe.fields.trainer
    known = argument_names(trainer)
    otherwise = f"python -c 'import trl; help(trl.{CONFIG_CLASSES[trainer]})'"
    return tuple(
        UnknownArgument(name, recipe.document.place(("args", name)), suggest(name, known) or otherwise)
        for name in recipe.args
        if name not in known
    )
