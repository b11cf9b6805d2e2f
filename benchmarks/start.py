"""What a command costs before it works: its help, and a path that is not there.

The peers are the smallest app of typer's documentation, one function with one argument, and Python alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.harness.contest import Contest, Figure, Figures, Row, Setting, in_turns
from benchmarks.harness.processes import GRAFT, cold

TYPER, PYTHON = "smallest typer app", "python -c pass"

_SMALLEST = """
import typer

def main(name: str):
    print(f"Hello {name}")

typer.run(main)
"""
# No file, and no name that a hub could have.
_NOWHERE = "no/such/folder"


def contests(_setting: Setting) -> Iterator[Contest]:
    """Yield the help, and a command that is refused."""
    yield _contest("graft --help", 0, "--help")
    yield _contest("graft check NOWHERE", 2, "check", _NOWHERE, "--base", _NOWHERE)


def _contest(what: str, status: int, *command: str) -> Contest:
    sides = {
        "graftkit": partial(_run, status, *GRAFT, *command),
        TYPER: partial(_run, 0, sys.executable, "-c", _SMALLEST, "--help"),
        PYTHON: partial(_run, 0, sys.executable, "-c", "pass"),
    }
    rows = (Row(what, TYPER, Figure.CPU), Row(what, TYPER, Figure.PEAK), Row(what, PYTHON, Figure.CPU))
    return Contest("a new process", rows, in_turns(sides))


def _run(status: int, *command: str) -> Figures:
    return cold(*command, ends_with=status).figures
