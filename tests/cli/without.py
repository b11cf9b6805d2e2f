"""Folders for PYTHONPATH with which a process misses a package, or finds one that does not load."""

from __future__ import annotations

import os
from pathlib import Path

# Python's own finder, as installed or not: nothing of the packages is replaced.
_HIDING = """\
import sys
from importlib.machinery import PathFinder

HIDDEN = {hidden!r}


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        found = super().find_distributions(*args, **kwargs)
        return (each for each in found if each.metadata["Name"].replace("-", "_") not in HIDDEN)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def hiding(folder: Path, *packages: str) -> dict[str, str]:
    """Return the variables of a process in which these packages are not installed."""
    (folder / "sitecustomize.py").write_text(_HIDING.format(hidden=packages))
    return _first_on_the_path(folder)


def broken(folder: Path, package: str, error: str) -> dict[str, str]:
    """Return the variables of a process in which importing the package raises this error."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(f"raise {error}('libcudart.so.12: cannot open shared object')\n")
    return _first_on_the_path(folder)


def _first_on_the_path(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
