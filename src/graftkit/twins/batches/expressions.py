"""Expressions of a recipe: arithmetic over a configuration's fields, and calls of functions that make tensors."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def evaluate(expression: str, lookup: Callable[[str], Any]) -> Any:
    """Return the value of an expression.

    Python's syntax: constants, lists, ``+ - * // % **``, attributes (``vision_config.patch_size``), items
    (``image_size[0]``) and calls with positional arguments.

    Args:
        expression: for example ``"normal(B, 3, vision_config.image_size, vision_config.image_size)"``.
        lookup: the value of a name.

    Raises:
        ValueError: it is none of these.
        LookupError, AttributeError: a name, an attribute or an item does not exist.
    """
    return _value(_parsed(expression), lookup)


@cache
def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"not an expression: {expression!r}") from error


def _value(node: ast.expr, lookup: Callable[[str], Any]) -> Any:
    match node:
        case ast.Constant(value):
            return value
        case ast.Name(name):
            return lookup(name)
        case ast.Attribute(inner, name) if not name.startswith("_"):
            return getattr(_value(inner, lookup), name)
        case ast.Subscript(inner, index):
            return _value(inner, lookup)[_value(index, lookup)]
        case ast.BinOp(left, kind, right) if type(kind) in _OPERATORS:
            return _OPERATORS[type(kind)](_value(left, lookup), _value(right, lookup))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand, lookup)
        case ast.List(elements):
            return [_value(element, lookup) for element in elements]
        case ast.Call(ast.Name(name), arguments, []):
            return lookup(name)(*(_value(argument, lookup) for argument in arguments))
    raise ValueError(f"not part of an expression: {ast.unparse(node)}")


def call_arguments(expression: str) -> tuple[str, list[str]]:
    """Return the function that an expression calls, and its arguments: ``f(a, 2 * b)`` -> ``f``, ``[a, 2 * b]``.

    An expression that is not a call has the name "" and no arguments.
    """
    match _parsed(expression):
        case ast.Call(ast.Name(name), arguments):
            return name, [ast.unparse(argument) for argument in arguments]
    return "", []
