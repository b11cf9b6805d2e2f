"""Which families, methods and checks a request means."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import graftkit
from graftkit.errors import GraftError
from graftkit.matrix.cell import Check
from graftkit.matrix.trials.methods import matrix_method, matrix_methods
from graftkit.surveying.sources.model_types import (
    is_model_type,
    model_types,
    similar_types,
    transformers_version,
)
from graftkit.text import suggest

ALL = "all"


def known_types() -> tuple[str, ...]:
    """Return every model type of the installed transformers, sorted."""
    return model_types()


def families_named(names: Iterable[str]) -> tuple[str, ...]:
    """Return the model types by these names, each once.

    Raises:
        GraftError: ``model-type-unknown``.
    """
    chosen = tuple(dict.fromkeys(names))
    for name in chosen:
        if not is_model_type(name):
            raise GraftError(
                f"the installed transformers has no model type {name!r}",
                where="--families",
                why=f"transformers {transformers_version()} has none of that name",
                help=similar_types(name) or "graft matrix --all tries every type that it has",
                code="model-type-unknown",
            )
    return chosen


def methods_named(names: Iterable[str]) -> tuple[str, ...]:
    """Return the methods by these names, each once; "all" is every one.

    Raises:
        PlanError: ``method-unknown``, or ``method-not-for-layers``.
    """
    chosen = tuple(dict.fromkeys(names))
    if ALL in chosen:
        return matrix_methods()
    return tuple(matrix_method(name).name for name in chosen)


def checks_named(names: Iterable[str]) -> tuple[Check, ...]:
    """Return the checks by these names, in the order in which they are tried.

    Raises:
        GraftError: ``check-unknown``.
    """
    chosen = set(names)
    known = [str(check) for check in Check]
    for name in sorted(chosen - set(known)):
        raise GraftError(
            f"there is no check {name!r}",
            where="--checks",
            why=f"the known ones are {', '.join(known)}",
            help=suggest(name, known) or f"--checks {known[0]}",
            code="check-unknown",
        )
    return tuple(check for check in Check if check in chosen)


def checked_in_store() -> Path | None:
    """Return the store that the repository keeps, or None outside a checkout."""
    file = Path(graftkit.__file__).parents[2] / "docs" / "matrix.jsonl.gz"
    return file if file.is_file() else None


def own_store() -> Path:
    """Return the store of this user's runs, in the assets cache of the Hugging Face libraries."""
    from huggingface_hub import cached_assets_path

    return Path(cached_assets_path(library_name="graftkit", namespace="matrix")) / "matrix.jsonl"
