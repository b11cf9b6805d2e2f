"""A hub on 127.0.0.1, what is on it, and the processes that talk to it.

``huggingface_hub`` reads its environment variables when it is imported, so whatever tests them runs in a
process of its own. One process works through all cases of one environment; the tests then look at what it
printed and at what the hub was asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TOKEN = "hf_local_test_token"


def safetensors_bytes(tensors: dict[str, tuple[str, list[int], int]], *, padding: int = 0) -> bytes:
    """A whole safetensors file from name -> (dtype, shape, size in bytes); ``padding`` lengthens the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header).encode() + b" " * padding
    return struct.pack("<Q", len(raw)) + raw + b"\0" * position


@dataclass
class Repo:
    """A repository on the local hub.

    ``refusal`` is (status, X-Error-Code) for every request; ``sizes`` are sizes to claim in place of the
    real ones; a hub with ``whole`` set ignores Range headers, as some mirrors do.
    """

    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    refusal: tuple[int, str | None] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    whole: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files)).encode()).hexdigest()


@dataclass
class Request:
    repo: str
    method: str
    file: str
    range: str | None
    token: str | None
    sent: int = 0


@dataclass
class LocalHub:
    """A running hub: its address, its repositories, and every request it has had."""

    url: str
    repos: dict[str, Repo]
    requests: list[Request] = field(default_factory=list)

    def asked(self, repo: str) -> list[tuple[str, str]]:
        """(method, file) of every request for a repository, in order."""
        return [(request.method, request.file) for request in self.requests if request.repo == repo]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the requests are recorded."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path, _, query = self.path.partition("?")
        name, _, rest = unquote(path).strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        status, headers, body = self._resolve(name, revision, file)
        request = Request(
            name,
            self.command,
            file or query,
            self.headers.get("Range"),
            self.headers.get("Authorization"),
        )
        # Before the answer: who has the answer may look at the record.
        self.hub.requests.append(request)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        try:
            for start in range(0, len(body) if with_body else 0, 2**16):
                self.wfile.write(body[start : start + 2**16])
                request.sent += len(body[start : start + 2**16])
        except OSError:
            # The client had enough; what follows on this connection is nothing.
            self.close_connection = True

    def _resolve(self, name: str, revision: str, file: str) -> tuple[int, dict[str, str], bytes]:
        repo = self.hub.repos.get(name)
        if repo is None:
            return _refusal(404, "RepoNotFound")
        if repo.refusal is not None:
            return _refusal(*repo.refusal)
        if revision not in (*repo.revisions, repo.commit):
            return _refusal(404, "RevisionNotFound")
        common = {"X-Repo-Commit": repo.commit}
        if file not in repo.files:
            status, headers, body = _refusal(404, "EntryNotFound")
            return status, headers | common, body
        body = repo.files[file]
        common |= {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked is None or repo.whole:
            return 200, common | {"Content-Length": str(repo.sizes.get(file, len(body)))}, body
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = body[int(first) : int(last) + 1]
        span = f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}"
        return 206, common | {"Content-Range": span, "Content-Length": str(len(part))}, part


def _refusal(status: int, code: str | None) -> tuple[int, dict[str, str], bytes]:
    headers = {"Content-Length": "0"}
    if code == "Disabled":
        return status, headers | {"X-Error-Message": "Access to this resource is disabled."}, b""
    return status, headers | ({"X-Error-Code": code} if code else {}), b""


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}
REMOTE = {
    "model_type": "house",
    "architectures": ["HouseForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_house.HouseConfig",
        "AutoModel": "modeling_house.HouseModel",
        "AutoModelForCausalLM": "modeling_house.HouseForCausalLM",
    },
    "width": 6,
}
# Both files leave a mark when they run, so that a test can tell that they did not.
CONFIGURATION_CODE = """
import os, pathlib
from transformers import PretrainedConfig
pathlib.Path(os.environ["GRAFT_TEST_MARK"]).touch()

class HouseConfig(PretrainedConfig):
    model_type = "house"
    def __init__(self, width=4, **kwargs):
        self.width = width
        super().__init__(**kwargs)
"""
MODELING_CODE = """
import torch
from transformers import PreTrainedModel
from .configuration_house import HouseConfig

class HouseModel(PreTrainedModel):
    config_class = HouseConfig
    def __init__(self, config):
        super().__init__(config)
        self.proj = torch.nn.Linear(config.width, config.width)
        self.post_init()

class HouseForCausalLM(HouseModel):
    pass
"""
SHARD_1 = safetensors_bytes({"a": ("F32", [2, 3], 24), "b": ("BF16", [4], 8)})
SHARD_2 = safetensors_bytes({"c": ("F4", [2, 8], 8)})
# Larger than what the sockets in between can hold, so that reading it whole shows.
BIG = safetensors_bytes({"big": ("U8", [2**25], 2**25)})


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _index(weight_map: dict[str, str]) -> bytes:
    return _json({"metadata": {}, "weight_map": weight_map})


