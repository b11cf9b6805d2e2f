"""Make a release's table from its source: ``python -m graftkit.engines.releases.write ENGINE VERSION SOURCE``.

``SOURCE`` is a wheel, a source distribution, or a folder of either, unpacked. Nothing of it is imported or run.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

from packaging.version import Version

from graftkit.engines.releases import sources
from graftkit.engines.releases.table import ReleaseTable, table_name
from graftkit.errors import EngineError
from graftkit.files import write_text

# Only text is read: the rest of a wheel is large.
_READ = (".py", ".cpp", ".h")


def table_of(engine: str, version: Version, source: Path) -> ReleaseTable:
    """Return the table that the source of a release gives.

    Raises:
        EngineError: ``engine-unknown`` (no source of this engine can be read), or ``engine-source`` (there is none
            in what was given).
    """
    names = [name for _, name, _ in pkgutil.iter_modules(sources.__path__)]
    if engine not in names:
        raise EngineError(
            f"no source of {engine!r:.80} can be read",
            why=f"the known engines are {', '.join(names)}",
            help="name one of them",
            code="engine-unknown",
        )
    reader = importlib.import_module(f"{sources.__name__}.{engine}")
    if source.is_dir():
        return ReleaseTable(engine, version, reader.read(_root(source, reader.PACKAGE)))
    with tempfile.TemporaryDirectory() as folder:
        _unpack(source, Path(folder))
        return ReleaseTable(engine, version, reader.read(_root(Path(folder), reader.PACKAGE)))


def _root(folder: Path, package: str) -> Path:
    """Return the folder that holds the package: the nearest one that does."""
    found = sorted((p.parent for p in folder.rglob(package) if p.is_dir()), key=lambda p: len(p.parts))
    if not found:
        raise EngineError(
            f"there is no folder {package} in it",
            where=str(folder),
            help="give the wheel or the source distribution of that engine",
            code="engine-source",
        )
    return found[0]


def _unpack(archive: Path, folder: Path) -> None:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder, [name for name in opened.namelist() if name.endswith(_READ)])
        return
    with tarfile.open(archive) as opened:
        wanted = [member for member in opened if member.isfile() and member.name.endswith(_READ)]
        opened.extractall(folder, wanted, filter="data")


def main() -> None:
    """Write the table of a release beside the others."""
    parser = argparse.ArgumentParser(description="Make the table of an engine's release from its source.")
    parser.add_argument("engine")
    parser.add_argument("version", type=Version)
    parser.add_argument("source", type=Path)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "data", help="the folder of the tables")
    given = parser.parse_args()
    table = table_of(given.engine, given.version, given.source)
    write_text(given.to / table_name(given.engine, given.version), table.to_json())


if __name__ == "__main__":
    main()
