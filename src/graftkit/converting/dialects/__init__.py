"""The forms in which adapters are stored: one file each, found by listing the folder."""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache
from pathlib import Path

from graftkit.adapters.file import RECORD_NAME
from graftkit.adapters.record import Dialect, read_record
from graftkit.converting.dialects._base import DialectFormat
from graftkit.converting.errors import ConvertError
from graftkit.errors import AdapterError
from graftkit.files import why_no_folder
from graftkit.text import suggest

__all__ = ["DialectFormat", "all_dialects", "dialect_named", "dialect_of"]


@cache
def all_dialects() -> tuple[DialectFormat, ...]:
    """Return every dialect, by name."""
    names = [name for _, name, _ in pkgutil.iter_modules(__path__) if not name.startswith("_")]
    found = [importlib.import_module(f"{__name__}.{name}").DIALECT for name in names]
    return tuple(sorted(found, key=lambda dialect: dialect.name))


def dialect_named(text: str) -> DialectFormat:
    """Return the dialect that ``--to`` means.

    Raises:
        ConvertError: ``convert-unknown``: there is none of that name, or it can only be read.
    """
    written = [dialect for dialect in all_dialects() if dialect.writes]
    found = next((dialect for dialect in written if _plain(dialect.name) == _plain(text)), None)
    if found is not None:
        return found
    names = [dialect.name for dialect in written]
    raise ConvertError(
        f"nothing is converted to {text!r:.80}",
        where="--to",
        why=f"the known forms are {', '.join(names)}",
        help=suggest(_plain(text), names) or f"name one of them, as --to {names[-1]}",
        code="convert-unknown",
    )


def dialect_of(folder: Path) -> DialectFormat:
    """Return the dialect of an adapter's folder: the one its record names, else the one its files show.

    Raises:
        AdapterError: ``adapter-not-found``; ``adapter-record``: the record cannot be read, or names a dialect that
            has no reader here; ``adapter-dialect``: no dialect recognises the files.
    """
    if not folder.is_dir():
        raise AdapterError(
            "no such adapter folder",
            where=str(folder),
            why=why_no_folder(folder),
            help="name the folder that holds the adapter's files",
            code="adapter-not-found",
        )
    record = read_record(folder)
    marked = record.dialect if record is not None else None
    if marked is not None and marked is not Dialect.PEFT:
        return _marked(folder, marked)
    # Stock PEFT's form comes last: other tools call their files as PEFT does.
    ordered = sorted(all_dialects(), key=lambda dialect: dialect.name == Dialect.PEFT)
    found = next((dialect for dialect in ordered if dialect.recognises(folder)), None)
    if found is None:
        raise AdapterError(
            "the folder holds no adapter of a known form",
            where=str(folder),
            why=f"it is in none of the forms {', '.join(dialect.name for dialect in all_dialects())}",
            help="name the folder that contains adapter_config.json, adapters.safetensors or a GGUF file",
            code="adapter-dialect",
        )
    return found


def _marked(folder: Path, marked: Dialect) -> DialectFormat:
    found = next((dialect for dialect in all_dialects() if dialect.name == marked), None)
    if found is None:
        raise AdapterError(
            f"the adapter is in a form that cannot be read here: {marked}",
            where=str(folder / RECORD_NAME),
            help="convert the original adapter again",
            code="adapter-record",
        )
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "", name).lower()