def remote_files() -> dict[str, bytes]:
    """A repository (or directory) whose configuration and model come as code."""
    return {
        "config.json": _json(REMOTE),
        "configuration_house.py": CONFIGURATION_CODE.encode(),
        "modeling_house.py": MODELING_CODE.encode(),
        "model.safetensors": BIG,
    }


def _repositories() -> dict[str, Repo]:
    llama = {"config.json": _json(LLAMA), "model.safetensors": BIG}
    index = "model.safetensors.index.json"
    return {
        "tiny/llama": Repo(llama, revisions=("main", "v2")),
        "tiny/llama-twice": Repo(dict(llama)),
        "tiny/llama-v2": Repo(dict(llama), revisions=("v2",)),
        "tiny-legacy": Repo(dict(llama)),
        "tiny/nested": Repo({"part/config.json": _json(LLAMA)}),
        "tiny/closed": Repo(remote_files()),
        "tiny/open": Repo(remote_files()),
        "tiny/gated": Repo(llama, refusal=(403, "GatedRepo")),
        "tiny/forbidden": Repo(llama, refusal=(403, None)),
        "tiny/private": Repo(llama, refusal=(401, "RepoNotFound")),
        "tiny/bad-token": Repo(llama, refusal=(401, None)),
        "tiny/disabled": Repo(llama, refusal=(403, "Disabled")),
        "tiny/down": Repo(llama, refusal=(503, None)),
        "tiny/odd": Repo(llama, refusal=(418, None)),
        "tiny/adapter": Repo({"adapter_config.json": _json({"base_model_name_or_path": "tiny/llama"})}),
        "tiny/other": Repo({"README.md": b"# no model"}),
        "tiny/truncated": Repo({"config.json": _json(LLAMA)[:20]}),
        "tiny/huge": Repo({"config.json": b"{}"}, sizes={"config.json": 10**11}),
        "cached/weights": Repo({"model.safetensors": SHARD_1}),
        "weights/single": Repo({"model.safetensors": BIG}),
        "weights/long": Repo(
            {"model.safetensors": safetensors_bytes({"a": ("F32", [2**20], 2**22)}, padding=200_000)}
        ),
        "weights/sharded": Repo(
            {
                index: _index({"a": "x-1.safetensors", "b": "x-1.safetensors", "c": "x-2.safetensors"}),
                "x-1.safetensors": SHARD_1,
                "x-2.safetensors": SHARD_2,
            }
        ),
        "weights/outside": Repo({index: _index({"a": "../../other/repo/x.safetensors"})}),
        "weights/lost-shard": Repo({index: _index({"a": "x-1.safetensors"})}),
        "weights/absurd": Repo({"model.safetensors": struct.pack("<Q", 2**60) + b"{}"}),
        "weights/none": Repo({"config.json": _json(LLAMA)}),
        "weights/whole": Repo({"model.safetensors": BIG}, whole=True),
    }


@pytest.fixture(scope="session")
def local_hub() -> Iterator[LocalHub]:
    """A hub that runs for the whole session."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.hub = hub = LocalHub(f"http://127.0.0.1:{server.server_address[1]}", _repositories())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


_PROGRAM = """
import json, sys, time
from graftkit.errors import SourceError

def load(source, **options):
    from graftkit.surveying.sources.load_config import load_config
    got = load_config(source, **options)
    return {"origin": got.origin, "name": got.name, "revision": got.revision, "code": got.code,
            "class": type(got.config).__name__, "config": got.config.to_dict(),
            "base": got.config.name_or_path}

def model(source):
    from graftkit.surveying.sources.load_config import load_config
    from graftkit.surveying.sources.model_class import remote_model_class
    got = load_config(source, trust_remote_code=True)
    built = remote_model_class(got)._from_config(got.config)
    return {"class": type(built).__name__, "parameters": built.num_parameters()}

def load_known(source, known, **options):
    from graftkit.surveying.sources import load_config as module
    module.geometry = lambda hub_id: known if hub_id == source else None
    return load(source, **options)

def headers(source, **options):
    from graftkit.surveying.checkpoint.headers import read_headers
    got = read_headers(source, **options)
    return {"tensors": {name: list(tensor) for name, tensor in got.items()}, "bytes": got.total_bytes,
            "revision": got.revision}

def fetch(source, filename):
    from huggingface_hub import hf_hub_download
    return {"path": hf_hub_download(source, filename)}

def marked():
    import os
    return {"yes": os.path.exists(os.environ["GRAFT_TEST_MARK"])}

def config_file(source):
    from graftkit.surveying.sources.hub_config import fetch_config
    return {"commit": fetch_config(source).commit}

def nested_file(source, filename):
    from graftkit.surveying.sources.hub import fetch
    return {"commit": fetch(source, filename, max_bytes=2**20).commit}

answers = {}
for name, (action, arguments, options) in json.load(sys.stdin).items():
    start = time.monotonic()
    try:
        answer = globals()[action](*arguments, **options)
    except SourceError as error:
        answer = error.to_dict()
    answers[name] = answer | {"seconds": time.monotonic() - start}
