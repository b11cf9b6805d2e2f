"""What is wrong in a recipe or in settings, in one sentence, with the key and a suggestion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from graftkit.text import suggest


def explain(error: ValidationError, model: type[BaseModel]) -> tuple[str, tuple[str | int, ...], str | None]:
    """Return the first problem: why, its key, and a suggestion."""
    problem = error.errors(include_url=False)[0]
    key = tuple(part for part in problem["loc"] if part != "[key]")  # pydantic marks a mapping's key
    if problem["type"] != "extra_forbidden":
        return problem["msg"], key, None
    known = _fields_at(model, key[:-1])
    return f"unknown key {key[-1]!r}", key, suggest_key(str(key[-1]), known)


def suggest_key(key: str, known: Sequence[str]) -> str:
    """Return the nearest known key, or all of them if none is near."""
    return suggest(key, known) or f"known keys: {', '.join(known)}"


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    fields = model.model_fields
    for part in path:
        nested = fields[part].annotation if part in fields else None
        if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
            break
        fields = nested.model_fields
    return list(fields)
