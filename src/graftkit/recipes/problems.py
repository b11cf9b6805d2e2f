"""What is wrong in a recipe or in settings: a sentence for each entry, with its key and a suggestion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from graftkit.text import suggest


@dataclass(frozen=True)
class Problem:
    """One entry that is not valid.

    Attributes:
        why: one sentence.
        key: the entry's place in the file.
        advice: a suggestion, or None.
    """

    why: str
    key: tuple[str | int, ...]
    advice: str | None

    @property
    def name(self) -> str:
        """The key as it is written with dots."""
        return ".".join(map(str, self.key))


def problems(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Return what is wrong: one problem a key, in the order of the model's fields."""
    found: dict[tuple[str | int, ...], Problem] = {}
    for details in error.errors(include_url=False):
        # pydantic marks a mapping's key, and the types of a union: ("adapter", "scope", "list[str]").
        key = tuple(part for part in details["loc"] if part not in ("[key]", "str", "list[str]"))
        if details["type"] == "extra_forbidden":
            advice = suggest_key(str(key[-1]), _fields_at(model, key[:-1]))
            found.setdefault(key, Problem(f"unknown key {key[-1]!r}", key, advice))
        else:
            found.setdefault(key, Problem(details["msg"], key, None))
    return list(found.values())


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