json.dump(answers, sys.stdout)
"""

Cases = dict[str, tuple[Any, ...]]
Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HF_HOME that the processes share, one after the other."""
    return tmp_path_factory.mktemp("hf-home")


@pytest.fixture(scope="session")
def in_process(hub_home: Path) -> Callable[..., Answers]:
    """Run cases, id -> (action, arguments, options), in a process with the given environment variables."""

    def run(cases: Cases, **variables: str) -> Answers:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        environment = inherited | {
            "HF_HOME": str(hub_home),
            "NO_PROXY": "127.0.0.1",
            "GRAFT_TEST_MARK": str(hub_home / "code-was-run"),
            **variables,
        }
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", _PROGRAM],
            input=json.dumps(cases),
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answers: Answers = json.loads(done.stdout)
        return answers

    return run


_TINY = ("missing", "gated", "forbidden", "private", "bad-token", "disabled", "down", "odd", "adapter", "other")
_TINY += ("truncated", "huge")
_WEIGHTS = ("single", "long", "sharded", "outside", "lost-shard", "absurd", "none", "whole", "missing")
_HUB_CASES: Cases = {
    "first": ("load", ["tiny/llama"], {}),
    "fetched-before": ("load", ["tiny/llama-twice"], {}),
    "again": ("load", ["tiny/llama-twice"], {}),
    "revision": ("load", ["tiny/llama-v2"], {"revision": "v2"}),
    "no-revision": ("load", ["tiny/llama-v2"], {"revision": "v3"}),
    "legacy": ("load", ["tiny-legacy"], {}),
    "legacy-fetch": ("fetch", ["tiny-legacy", "config.json"], {}),
    "nested": ("nested_file", ["tiny/nested", "part/config.json"], {}),
    "closed": ("load", ["tiny/closed"], {}),
    **{name: ("load", [f"tiny/{name}"], {}) for name in _TINY},
    "spelling": ("load", ["no such id/really"], {}),
    **{f"weights-{name}": ("headers", [f"weights/{name}"], {}) for name in _WEIGHTS},
    "weights-fetch": ("fetch", ["cached/weights", "model.safetensors"], {}),
    # From here on code may run.
    "code-was-run": ("marked", [], {}),
    "open": ("load", ["tiny/open"], {"trust_remote_code": True}),
    "open-model": ("model", ["tiny/open"], {}),
    "code-was-run-then": ("marked", [], {}),
}


@pytest.fixture(scope="session")
def online(local_hub: LocalHub, in_process: Callable[..., Answers]) -> Answers:
    """Every case against the running hub."""
    return in_process(_HUB_CASES, HF_ENDPOINT=local_hub.url, HF_TOKEN=TOKEN)


_KNOWN = LLAMA | {"hidden_size": 96}
_AWAY_CASES: Cases = {
    "cached": ("load", ["tiny/llama"], {}),
    "cached-revision": ("load", ["tiny/llama-v2"], {"revision": "v2"}),
    "other-revision": ("load", ["tiny/llama"], {"revision": "v2"}),
    "legacy": ("load", ["tiny-legacy"], {}),
    "nested": ("nested_file", ["tiny/nested", "part/config.json"], {}),
    "closed": ("load", ["tiny/closed"], {}),
    "open": ("load", ["tiny/open"], {"trust_remote_code": True}),
    "unknown": ("load", ["tiny/never-fetched"], {}),
    "adapter": ("load", ["tiny/adapter"], {}),
    "cached-and-known": ("load_known", ["tiny/llama", _KNOWN], {}),
    "known": ("load_known", ["tiny/known", _KNOWN], {}),
    "known-revision": ("load_known", ["tiny/known", _KNOWN], {"revision": "v2"}),
    "weights": ("headers", ["cached/weights"], {}),
    "weights-index-only": ("headers", ["weights/sharded"], {}),
    "weights-unknown": ("headers", ["weights/single"], {}),
}


@pytest.fixture(scope="session")
def offline(online: Answers, local_hub: LocalHub, in_process: Callable[..., Answers]) -> Answers:
    """HF_HUB_OFFLINE=1, with the cache that the online process left and the hub still running."""
    before = len(local_hub.requests)
    answers = in_process(_AWAY_CASES, HF_ENDPOINT=local_hub.url, HF_HUB_OFFLINE="1")
    answers["requests"] = {"count": len(local_hub.requests) - before}
    return answers


@pytest.fixture(scope="session")
def unreachable(online: Answers, in_process: Callable[..., Answers]) -> Answers:
    """Not offline, but nothing listens at the endpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        return in_process(_AWAY_CASES, HF_ENDPOINT=endpoint)


@pytest.fixture(scope="session")
def silent(in_process: Callable[..., Answers]) -> Answers:
    """The endpoint takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        cases: Cases = {"unknown": ("config_file", ["tiny/never-fetched"], {})}
        return in_process(cases, HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="1")
