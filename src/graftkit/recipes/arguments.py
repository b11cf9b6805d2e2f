"""The arguments of TRL's configuration classes, and those of a recipe that are unknown to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from graftkit.errors import MissingDependencyError
from graftkit.recipes.document import Document
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

    def __str__(self) -> str:
        """Return the name, quoted, with its line and column."""
        return repr(self.name) + (f" (line {self.place[0]}, column {self.place[1]})" if self.place else "")


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


def unknown_arguments(
    document: Document, trainer: TrainerName, names: Iterable[str]
) -> tuple[UnknownArgument, ...]:
    """Return the arguments, by name, that TRL would refuse. Raises as :func:`config_class`."""
    known = argument_names(trainer)
    fallback = f"python -c 'import trl; help(trl.{trainer.config_class})'"
    return tuple(
        UnknownArgument(name, document.place(("args", name)), suggest(name, known) or fallback)
        for name in names
        if name not in known
    )


def advice_on(unknown: Sequence[UnknownArgument]) -> str:
    """Return the advice on unknown arguments, each under its name where there are several."""
    if len(unknown) == 1:
        return unknown[0].advice
    return "; ".join(f"{argument.name}: {argument.advice}" for argument in unknown)
