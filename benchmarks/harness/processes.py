"""A command as a new process, with what the kernel says it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contest import Figure, Figures

# The command line of this checkout, wherever its console script may be.
GRAFT = (sys.executable, "-c", "from graftkit.cli.main import main; main()")

# The kernel counts the memory of the process that starts a command into the command's peak. This one is small.
_STARTER = """
import json, os, sys, time
started = time.perf_counter()
child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
seconds = time.perf_counter() - started
took = {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}
with open(sys.argv[1], "w") as file:
    json.dump(took, file)
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""


class CommandError(Exception):
    """A command of a benchmark ended otherwise than it should; the text is the end of what it printed."""


@dataclass(frozen=True)
class Ran:
    """A command that has ended: ``SECONDS``, ``CPU``, ``PEAK`` of it and its children, and what it printed."""

    figures: Figures
    stdout: str


def cold(*command: str | Path, ends_with: int = 0, env: Mapping[str, str] | None = None) -> Ran:
    """Run a command as a new process, without a network.

    Args:
        command: the program and its arguments.
        ends_with: the exit status that is right.
        env: variables to add to the environment.

    Raises:
        CommandError: it ended with another status.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "took.json"
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _STARTER, file, *command],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if done.returncode != ends_with:
            said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}".strip()
            raise CommandError(f"exit status {done.returncode}:\n{said}")
        took = json.loads(file.read_text(encoding="utf-8"))
    figures = {figure: took[figure.key] for figure in (Figure.SECONDS, Figure.CPU, Figure.PEAK)}
    return Ran(figures, done.stdout)


def told(ran: Ran) -> dict[str, Any]:
    """Return the JSON object on the last line that a command printed."""
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found
