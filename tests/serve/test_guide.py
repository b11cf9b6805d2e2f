"""The guide's bash blocks, as they are printed: servers started, probed and stopped, and proofs.

Left out are SGLang and ``ollama create``, which ``.engines`` does not have, and the installation of an engine:
``make test-serve`` does that by the guide's command.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from tests.serve.guide import Command, commands, run_without_engines
from tests.serve.servers import ENGINES, PATIENCE, free_port, python_of, started

import graftkit as gk
from graftkit.engines.outcome import Outcome

pytestmark = pytest.mark.serve

PROOFS = [command for command in commands("bash", "Prove it before you train") if "prove" in command.line]


def target_of(proof: Command) -> str:
    return proof.arguments[proof.arguments.index("--target") + 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the blocks before and between leave behind, and the engines."""
    folder = tmp_path_factory.mktemp("guide")
    run_without_engines(folder)
    (folder / ".engines").symlink_to(ENGINES)
    return folder


@pytest.mark.parametrize(
    ("section", "engine"),
    [("llama.cpp", "llama.cpp"), ("MLX", "mlx"), ("vLLM", "vllm")],
    ids=["llama.cpp", "mlx", "vllm"],
)
def test_the_served_adapter_is_applied(folder: Path, section: str, engine: str) -> None:
    python_of(engine)
    *before, server, probe = commands("bash", section)
    for command in before:
        run(command, folder, engine)
    with serving(server, port_of(probe), folder, engine):
        found = json.loads(run(Command(f"{probe.line} --json", probe.status), folder))
    assert [finding["evidence"]["outcome"] for finding in found["findings"]] == ["applied"]


def test_what_ollama_is_given_is_the_adapted_model_in_llama_cpp(folder: Path) -> None:
    python_of("llama.cpp")
    *before, create = commands("bash", "Ollama")
    assert create.line.startswith("ollama create")
    for command in before:
        run(command, folder, "llama.cpp")
    model = (folder / "Modelfile").read_text().removeprefix("FROM ").strip()
    port = free_port()
    server = Command(f"python -m llama_cpp.server --model {model} --port {port}", 0)
    with serving(server, port, folder, "llama.cpp") as url:
        assert gk.probe(url, folder / "merged").outcome is Outcome.APPLIED


@pytest.mark.parametrize(
    "proof", PROOFS, ids=[f"{place}-{target_of(proof)}" for place, proof in enumerate(PROOFS)]
)
def test_proof(folder: Path, proof: Command) -> None:
    python_of(target_of(proof))
    found = json.loads(run(Command(f"{proof.line} --json", proof.status), folder))
    assert found["served"]["outcome"] == ("different" if proof.status else "applied")


def run(command: Command, folder: Path, engine: str | None = None) -> str:
    """Run a command in a shell, in an engine's environment or in graftkit's; return what it printed."""
    environment = os.environ | path_with(engine)
    if engine is not None:
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        ["bash", "-c", command.line],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == command.status, f"{command.line}\n{done.stdout}{done.stderr}"
    return done.stdout


def path_with(engine: str | None) -> Mapping[str, str]:
    """Return the variables with which a command's first word is an engine's, else graftkit's."""
    environments = [Path(sys.executable).parent]
    if engine is not None:
        environments.insert(0, ENGINES / engine / "bin")
    variables = {"PATH": os.pathsep.join([*map(str, environments), os.environ["PATH"]])}
    # Less than its share of a machine's memory, of which others may have taken theirs.
    return variables | {"VLLM_CPU_KVCACHE_SPACE": "1"}


def port_of(probe: Command) -> int:
    found = re.search(r"http://localhost:(\d+)", probe.line)
    assert found, probe.line
    return int(found[1])


@contextmanager
def serving(server: Command, port: int, folder: Path, engine: str) -> Iterator[str]:
    """Run a server for the block, at the port that is written in the guide; yield its address."""
    with FileLock(Path(tempfile.gettempdir()) / f"graftkit-guide-{port}.lock"):
        check_free(port)
        with started(["bash", "-c", f"exec {server.line}"], port, folder, **path_with(engine)) as running:
            yield running.url


def check_free(port: int) -> None:
    """Refuse a port on which something else would answer the probe."""
    with socket.socket() as there:
        if there.connect_ex(("127.0.0.1", port)) == 0:
            pytest.fail(f"the guide's port {port} is taken by another program")
