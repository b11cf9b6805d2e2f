"""What the installed PEFT declares of a method: its configuration's fields, and how its tensors' names begin."""

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

_KINDS = frozenset({bool, int, float, str, list, dict})


@dataclass(frozen=True)
class Declared:
    """One method.

    Attributes:
        prefix: how its tensors' names begin ("lora_"), or None where it keeps none in a model's layers.
        fields: field of its configuration -> the JSON kinds it may have; empty where that is too loose to tell.
    """

    prefix: str | None
    fields: Mapping[str, frozenset[type]]


@cache
def declared(peft_type: str) -> Declared | None:
    """What PEFT declares of a method, by its name in capitals; None where the installed PEFT knows none such.

    Its source is read first, because importing it takes seconds; PEFT is asked what the text does not tell.
    """
    written = written_method(peft_type)
    if written is None:
        return asked(peft_type)
    prefix, hints = written
    return Declared(prefix, {name: _kinds(hint) for name, hint in hints.items()})


def asked(peft_type: str) -> Declared | None:
    """The same from PEFT's own tables and classes."""
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
    """The JSON kinds of a declaration; empty where it says nothing, or where a part of it is no JSON kind."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arms = [_kinds(arm) for arm in typing.get_args(hint)]
        return frozenset().union(*arms) if all(arms) else frozenset()
    if typing.get_origin(hint) is typing.Literal:
        return frozenset(type(value) for value in typing.get_args(hint))
    plain = typing.get_origin(hint) or hint
    if plain is float:
        return frozenset({float, int})
    if plain is types.NoneType or plain in _KINDS:
        return frozenset({plain})
    return _loose(plain)


def _loose(plain: Any) -> frozenset[type]:
    """What is no JSON kind itself and is saved as one: an enumeration as a string, a set or tuple as a list."""
    if not isinstance(plain, type):
        return frozenset()
    if issubclass(plain, enum.Enum):
        return frozenset({str})
    if plain in (set, tuple):
        return frozenset({list})
    return frozenset({dict}) if dataclasses.is_dataclass(plain) else frozenset()
