"""The files an engine is given: an adapter as PEFT saves it, or in the engine's own form."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.adapters.record import Dialect

if TYPE_CHECKING:
    from peft import PeftModel


def save_stock(model: PeftModel, folder: Path) -> Path:
    """Write the adapter of a live model as stock PEFT does, and return its folder."""
    with warnings.catch_warnings():
        # The base of a twin has no name that PEFT could look its vocabulary up by.
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(str(folder))
    return folder


def as_peft(adapter: Path, base: Path, out: Path) -> tuple[Path, str]:
    """Return a folder with the adapter as PEFT loads it, and whose form the given one has.

    Args:
        adapter: a folder in any form; ``graftkit.json`` in it, or else its files, tell which.
        base: the folder of its base.
        out: where it is written if it has to be converted back.

    Raises:
        AdapterError, ConvertError: it cannot be read, or cannot be converted back.
    """
    from graftkit.converting.convert import convert
    from graftkit.converting.dialects import dialect_of

    form = str(dialect_of(adapter).name)
    if form == Dialect.PEFT:
        return adapter, form
    convert(adapter, out, to=Dialect.PEFT, base=base)
    return out, form


def in_form_of(engine: str, adapter: Path, base: Path, out: Path, *, as_is: bool) -> Path:
    """Return the adapter's folder in the form of an engine.

    Args:
        adapter: a stock PEFT adapter.
        base: the folder of its base.
        out: where a converted adapter is written.
        as_is: return the adapter as it is.

    Raises:
        ConvertError: it has no such form.
    """
    if as_is:
        return adapter
    from graftkit.converting.convert import convert

    convert(adapter, out, to=engine, base=base)
    return out
