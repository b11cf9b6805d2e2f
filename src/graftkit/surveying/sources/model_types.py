"""The model types of the installed transformers, by name; those it lacks are recognised without importing it."""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from graftkit.text import suggest

# Where transformers lists its types: the first file holds most of them as data, the second adds some.
_TABLES = ("models/auto/auto_mappings.py", "models/auto/configuration_auto.py")


@dataclass(frozen=True)
class _Source:
    """What stands in the source of transformers' tables.

    Attributes:
        types: the first of each pair of names, and the keys.
        texts: every text, types among them however they are written.
    """

    types: frozenset[str]
    texts: frozenset[str]


def is_model_type(name: str) -> bool:
    """Check whether the installed transformers has a model type of this name.

    A name that stands nowhere in its tables is refused without importing it, which takes seconds.
    """
    if "transformers" not in sys.modules:
        source = _source()
        if source is not None and name not in source.texts:
            return False
    from transformers import CONFIG_MAPPING

    return name in CONFIG_MAPPING


def model_types() -> tuple[str, ...]:
    """Return every model type of the installed transformers, sorted. Imports it."""
    from transformers import CONFIG_MAPPING

    return tuple(sorted(CONFIG_MAPPING.keys()))


def similar_types(name: str) -> str | None:
    """Suggest model types whose names are like this one; imports transformers only where it has to."""
    source = _source() if "transformers" not in sys.modules else None
    known = sorted(source.types) if source is not None else model_types()
    return suggest(name.lower(), known, 3)


def transformers_version() -> str:
    """Return the version of the installed transformers without importing it."""
    return metadata.version("transformers")


@functools.cache
def _source() -> _Source | None:
    """Parse the tables, None where this transformers keeps them elsewhere."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return None
    files = [Path(spec.origin).parent / table for table in _TABLES]
    if not all(file.is_file() for file in files):
        return None
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    return _Source(
        types=frozenset(text for node in nodes for text in _keys(node)),
        texts=frozenset(text for node in nodes for text in _texts([node])),
    )


def _keys(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Tuple) and len(node.elts) == 2:
        yield from _texts(node.elts[:1])
    elif isinstance(node, ast.Dict):
        yield from _texts(key for key in node.keys if key is not None)


def _texts(nodes: Iterable[ast.AST]) -> Iterator[str]:
    return (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
