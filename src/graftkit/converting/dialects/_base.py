"""What a dialect's file says. To add one, add ``dialects/<name>.py`` with a ``DIALECT``; nothing else names it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from graftkit.adapters.file import CONFIG_NAME, read_object
from graftkit.converting.base import ConvertBase
from graftkit.converting.delta import Deltas, Slice


@dataclass(frozen=True)
class DialectFormat:
    """One form of an adapter on disk.

    Attributes:
        name: as ``--to`` takes it, and as ``graftkit.json`` names it.
        engine: the engine that reads it, None where there is none to ask.
        weights_name: the file with the tensors; written last, and finished first where a run is resumed.
        rounding: the largest relative error of one of its updates, in units of the sum of the absolute products;
            0 where factors only move.
        writes: whether ``--to`` takes it; others are only read.
    """

    name: ClassVar[str] = ""
    engine: ClassVar[str | None] = None
    weights_name: ClassVar[str] = "adapter_model.safetensors"
    rounding: ClassVar[float] = 0.0
    writes: ClassVar[bool] = True

    def recognises(self, folder: Path) -> bool:
        """Check whether a folder without a mark is certainly of this dialect, by its files' names and headers.

        Where the files are called as PEFT's only the mark tells.
        """
        del folder
        return False

    def base_of(self, folder: Path) -> str | None:
        """Return the base that an adapter's files name, None where they name none.

        Raises:
            AdapterError: ``adapter-config``: the configuration is not a JSON object.
        """
        path = folder / CONFIG_NAME
        name = read_object(path).get("base_model_name_or_path") if path.is_file() else None
        return name if isinstance(name, str) and name else None

    def refusals(self, deltas: Deltas, base: ConvertBase) -> dict[str, str]:
        """Return what this dialect cannot hold: parameter or field -> the reason.

        :func:`graftkit.converting.convert.convert` asks before it writes, and says "merge instead".
        """
        raise NotImplementedError

    def write(self, deltas: Deltas, base: ConvertBase, folder: Path) -> None:
        """Write an adapter's files, one module in memory at a time.

        Args:
            deltas: without anything that :meth:`refusals` names.
            folder: exists, and is empty.
        """
        raise NotImplementedError

    def read(self, folder: Path, base: ConvertBase) -> Deltas:
        """Read an adapter's files as the engine would, without trusting them.

        Tensors that the engine would not use, or that fit no place in the base, are an error.

        Raises:
            AdapterError: a file is missing, malformed, or a tensor fits nothing.
        """
        raise NotImplementedError

    def read_back(self, folder: Path, base: ConvertBase) -> Deltas:
        """Read what :meth:`write` has written: only in the form that the engine reads.

        Raises:
            AdapterError: as :meth:`read`.
            MergeError: the engine would not load it on this base.
        """
        return self.read(folder, base)

    def places(self, at: Slice, base: ConvertBase) -> tuple[Slice, ...]:
        """Return where an update has to arrive in the engine: at its slice, and at the engine's copies of it."""
        del base
        return (at,)
