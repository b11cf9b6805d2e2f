"""Servers of the engines in ``.engines``, started and stopped for a test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.unit.serving.signed import Signed

import graftkit as gk
from graftkit.engines.outcome import Served

ENGINES = Path(__file__).parents[2] / ".engines"
# Seconds for a server to load its model on a busy machine.
PATIENCE = 400


def python_of(engine: str) -> Path:
    python = ENGINES / engine / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"{engine} is not in {ENGINES}: make engines")
    return python


@dataclass(frozen=True)
class Running:
    url: str

    def probe(self, signed: Signed, model: str | None = None, base: str | None = None) -> Served:
        return gk.probe(self.url, signed.adapter, model=model, base=base, timeout=PATIENCE)


@contextmanager
def started(command: list[str | Path], port: int, folder: Path, **environment: str) -> Iterator[Running]:
    """Run a server for the block, from when it answers."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **environment}
    env.pop("PYTHONPATH", None)
    url, log = f"http://127.0.0.1:{port}", folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for(url, process, log)
        yield Running(url)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
