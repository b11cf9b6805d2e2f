"""The forms in which adapters are stored: one file each, found by listing the folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from graftkit.converting.dialects._base import DialectFormat

__all__ = ["DialectFormat", "all_dialects"]


@cache
def all_dialects() -> tuple[DialectFormat, ...]:
    """Return every dialect, by the name that ``--to`` takes."""
    names = [name for _, name, _ in pkgutil.iter_modules(__path__) if not name.startswith("_")]
    found = [importlib.import_module(f"{__name__}.{name}").DIALECT for name in names]
    return tuple(sorted(found, key=lambda dialect: dialect.name))
