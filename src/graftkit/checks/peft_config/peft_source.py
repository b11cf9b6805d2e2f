"""PEFT's source, read as text: importing PEFT imports torch and transformers, which takes seconds."""

from __future__ import annotations

import ast
import enum
import typing
from collections.abc import Iterator, Mapping
from dataclasses import make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_DATACLASS, _ENUM, _REGISTER = "dataclass", "Enum", "register_peft_method"
# The base classes of a method's configuration, in the order in which they declare fields.
_BASES = ("PeftConfigMixin", "PeftConfig")

_Classes = Mapping[str, ast.ClassDef]


def written_method(peft_type: str) -> tuple[str, Mapping[str, Any]] | None:
    """Return the prefix of a method's tensors, and its configuration's fields with their annotations as types.

    Classes that an annotation names are replaced by an empty enumeration or dataclass.
    Sources: ``__init__.py`` and ``config.py`` of ``peft/tuners/<method>``, ``peft/config.py``,
    ``peft/utils/peft_types.py``.

    Returns:
        None where the text is not enough, as for a class derived from another method's: PEFT must be imported.
    """
    try:
        return _read(peft_type)
    except (OSError, ValueError, SyntaxError, LookupError, NameError, TypeError):
        return None


def _read(peft_type: str) -> tuple[str, Mapping[str, Any]] | None:
    peft = _home()
    types = _classes(peft / "utils" / "peft_types.py")
    if peft_type not in _members(types["PeftType"]):
        return None
    method = peft_type.lower()
    registered = _registration(peft / "tuners" / method / "__init__.py", method)
    shared, own = _classes(peft / "config.py"), _classes(peft / "tuners" / method / "config.py")
    config = own[ast.unparse(registered["config_cls"])]
    if [ast.unparse(base) for base in config.bases] != [_BASES[-1]]:
        return None
    classes = (*(shared[name] for name in _BASES), config)
    annotations = {name: ast.unparse(annotation) for cls in classes for name, annotation in _fields(cls)}
    names = {**vars(typing), **_stand_ins(types), **_stand_ins(own)}
    fields = typing.get_type_hints(type(config.name, (), {"__annotations__": annotations}), names)
    # As register_peft_method does it.
    prefix = ast.literal_eval(registered["prefix"]) if "prefix" in registered else f"{method}_"
    return str(prefix), fields


def _home() -> Path:
    found = find_spec("peft")
    if found is None or found.origin is None:
        raise LookupError("PEFT's source cannot be found")
    return Path(found.origin).parent


def _classes(path: Path) -> _Classes:
    return {node.name: node for node in _statements(path) if isinstance(node, ast.ClassDef)}


def _statements(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body


def _members(cls: ast.ClassDef) -> frozenset[str]:
    """Return the values of an enumeration of strings."""
    return frozenset(ast.literal_eval(node.value) for node in cls.body if isinstance(node, ast.Assign))


def _registration(path: Path, method: str) -> dict[str, ast.expr]:
    """Return the keyword arguments with which the method is registered."""
    for node in _statements(path):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            given = {str(word.arg): word.value for word in node.value.keywords}
            if ast.unparse(node.value.func) == _REGISTER and ast.literal_eval(given["name"]) == method:
                return given
    raise LookupError(f"{path} does not register {method}")


def _fields(cls: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """Yield name and annotation of the fields that a dataclass's body declares."""
    if not _is_dataclass(cls):
        raise LookupError(f"{cls.name} is not a dataclass")
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.annotation


def _is_dataclass(cls: ast.ClassDef) -> bool:
    return any(ast.unparse(mark).partition("(")[0] == _DATACLASS for mark in cls.decorator_list)


def _stand_ins(classes: _Classes) -> dict[str, Any]:
    """Return an empty class for each enumeration and each dataclass, by name."""
    found: dict[str, Any] = {name: make_dataclass(name, ()) for name, cls in classes.items() if _is_dataclass(cls)}
    enums = (name for name, cls in classes.items() if any(ast.unparse(b).endswith(_ENUM) for b in cls.bases))
    return found | {name: enum.Enum(name, ()) for name in enums}
