"""Whether the fields of an adapter_config.json are of the kinds that PEFT's configuration class declares."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from graftkit.checks.peft_config.schema import declared

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
    method = declared(peft_type)
    if method is None:
        return ()
    found = []
    for name, value in config.items():
        kinds = method.fields.get(name)
        # PEFT's classes check nothing, and null in their fields is as good as false.
        if kinds and value is not None and type(value) not in kinds:
            due = " or ".join(_WORDS[kind] for kind in _WORDS if kind in kinds)
            found.append(f"{name} is {_WORDS[type(value)]}, not {due}")
    return tuple(found)
