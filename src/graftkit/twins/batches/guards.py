"""Which variables decided that a forward raised an error itself."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import FrameType


def guards_of(error: BaseException) -> tuple[str, ...]:
    """Return the names in the conditions under which an error was raised, the innermost condition first.

    Read from the source of the function that raised it: ``if ids is None: raise ...`` has ``ids``. Nothing is
    returned where the source cannot be read, or where the error comes from an operation, not from a ``raise``.
    """
    traceback = error.__traceback__
    if traceback is None:
        return ()
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    function = _function(traceback.tb_frame)
    if function is None:
        return ()
    line = traceback.tb_lineno - traceback.tb_frame.f_code.co_firstlineno + 1
    return tuple(dict.fromkeys(name for test in _tests(function, line) for name in _names(test)))


def _function(frame: FrameType) -> ast.Module | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(frame.f_code)))
    except (OSError, TypeError, SyntaxError):
        return None


def _tests(function: ast.AST, line: int) -> list[ast.expr]:
    """Return the conditions around the ``raise`` on a line, the innermost first; none where there is no raise."""
    for node in ast.iter_child_nodes(function):
        if not _spans(node, line):
            continue
        if isinstance(node, ast.Raise):
            return [function.test] if isinstance(function, ast.If) else []
        inner = _tests(node, line)
        if inner or _raises(node, line):
            return [*inner, function.test] if isinstance(function, ast.If) else inner
    return []


def _spans(node: ast.AST, line: int) -> bool:
    first, last = getattr(node, "lineno", None), getattr(node, "end_lineno", None)
    return first is None or last is None or first <= line <= last


def _raises(node: ast.AST, line: int) -> bool:
    return any(isinstance(one, ast.Raise) and _spans(one, line) for one in ast.walk(node))


def _names(test: ast.expr) -> Iterator[str]:
    return (node.id for node in ast.walk(test) if isinstance(node, ast.Name))
