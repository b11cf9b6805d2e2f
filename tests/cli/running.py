"""Run ``graft`` in a subprocess and read its JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
