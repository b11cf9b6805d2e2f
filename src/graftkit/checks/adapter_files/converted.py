"""An adapter in an engine's form, judged in it: its names and its fit are those of the same adapter for PEFT.

The engine then takes what a conversion settles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from graftkit.adapters.file import WEIGHTS_NAME, AdapterFile, read_adapter
from graftkit.adapters.record import Dialect, read_record
from graftkit.converting.base import ConvertBase
from graftkit.converting.dialects import DialectFormat, all_dialects, dialect_named
from graftkit.converting.join import read_whole
from graftkit.engines import Engine, Fact, Feature, Model, Remedy, Stance
from graftkit.errors import AdapterError


@dataclass(frozen=True)
class Converted:
    """An adapter that is not in stock PEFT's form.

    Attributes:
        dialect: the form, as ``graft convert --to`` calls it.
        updates: how many matrices of the base it changes.
    """

    dialect: str
    updates: int


@dataclass(frozen=True)
class OwnForm(Engine):
    """An engine that is given an adapter in its own form: what a conversion settles, it takes."""

    def fact(self, feature: Feature, model: Model | None = None, name: str | None = None) -> Fact:
        found = super().fact(feature, model, name)
        if found.remedy is not Remedy.CONVERT:
            return found
        return replace(found, stance=Stance.TAKES, says="reads it in its own form", help=None, remedy=None)


def in_own_form(engine: Engine) -> Engine:
    """Return the engine as it reads an adapter that was converted for it."""
    return OwnForm(**{field.name: getattr(engine, field.name) for field in fields(engine)})


def engines_form(folder: Path) -> DialectFormat | None:
    """Return the engine's form that an adapter's folder is in; None for PEFT's, and where it is not known.

    A record decides. Without one, only files that no PEFT adapter has show a form.
    """
    try:
        record = read_record(folder)
    except AdapterError:
        return None  # for the rules on records to report
    if record is not None and record.dialect is not None:
        return None if record.dialect is Dialect.PEFT else dialect_named(record.dialect)
    if (folder / WEIGHTS_NAME).is_file():
        return None
    return next((d for d in all_dialects() if d.engine is not None and d.recognises(folder)), None)


@contextmanager
def in_pefts_form(
    folder: Path, dialect: DialectFormat, base: ConvertBase
) -> Iterator[tuple[AdapterFile, Converted]]:
    """Write the adapter in PEFT's form to a temporary folder, and yield it; tensors are read while the block runs.

    Raises:
        AdapterError, MergeError: its files cannot be read, or hold what the engine would not use.
    """
    deltas = read_whole(dialect, folder, base)
    with TemporaryDirectory(prefix="graft-") as place:
        dialect_named(Dialect.PEFT).write(deltas, base, Path(place))
        yield read_adapter(place), Converted(dialect.name, len(deltas.factors))
