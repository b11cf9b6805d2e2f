"""All exceptions: each says what failed, where, why, and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class GraftError(Exception):
    """Base of every error graftkit raises on purpose.

    Attributes:
        code: a stable, kebab-case name that scripts can match on.
        what: the failure in one sentence.
        where: the file, path, model or option it concerns, or None.
        why: the cause, or None where nothing is known beyond ``what``.
        help: the next step: a command, an option, or a value to try.
    """

    code = "error"

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        why: str | None = None,
        help: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.help = help
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        details = {"where": self.where, "why": self.why, "help": self.help}
        lines = [f"  {name}: {text}" for name, text in details.items() if text]
        return "\n".join([f"[{self.code}] {self.what}", *lines])

    def to_dict(self) -> dict[str, str | None]:
        """Return the error as JSON-ready fields: code, what, where, why, help."""
        return {
            "code": self.code,
            "what": self.what,
            "where": self.where,
            "why": self.why,
            "help": self.help,
        }


class SourceError(GraftError):
    """The model named by the user could not be resolved to a configuration."""

    code = "model-source"


class ModelTypeError(SourceError):
    """A configuration was found, and the installed transformers does not know its model type.

    Attributes:
        config: the configuration's ``model_type`` and ``transformers_version``.
    """

    code = "model-type-unknown"

    def __init__(self, what: str, *, config: dict[str, str | None], **details: str | None) -> None:
        super().__init__(what, **details)
        self.config = config


class BuildError(GraftError):
    """A configuration was found, but no model could be built from it."""

    code = "model-build"


class PlanError(GraftError):
    """The request cannot be turned into an adapter configuration for this model."""

    code = "plan"


class AttachError(GraftError):
    """The adapter that PEFT attached is not the one that was planned."""

    code = "attach"


class VerifyError(GraftError):
    """A check could not be started at all (a check that fails is a finding, not an error)."""

    code = "verify"


class OutputError(GraftError):
    """A result could not be written where it was asked for."""

    code = "output"


class MissingDependencyError(GraftError):
    """An optional package that this operation needs is not installed."""

    code = "missing-dependency"


class AdapterError(GraftError):
    """An adapter's files are missing, broken or unsafe, or do not belong to the model they are used with."""

    code = "adapter"


class MergeError(GraftError):
    """An adapter cannot be merged into this base, or the result did not pass its verification."""

    code = "merge"


class RecipeError(GraftError):
    """A recipe, or graftkit's settings, cannot be read or contains an unknown or invalid entry."""

    code = "recipe"


class EngineError(GraftError):
    """A serving engine is unknown, or its version is not valid."""

    code = "engine"


class ServerError(GraftError):
    """A live server cannot be asked, refuses, or answers what cannot be read."""

    code = "server"


class DataError(GraftError):
    """Training data cannot be read, or has another form than the trainer needs."""

    code = "data"


class TrainingError(GraftError):
    """A run cannot start, or was stopped because continuing would be useless."""

    code = "training"


@contextmanager
def reraise_as(make_error: Callable[[str, str], GraftError], path: str | Path) -> Iterator[None]:
    """Raise any ``OSError`` of the block as ``make_error(path, reason)``.

    The reason is the operating system's, without its own idea of the path: where one file is read while another is
    written, that names the wrong one, or none.
    """
    try:
        yield
    except OSError as error:
        raise make_error(str(path), error.strerror or str(error)) from error
