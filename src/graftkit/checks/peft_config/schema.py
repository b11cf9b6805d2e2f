"""What the installed PEFT declares for a method: its configuration's fields, and the prefix of its tensors."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from graftkit.checks.peft_config.peft_source import written_method

_TYPE_NAMES: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    types.NoneType: "null",
}


@dataclass(frozen=True)
class Declared:
    """The declarations of one method.

    Attributes:
        prefix: prefix of its tensors' names ("lora_"), or None where it keeps none in a model's layers.
        fields: field of its configuration -> the JSON types it may have; empty where any value may be right.
    """

    prefix: str | None
    fields: Mapping[str, frozenset[type]]


@cache
def declared(peft_type: str) -> Declared | None:
    """Return what PEFT declares for a method, named in capitals; None where the installed PEFT has no such method.

    Importing PEFT takes seconds: its source is read as text, and PEFT is imported where the text is not enough.
    """
    written = written_method(peft_type)
    if written is None:
        return imported(peft_type)
    prefix, hints = written
    return Declared(prefix, {name: _kinds(hint) for name, hint in hints.items()})


def wrong_kinds(config: Mapping[str, Any], peft_type: str) -> dict[str, str]:
    """Return the fields whose JSON value has another type than the field: name -> a clause that says so."""
    method = declared(peft_type)
    if method is None:
        return {}
    found = {}
    for name, value in config.items():
        kinds = method.fields.get(name)
        # PEFT's classes check nothing, and null in their fields is as good as false.
        if kinds and value is not None and type(value) not in kinds:
            expected = " or ".join(_TYPE_NAMES[kind] for kind in _TYPE_NAMES if kind in kinds)
            found[name] = f"{name} is {_TYPE_NAMES[type(value)]}, not {expected}"
    return found


def imported(peft_type: str) -> Declared | None:
    """Return the same from PEFT's own tables and classes."""
    from peft import PeftType, PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING

    try:
        kind = PeftType(peft_type)
        cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    except (KeyError, ValueError):
        return None
    prefix = None if issubclass(cls, PromptLearningConfig) else PEFT_TYPE_TO_PREFIX_MAPPING.get(kind)
    hints = _hints(cls)
    return Declared(prefix, {field.name: _kinds(hints.get(field.name)) for field in dataclasses.fields(cls)})


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):
        return {}


def _kinds(hint: Any) -> frozenset[type]:
    """Return the JSON types of an annotation; empty where it, or a part of it, names none."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arms = [_kinds(arm) for arm in typing.get_args(hint)]
        return frozenset().union(*arms) if all(arms) else frozenset()
    if typing.get_origin(hint) is typing.Literal:
        return frozenset(type(value) for value in typing.get_args(hint))
    plain = typing.get_origin(hint) or hint
    if plain is float:
        return frozenset({float, int})
    if plain in _TYPE_NAMES:
        return frozenset({plain})
    return _saved_as(plain)


def _saved_as(plain: Any) -> frozenset[type]:
    """Return the JSON type that a value is saved as: a string for an enumeration, a list for a set or tuple."""
    if not isinstance(plain, type):
        return frozenset()
    if issubclass(plain, enum.Enum):
        return frozenset({str})
    if plain in (set, tuple):
        return frozenset({list})
    return frozenset({dict}) if dataclasses.is_dataclass(plain) else frozenset()
