"""The file of a matrix: one cell a line, as JSON. New lines go to its end, and the last one on a cell counts."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from graftkit.errors import GraftError, reraise_as
from graftkit.files import as_output_error, write_bytes, write_text
from graftkit.matrix.cell import Cell, Check

_COMPRESSED = ".gz"
_ORDER = {check: at for at, check in enumerate(Check)}


class Store:
    """The cells of one file, which is read when it is opened; every ``add`` is on the disk when it returns.

    A last line without its end is what an interrupted run left half written: not a cell, and the next ``add``
    removes it. Any other line that cannot be read is an error. A file whose name ends in ``.gz`` is compressed: it
    can be read, and written by ``pack``.
    """

    def __init__(self, path: Path | str) -> None:
        """Read the file; one that does not exist has no cells.

        Raises:
            GraftError: ``matrix-store``: it cannot be read, or a line is broken; the error names the line.
        """
        self.path = Path(path)
        self._families: dict[str, dict[tuple[str, Check], Cell]] = {}
        self._whole = 0
        for cell in self._read():
            self._keep(cell)

    def _keep(self, cell: Cell) -> None:
        self._families.setdefault(cell.model_type, {})[cell.method, cell.check] = cell

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells, sorted by family, method and check."""
        return tuple(sorted((cell for of in self._families.values() for cell in of.values()), key=_sort_key))

    def of(self, model_type: str) -> tuple[Cell, ...]:
        """Return the cells of one family, unsorted."""
        return tuple(self._families.get(model_type, {}).values())

    def add(self, cells: Iterable[Cell]) -> None:
        """Add cells at the end of the file; one that is there already is replaced by the later line.

        Raises:
            OutputError: ``output-not-writable``.
            GraftError: ``matrix-store``: the store is compressed.
        """
        new = tuple(cells)
        self._refuse_compressed()
        lines = "".join(map(_line, new)).encode()
        with as_output_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if file.tell() > self._whole:
                    file.truncate(self._whole)
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        self._whole += len(lines)
        for cell in new:
            self._keep(cell)

    def compact(self) -> None:
        """Rewrite the file with one line a cell, sorted, so that two runs can be compared line by line.

        Raises:
            OutputError: ``output-not-writable``. The file is then unchanged.
            GraftError: ``matrix-store``: the store is compressed.
        """
        self._refuse_compressed()
        text = "".join(map(_line, self.cells))
        write_text(self.path, text)
        self._whole = len(text.encode())

    def pack(self, path: Path) -> None:
        """Write the cells to another file, sorted, and compressed where its name ends in ``.gz``.

        The same cells give the same bytes.

        Raises:
            OutputError: ``output-not-writable``. The file is then unchanged.
        """
        written = "".join(map(_line, self.cells)).encode()
        write_bytes(path, gzip.compress(written, mtime=0) if path.suffix == _COMPRESSED else written)

    def _refuse_compressed(self) -> None:
        if self.path.suffix == _COMPRESSED:
            raise GraftError(
                "nothing can be added to a compressed matrix",
                where=str(self.path),
                help=f"gunzip --keep {self.path}, and give the file that it makes",
                code="matrix-store",
            )

    def _read(self) -> Iterator[Cell]:
        if not self.path.exists():
            return
        with reraise_as(_unreadable, self.path):
            written = self.path.read_bytes()
            if self.path.suffix == _COMPRESSED:
                written = gzip.decompress(written)
        self._whole = written.rfind(b"\n") + 1
        for number, line in enumerate(written[: self._whole].splitlines(), start=1):
            if line.strip():
                yield _cell(line, self.path, number)


def _line(cell: Cell) -> str:
    return json.dumps(cell.to_dict(), allow_nan=False) + "\n"


def _cell(line: bytes, path: Path, number: int) -> Cell:
    try:
        return Cell.from_dict(json.loads(line))
    except (KeyError, TypeError, ValueError) as error:
        missing = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise GraftError(
            "a line of the matrix cannot be read",
            where=f"{path}:{number}",
            why=missing,
            help="remove that line: what it said is then tried again",
            code="matrix-store",
        ) from error


def _unreadable(path: str, why: str) -> GraftError:
    return GraftError("the matrix cannot be read", where=path, why=why, code="matrix-store")


def _sort_key(cell: Cell) -> tuple[str, str, int]:
    return cell.model_type, cell.method, _ORDER[cell.check]
