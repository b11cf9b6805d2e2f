"""Run ``graft`` in a subprocess and read its JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def graft(*args: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command offline and without a terminal."""
    return subprocess.run(
        [sys.executable, "-c", "from graftkit.cli.main import main; main()", *map(str, args)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables},
        timeout=300,
        check=False,
    )


def fields_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return what a command with ``--json`` wrote."""
    assert "Traceback" not in done.stderr
    fields: dict[str, Any] = json.loads(done.stdout)
    assert fields["schema_version"] == 1
    return fields


def refused(*args: str | Path, cwd: Path | None = None) -> dict[str, Any]:
    """Run a command that cannot be done, and return its error."""
    done = graft(*args, "--json", cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    error: dict[str, Any] = fields_of(done)["error"]
    return error


@dataclass(frozen=True)
class Done:
    """What came of one command.

    Attributes:
        changed: the files of the folder that it wrote, changed or removed.
        heavy: which of torch, transformers and PEFT the process had imported by its end.
    """

    status: int
    stdout: str
    stderr: str
    changed: tuple[str, ...]
    heavy: tuple[str, ...]


# Runs each command of a list in one process, which imports PyTorch once.
_EACH = """
import contextlib, io, json, sys
from pathlib import Path
from graftkit.cli.main import main

def files():
    return {str(f): (s.st_size, s.st_mtime_ns) for f in Path.cwd().rglob("*") for s in [f.stat()] if f.is_file()}

def run(words):
    before, out, err = files(), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.argv[1:] = words
            main()
        except SystemExit as stop:
            status = stop.code
    changed = sorted({name for name, _ in before.items() ^ files().items()})
    heavy = sorted({"torch", "transformers", "peft"} & set(sys.modules))
    return [status, out.getvalue(), err.getvalue(), changed, heavy]

results = [run(words) for words in json.load(sys.stdin)]
json.dump(results, sys.stdout)
"""


def graft_each(commands: Sequence[Sequence[str]], cwd: Path) -> list[Done]:
    """Run commands one after the other in one process, offline and without a terminal, in a folder of theirs."""
    done = subprocess.run(
        [sys.executable, "-c", _EACH],
        input=json.dumps([list(words) for words in commands]),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return [
        Done(status, out, err, tuple(changed), tuple(heavy))
        for status, out, err, changed, heavy in json.loads(done.stdout)
    ]
