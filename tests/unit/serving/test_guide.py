"""The guide's commands run in its order, as they are printed, as far as they need no engine."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).parents[3] / "docs" / "serving.md"
# Python and sh are run here; bash is for machines with an engine.
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
# All in one process: importing torch takes longer than what a command does.
_RUN = """
import json, sys
from graftkit.cli.main import main

for arguments, expected in json.load(sys.stdin):
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == expected, (arguments, stop.code)
"""


def test_every_block_runs(tmp_path: Path) -> None:
    python = [block for kind, block in BLOCKS if kind == "python"]
    commands = [_parsed(line) for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    assert python
    assert {arguments[0] for arguments, _ in commands} == {"check", "convert", "merge"}
    with contextlib.chdir(tmp_path):
        for block in python:
            exec(compile(block, GUIDE.name, "exec"), {})
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        input=json.dumps(commands),
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _parsed(line: str) -> tuple[list[str], int]:
    """Return a command's arguments and its exit status, which its comment says where it is not 0."""
    command, _, comment = line.partition("#")
    name, *arguments = shlex.split(command)
    assert name == "graft", line
    said = re.search(r"exit status (\d)", comment)
    return arguments, int(said[1]) if said else 0
