"""What is wrong in a recipe or in settings: a sentence for each entry, with its key and a suggestion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from graftkit.text import quoted, suggest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


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
            found.setdefault(key, _wrong_value(details, key))
    return list(found.values())


# What pydantic's kinds of errors ask for. Those of a union are reported with its first type.
_ASKED: Mapping[str, str] = {
    "string_type": "text, or what else this key takes",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def _wrong_value(details: ErrorDetails, key: tuple[str | int, ...]) -> Problem:
    """Return the problem of one value, with what the key takes instead."""
    kind, given, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "missing":
        return Problem("it is missing", key, f"{key[-1]}: VALUE")
    if kind in ("literal_error", "enum"):
        known = re.findall(r"'([^']+)'", context["expected"])
        return Problem(f"{quoted(given)} is not one of {', '.join(known)}", key, suggest(str(given), known))
    if (asked := _ASKED.get(kind)) is not None:
        return Problem(f"it must be {asked.format(**context)}, not {quoted(given)}", key, None)
    return Problem(details["msg"], key, None)


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
