"""The commands of the guide to serving, ``docs/serving.md``, as they are printed."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

GUIDE = Path(__file__).parents[2] / "docs" / "serving.md"
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


@dataclass(frozen=True)
class Command:
    """One command and the exit status that its comment names, 0 where it names none."""

    line: str
    status: int

    @classmethod
    def parse(cls, line: str) -> Command:
        command, _, comment = line.partition("#")
        said = re.search(r"exit status (\d)", comment)
        return cls(command.strip(), int(said[1]) if said else 0)

    @property
    def arguments(self) -> list[str]:
        """The arguments of ``graft``."""
        name, *arguments = shlex.split(self.line)
        assert name == "graft", self.line
        return arguments


def blocks(kind: str, section: str | None = None) -> list[str]:
    """Return the blocks of a language, of one section or of all.

    python and sh need no engine; bash is for machines with one.
    """
    parts = re.split(r"^## (.*)\n", GUIDE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = zip(["", *parts[1::2]], parts[::2], strict=True)
    text = "".join(body for name, body in named if section in (None, name))
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(kind: str, section: str | None = None) -> list[Command]:
    """Return the commands of such blocks, each on one line."""
    lines = "".join(blocks(kind, section)).replace("\\\n", " ").splitlines()
    return [Command.parse(line) for line in lines]


def run_without_engines(folder: Path) -> None:
    """Run the blocks that need no engine, in their order."""
    with contextlib.chdir(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks("python"):
            exec(compile(block, GUIDE.name, "exec"), {})
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        input=json.dumps([(command.arguments, command.status) for command in commands("sh")]),
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
