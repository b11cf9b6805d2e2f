"""Whether the fields of an adapter_config.json are of the kinds that PEFT's configuration class declares."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

_KINDS = frozenset({bool, int, float, str, list, dict})
_WORDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    types.NoneType: "null",
}


def wrong_kinds(config: Mapping[str, Any], peft_type: str) -> tuple[str, ...]:
    """The fields whose JSON value is of another kind than the field's, each as a clause."""
    declared = _declared(peft_type)
    found = []
    for name, value in config.items():
        kinds = declared.get(name)
        # PEFT's classes check nothing, and null in their fields is as good as false.
        if kinds and value is not None and type(value) not in kinds:
            due = " or ".join(_WORDS[kind] for kind in _WORDS if kind in kinds)
            found.append(f"{name} is {_WORDS[type(value)]}, not {due}")
    return tuple(found)


@cache
def _declared(peft_type: str) -> Mapping[str, frozenset[type]]:
    """Field -> the JSON kinds it may have; fields whose declaration is too loose to tell are left out."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    try:
        cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
        hints = typing.get_type_hints(cls)
    except (KeyError, ValueError, NameError, TypeError):
        return {}
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: kinds for name in names if (kinds := _kinds(hints.get(name)))}


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
    import enum

    if not isinstance(plain, type):
        return frozenset()
    if issubclass(plain, enum.Enum):
        return frozenset({str})
    if plain in (set, tuple):
        return frozenset({list})
    return frozenset({dict}) if dataclasses.is_dataclass(plain) else frozenset()
