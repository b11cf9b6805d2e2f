"""Write what the newest releases need: ``python -m graftkit.matrix.newest PYPROJECT CONSTRAINTS OUT``.

graftkit's own requirements keep to the releases that are tested. Here they go without their bounds, and torch,
whose builds differ by machine, with the tested version. Only the standard library is used: nothing else is
installed yet.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

from graftkit.files import write_text

# What a matrix needs beside graftkit itself.
_EXTRAS = ("train", "quant")


def requirements(pyproject: str, constraints: str) -> tuple[str, ...]:
    """Return the names of what ``pyproject`` requires, without bounds, and torch as ``constraints`` pins it."""
    project = tomllib.loads(pyproject)["project"]
    extras = [line for extra in _EXTRAS for line in project["optional-dependencies"][extra]]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in (*project["dependencies"], *extras)]
    torch = [line for line in constraints.splitlines() if line.startswith("torch==")]
    return (*torch, *(name for name in names if name != "torch"))


def main() -> None:
    """Write the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("pyproject", "constraints", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    lines = requirements(given.pyproject.read_text("utf-8"), given.constraints.read_text("utf-8"))
    write_text(given.out, "".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main()
