"""Safetensors headers: read from a directory and from a hub, and refused where they are not whole."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from graftkit.errors import SourceError
from graftkit.surveying.checkpoint.headers import TensorHeader, read_headers

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.surveying.conftest import Answers, LocalHub

INDEX = "model.safetensors.index.json"
FIRST_RANGE = "bytes=0-99999"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


def _file(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _tensor(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def _weight_map(file: Any) -> str:
    return json.dumps({"weight_map": {"a": file}})


def _indexed(folder: Path, index: str) -> None:
    """Write a weight file, and beside it a folder with another one and this index."""
    (folder / "inner").mkdir()
    for file in (folder / "x.safetensors", folder / "inner" / "x.safetensors"):
        file.write_bytes(_file({"a": _tensor(0, 1)}, b"1"))
    (folder / "inner" / INDEX).write_text(index)


def _refusal(folder: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        read_headers(folder)
    return caught.value


def test_a_single_file(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.zeros(2, 3, dtype=torch.bfloat16),
        "b": torch.zeros(()),
        "empty": torch.zeros(0, 4, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    headers = read_headers(tmp_path)
    assert headers == {
        "a.weight": TensorHeader("BF16", (2, 3), "model.safetensors"),
        "b": TensorHeader("F32", (), "model.safetensors"),
        "empty": TensorHeader("I8", (0, 4), "model.safetensors"),
    }
    assert (headers.total_bytes, headers.revision) == (16, None)
    assert read_headers(tmp_path / "model.safetensors") == headers == read_headers(str(tmp_path))
    assert repr(headers) == "Headers(total_bytes=16, revision=None)"


def test_shards_by_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4), "twice": torch.zeros(1)}, tmp_path / "x-1.safetensors")
    save_file({"c": torch.zeros(2, 2), "twice": torch.zeros(3)}, tmp_path / "x-2.safetensors")
    weight_map = {"a": "x-1.safetensors", "c": "x-2.safetensors", "twice": "x-2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    headers = read_headers(tmp_path)
    assert {name: tensor.file for name, tensor in headers.items()} == weight_map
    assert headers["twice"].shape == (3,)
    assert headers.total_bytes == 44


def test_the_data_is_not_read(tmp_path: Path) -> None:
    # A sparse file, larger than any memory this runs in.
    size = 2**38
    (tmp_path / "model.safetensors").write_bytes(_file({"a": _tensor(0, size)}))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) + size)
    assert read_headers(tmp_path).total_bytes == size


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        pytest.param(b"", ": 0 bytes", id="empty"),
        pytest.param(b"\x01\x00", ": 2 bytes", id="no length"),
        pytest.param(struct.pack("<Q", 100) + b"{}", "108", id="header cut"),
        pytest.param(struct.pack("<Q", 2**63) + b"{}", str(2**63), id="absurd length"),
        pytest.param(LFS_POINTER, str(int.from_bytes(LFS_POINTER[:8], "little")), id="lfs pointer"),
        pytest.param(_file(b"not json"), "Expecting value", id="not json"),
        pytest.param(_file(b"\xff\xfe\xfd"), "codec can't decode", id="not utf-8"),
        pytest.param(_file(b"[" * 100_000), "recursion", id="nested"),
        pytest.param(_file(b'{"a": ' + b"9" * 5000 + b"}"), "5000 digits", id="huge number"),
        pytest.param(_file([1, 2]), "list", id="a list"),
        pytest.param(_file({"a": 3}), "data_offsets", id="entry is a number"),
        pytest.param(_file({"a": {"dtype": "F32", "shape": [1]}}), "data_offsets", id="no offsets"),
        pytest.param(_file({"a": _tensor(0, 1, "U8", [True])}, b"1"), "data_offsets", id="a true dimension"),
        pytest.param(_file({"a": _tensor(0, 1, "U8", [-1])}, b"1"), "data_offsets", id="a negative dimension"),
        pytest.param(_file({"a": _tensor(0, 1, "U8", [2**63])}, b"1"), "data_offsets", id="a huge dimension"),
        pytest.param(_file({"a": _tensor(0, 1, "U8", [1] * 65)}, b"1"), "data_offsets", id="many dimensions"),
        pytest.param(_file({"a": _tensor(4, 0, "U8", [4])}, b"1234"), "-4 bytes", id="ends first"),
        pytest.param(
            _file({"a": _tensor(0, 4, "?"), "b": _tensor(4, 2, "?", [2])}, b"12"),
            "'b' takes bytes 4 to 2",
            id="ends first, dtype unknown",
        ),
        pytest.param(_file({"a": _tensor(0, 4, "F32", [2])}, b"1234"), "'a' has 4 bytes", id="wrong size"),
        pytest.param(_file({"a": _tensor(0, 9)}, b"1234"), "4 bytes of data", id="data cut"),
        pytest.param(_file({"a": _tensor(0, 4)}, b"12345"), "5 bytes of data", id="too much data"),
        pytest.param(
            _file({"a": _tensor(0, 4), "b": _tensor(2, 6)}, b"123456"), "'b' takes bytes 2 to 6", id="overlap"
        ),
        pytest.param(
            _file({"a": _tensor(0, 2), "b": _tensor(4, 6)}, b"123456"), "'b' takes bytes 4 to 6", id="a hole"
        ),
    ],
)
def test_malformed_files_are_refused(content: bytes, shown: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    error = _refusal(tmp_path)
    assert (error.code, error.where) == ("weights-header", str(tmp_path / "model.safetensors"))
    assert shown in str(error.why), "refused for another reason"


def test_an_unknown_dtype_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(_file({"a": _tensor(0, 3, "F5_NEW", [4])}, b"123"))
    assert read_headers(tmp_path)["a"] == TensorHeader("F5_NEW", (4,), "model.safetensors")


@pytest.mark.parametrize(
    ("index", "shown"),
    [
        pytest.param("{", "Expecting property name", id="truncated"),
        pytest.param("[]", "list", id="a list"),
        pytest.param("{}", "weight_map", id="no map"),
        pytest.param(_weight_map(3), "3", id="a number"),
        *(
            pytest.param(_weight_map(file), repr(file), id=name)
            for name, file in {
                "parent": "../x.safetensors",
                "hidden parent": "d/../../x.safetensors",
                "parent on Windows": "..\\x.safetensors",
                "absolute": "/etc/x.safetensors",
                "drive": "C:/x.safetensors",
                "share": "\\\\host\\x.safetensors",
                "no weights": "passwords.txt",
            }.items()
        ),
    ],
)
def test_an_invalid_index_is_refused(index: str, shown: str, tmp_path: Path) -> None:
    _indexed(tmp_path, index)
    error = _refusal(tmp_path / "inner")
    assert (error.code, error.where) == ("weights-header", str(tmp_path / "inner" / INDEX))
    assert shown in str(error.why), "refused for another reason"


@pytest.mark.parametrize(
    ("index", "where", "shown"),
    [
        pytest.param('{"weight_map": {"b": "x.safetensors"}}', "x.safetensors", "'b'", id="no such tensor"),
        pytest.param(_weight_map("y.safetensors"), "y.safetensors", os.strerror(errno.ENOENT), id="no such shard"),
    ],
)
def test_an_index_that_names_what_is_not_there_is_refused(
    index: str, where: str, shown: str, tmp_path: Path
) -> None:
    _indexed(tmp_path, index)
    error = _refusal(tmp_path / "inner")
    assert (error.code, Path(str(error.where)).name) == ("weights-header", where)
    assert shown in str(error.why), "refused for another reason"


@pytest.mark.parametrize(
    ("source", "code"),
    [("", "not-found"), ("no/such/path/here", "not-found"), ("x" * 5000, "not-found"), ("a\0b", "not-found")],
)
def test_what_is_not_there(source: str, code: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_headers(source)
    assert caught.value.code == code


def test_a_directory_without_weights(tmp_path: Path) -> None:
    assert _refusal(tmp_path).code == "weights-not-found"


@pytest.fixture
def asked_for(local_hub: LocalHub) -> Callable[[str], list[tuple[str, str | None]]]:
    """(file, range) of the GET requests for a repository; an index is fetched whole."""

    def gets(repo: str) -> list[tuple[str, str | None]]:
        requests = [r for r in local_hub.requests if r.repo == repo and r.method == "GET"]
        return sorted((r.file, r.range) for r in requests if r.file != INDEX)

    return gets


def test_hub_single_file(online: Answers, local_hub: LocalHub, asked_for: Callable[[str], Any]) -> None:
    answer = online["weights-single"]
    assert answer["tensors"] == {"big": ["U8", [2**25], "model.safetensors"]}
    assert answer["bytes"] == 2**25
    assert answer["revision"] == local_hub.repos["weights/single"].commit
    assert asked_for("weights/single") == [("model.safetensors", FIRST_RANGE)]
    assert sum(r.sent for r in local_hub.requests if r.repo == "weights/single") == 100_000


def test_hub_shards(online: Answers, asked_for: Callable[[str], Any]) -> None:
    answer = online["weights-sharded"]
    assert answer["tensors"] == {
        "a": ["F32", [2, 3], "x-1.safetensors"],
        "b": ["BF16", [4], "x-1.safetensors"],
        "c": ["F4", [2, 8], "x-2.safetensors"],
    }
    assert asked_for("weights/sharded") == [
        ("x-1.safetensors", FIRST_RANGE),
        ("x-2.safetensors", FIRST_RANGE),
    ]


def test_hub_header_longer_than_the_first_range(online: Answers, local_hub: LocalHub) -> None:
    assert online["weights-long"]["bytes"] == 2**22
    gets = [r for r in local_hub.requests if r.repo == "weights/long" and r.method == "GET"]
    assert gets[0].range == FIRST_RANGE
    assert len(gets) == 2
    assert sum(r.sent for r in gets) < 310_000


def test_hub_that_ignores_ranges_is_not_read_to_the_end(online: Answers, local_hub: LocalHub) -> None:
    assert online["weights-whole"]["bytes"] == 2**25
    sent = [r.sent for r in local_hub.requests if r.repo == "weights/whole"]
    assert 0 < max(sent) < 2**24


@pytest.mark.parametrize(
    ("case", "code", "shown"),
    [
        ("outside", "weights-header", "other/repo"),
        ("absurd", "weights-header", str(2**60)),
        ("lost-shard", "weights-header", "x-1.safetensors"),
        ("none", "weights-not-found", INDEX),
        ("missing", "hub-not-found", ""),
    ],
)
def test_hub_refusals(case: str, code: str, shown: str, online: Answers) -> None:
    answer = online[f"weights-{case}"]
    assert answer["code"] == code
    assert shown in f"{answer['where']} {answer['why']}"
    assert answer["where"].startswith(f"weights/{case}")


def test_an_index_cannot_send_requests_elsewhere(online: Answers, local_hub: LocalHub) -> None:
    assert {file for _, file in local_hub.asked("weights/outside")} == {"model.safetensors", INDEX}
    assert not local_hub.asked("other/repo")


def test_no_weight_file_was_read_whole(online: Answers, local_hub: LocalHub) -> None:
    gets = [r for r in local_hub.requests if r.method == "GET" and r.file.endswith(".safetensors")]
    by_graftkit = [r for r in gets if r.repo != "cached/weights"]
    assert by_graftkit
    assert all(r.range is not None for r in by_graftkit)
    assert {r.repo.split("/")[0] for r in by_graftkit} == {"weights"}


@pytest.mark.parametrize("away", ["offline", "unreachable"])
def test_without_a_hub_the_cached_weights_are_read(away: str, request: pytest.FixtureRequest) -> None:
    answers: Answers = request.getfixturevalue(away)
    assert set(answers["weights"]["tensors"]) == {"a", "b"}
    assert answers["weights"]["bytes"] == 32
    assert answers["weights-index-only"]["code"] == "weights-not-local"
    assert answers["weights-unknown"]["code"] == "weights-not-local"
