"""``graft`` and ``python`` in forks of one process that has imported what takes longest to import.

A page or an example runs dozens of commands, and each would spend most of its time on imports. The two programs on
the PATH of a block are small clients: they hand their arguments, folder, environment and streams to this process.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_PRELOADED = ("torch", "transformers", "peft", "datasets", "trl", "graftkit.cli.main")
_LONGEST = 2**20
_PATIENCE = 5.0  # seconds between two looks at whether the tests are still there

_CLIENT = """#!{python} -IS
import json, os, socket, sys
request = json.dumps([{program!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    sys.exit(int(server.recv(16) or b"70"))
"""


@dataclass(frozen=True)
class Programs:
    """The running server.

    Attributes:
        folder: what goes first into the PATH: ``graft`` and ``python``.
        hub: the cache of the hub that they see; links to models go there.
    """

    folder: Path
    hub: Path

    def run(self, argv: Sequence[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the PATH in a folder; its two streams come back as one."""
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            argv,
            cwd=cwd,
            env={**os.environ, **environment(self.hub), "PATH": path, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )


def environment(hub: Path) -> dict[str, str]:
    """Return the variables that keep a command offline and within the folder of the hub's cache."""
    return {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(hub),
        "HF_DATASETS_CACHE": str(hub.parent / "datasets"),
        "HF_ASSETS_CACHE": str(hub.parent / "assets"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "110",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


@contextmanager
def programs(folder: Path, *also: str) -> Iterator[Programs]:
    """Run the server for as long as the block lasts.

    Args:
        folder: an empty one, with a short path.
        also: further modules that it imports.
    """
    address, hub, clients = folder / "socket", folder / "hub", folder / "bin"
    for made in (hub, clients):
        made.mkdir()
    # A path in /tmp: the address of a socket is at most 107 bytes long.
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen(8)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.docs.server", str(listening.fileno()), *also],
            cwd=ROOT,
            env={**os.environ, **environment(hub)},
            pass_fds=[listening.fileno()],
        )
    for program in _PROGRAMS:
        client = clients / program
        client.write_text(_CLIENT.format(python=sys.executable, program=program, address=str(address)))
        client.chmod(0o755)
    try:
        yield Programs(clients, hub)
    finally:
        process.terminate()
        process.wait()


def _serve(listening: socket.socket, also: Sequence[str]) -> None:
    for name in (*_PRELOADED, *also):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # else a fork that collects its garbage copies all of this memory
    tests = os.getppid()
    listening.settimeout(_PATIENCE)
    while True:
        try:
            client, _ = listening.accept()
        except TimeoutError:
            if os.getppid() != tests:
                return  # the tests were killed
            continue
        client.setblocking(True)
        if os.fork() == 0:
            listening.close()
            _answer(client)
        client.close()
        while any(_finished()):
            pass


def _finished() -> Iterator[int]:
    """Yield the next child that has ended, if there is one."""
    try:
        yield os.waitpid(-1, os.WNOHANG)[0]
    except ChildProcessError:
        return


def _answer(client: socket.socket) -> None:
    """Run one request in a fork, and answer with its exit status; does not return."""
    head, streams, *_ = socket.recv_fds(client, 8, 3)
    size, request = int.from_bytes(head, "big"), b""
    while len(request) < size:
        request += client.recv(min(size - len(request), _LONGEST))
    child = os.fork()
    if child == 0:
        client.close()
        for own, stream in enumerate(streams):
            os.dup2(stream, own)
            os.close(stream)
        # New objects: the old ones remember whether the server's own streams were files.
        sys.stdout, sys.stderr = (os.fdopen(own, "w", encoding="utf-8", closefd=False) for own in (1, 2))
        _run(*json.loads(request))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    client.sendall(str(status if status >= 0 else 128 - status).encode())
    os._exit(0)


def _run(program: str, arguments: list[str], folder: str, variables: Mapping[str, str]) -> None:
    """Run a program to its end; does not return."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    status: Any = 1
    try:
        _PROGRAMS[program](arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _graft(arguments: list[str]) -> None:
    from graftkit.cli.main import main

    sys.argv = ["graft", *arguments]
    sys.modules["__main__"].__package__ = ""  # click would call the program by this module's name
    main(arguments)


def _python(arguments: list[str]) -> None:
    if arguments[:1] == ["-m"]:
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent.resolve()))
    runpy.run_path(arguments[0], run_name="__main__")


def _pip(arguments: list[str]) -> None:
    """Refuse what ``pip install`` could not install from this project: another name, or an extra that it lacks."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    command, *wanted = arguments
    assert command == "install", arguments
    assert wanted
    for requirement in map(Requirement, wanted):
        assert requirement.name == project["name"], requirement
        assert requirement.extras <= project["optional-dependencies"].keys(), requirement


def _page(arguments: list[str]) -> None:
    """Run a page's steps, a JSON file of [language, text, file for the output], in one process."""
    names: dict[str, Any] = {"__name__": "__main__"}
    sys.path.insert(0, "")
    for language, text, output in json.loads(Path(arguments[0]).read_text(encoding="utf-8")):
        with _streams_to(output):
            if language == "python":
                exec(compile(text, output, "exec"), names)
            else:
                status = subprocess.run(["bash", "-c", text], check=False).returncode
                if status:
                    raise SystemExit(status)


@contextmanager
def _streams_to(file: str) -> Iterator[None]:
    """Write what this process and its children print to a file."""
    kept = [os.dup(stream) for stream in (1, 2)]
    with Path(file).open("ab") as written:
        for stream in (1, 2):
            os.dup2(written.fileno(), stream)
    try:
        yield
    except Exception:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, own in zip(kept, (1, 2), strict=True):
            os.dup2(stream, own)
            os.close(stream)


_PROGRAMS = {"graft": _graft, "python": _python, "pip": _pip, "page": _page}

if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
