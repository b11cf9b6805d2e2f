"""Run ``graft`` in another process and read its JSON."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.docs.server import programs

COLD = (sys.executable, "-c", "from graftkit.cli.main import main; main()")


def graft(*args: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command offline and without a terminal, in a new process."""
    return _run(COLD, args, cwd, variables)


def forked(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a fork of a process that has imported PyTorch; like `graft` where variables differ.

    Not for what a command forgets to import, nor for what libraries say while they are imported.
    """
    server = _server()
    return _run((server.program,) if server.variables == _variables() else COLD, args, cwd, {})


def _run(
    program: Sequence[str], args: Sequence[str | Path], cwd: Path | None, variables: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*program, *map(str, args)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables},
        timeout=300,
        check=False,
    )


@dataclass(frozen=True)
class _Server:
    """A process that has imported what commands import, and forks for each of them.

    Attributes:
        program: hands its arguments, folder and streams to it.
        variables: those that libraries read while they are imported, as they were when it was started.
    """

    program: str
    variables: dict[str, str]


@cache
def _server() -> _Server:
    stack = ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="graftkit-cli-"))
    running = stack.enter_context(programs(Path(folder)))
    return _Server(str(running.folder / "graft"), _variables())


def _variables() -> dict[str, str]:
    """Return the variables that decide what libraries are while they are imported: folders, caches, the hub."""
    names = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TORCH_", "XDG_", "HOME", "PYTHON", "CUDA_")
    return {name: value for name, value in os.environ.items() if name.startswith(names)}


def fields_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return what a command with ``--json`` wrote."""
    assert "Traceback" not in done.stderr
    fields: dict[str, Any] = json.loads(done.stdout)
    assert fields["schema_version"] == 1
    return fields


def refused(*args: str | Path, cwd: Path | None = None) -> dict[str, Any]:
    """Run a command that cannot be done, and return its error."""
    done = forked(*args, "--json", cwd=cwd)
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
