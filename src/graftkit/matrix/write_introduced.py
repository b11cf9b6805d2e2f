"""Make the table of `introduced.py` from wheels: ``python -m graftkit.matrix.write_introduced WHEEL…``.

Nothing of the wheels is imported or run. Releases that the table has already stay in it.
"""

from __future__ import annotations

import argparse
import ast
import re
import zipfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from packaging.utils import parse_wheel_filename
from packaging.version import Version

from graftkit.files import write_text
from graftkit.matrix.introduced import TABLE, read

_CONFIGURATIONS = re.compile(r"transformers/models/\w+/(configuration_\w+|auto_mappings)\.py")
_HEAD = """\
# Which release of transformers first knew a model type: written by python -m graftkit.matrix.write_introduced from
# the releases' wheels. The date is that on which the wheel was made. What the first one knew may be older than it.
"""


def types_of(wheel: Path) -> frozenset[str]:
    """Return the model types that a release knows, from its auto mappings and from its configuration classes.

    Older releases have the types of parts (towers) in no mapping: their classes declare them all the same.
    """
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if _CONFIGURATIONS.fullmatch(name)]
        return frozenset(found for name in names for found in _types_in(ast.parse(files.read(name)), name))


def _types_in(tree: ast.Module, name: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from _declared(node)
        elif "/auto/" in name and isinstance(node, ast.Tuple):
            yield from _mapped(node.elts)
        elif "/auto/" in name and isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                yield from _mapped([key, value])


def _declared(node: ast.ClassDef) -> Iterator[str]:
    """Yield what a class assigns to ``model_type``."""
    for line in node.body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == "model_type" for target in targets)
        value = getattr(line, "value", None)
        if named and isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value:
            yield value.value


def _mapped(pair: list[ast.expr] | list[ast.expr | None]) -> Iterator[str]:
    """Yield the key of a model type and the name of its configuration's class."""
    values = [item.value for item in pair if isinstance(item, ast.Constant) and isinstance(item.value, str)]
    if len(pair) == len(values) == 2 and values[1].endswith("Config"):
        yield values[0]


def _day(wheel: Path) -> date:
    with zipfile.ZipFile(wheel) as files:
        metadata = next(file for file in files.infolist() if file.filename.endswith(".dist-info/METADATA"))
    return date(*metadata.date_time[:3])


def table_of(wheels: list[Path], known: str | None) -> str:
    """Return the table's text: the releases of ``known``, an earlier table, and of the wheels."""
    days: dict[Version, date] = {}
    first: dict[str, Version] = {}
    if known is not None:
        earlier = read(known)
        days, first = dict(earlier.released), dict(earlier.release_of)
    for wheel in wheels:
        version = parse_wheel_filename(wheel.name)[1]
        days[version] = _day(wheel)
        for model_type in types_of(wheel):
            first[model_type] = min(first.get(model_type, version), version)
    sections = [_section(version, days[version], first) for version in sorted(days)]
    return "\n".join([_HEAD, *sections])


def _section(version: Version, day: date, first: dict[str, Version]) -> str:
    types = sorted(name for name, release in first.items() if release == version)
    listed = "".join(f'  "{name}",\n' for name in types)
    return f'["{version}"]\ndate = {day.isoformat()}\ntypes = [\n{listed}]\n'


def main() -> None:
    """Read the wheels that the command line names, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", nargs="+", type=Path)
    wheels = parser.parse_args().wheels
    write_text(TABLE, table_of(wheels, TABLE.read_text(encoding="utf-8") if TABLE.exists() else None))


if __name__ == "__main__":
    main()
