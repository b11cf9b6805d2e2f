"""An adapter folder is read without trusting it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graftkit.adapters.file import read_adapter
from graftkit.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = "base_model.model.q_proj.lora_A.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    save_file({NAME: torch.arange(8.0).reshape(2, 4)}, tmp_path / WEIGHTS, {"format": "pt", "by": "me"})
    return tmp_path


def refused(folder: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder)
    assert caught.value.help
    return caught.value


def test_a_whole_adapter(folder: Path) -> None:
    file = read_adapter(folder)
    assert (file.peft_type, file.config["r"], dict(file.header.metadata)) == (
        "LORA",
        2,
        {"format": "pt", "by": "me"},
    )
    assert file.tensors[NAME].shape == (2, 4)
    assert torch.equal(file.tensor(NAME), torch.arange(8.0).reshape(2, 4))
    with pytest.raises(KeyError):
        file.tensor("other")


def test_no_folder(tmp_path: Path) -> None:
    assert refused(tmp_path / "none").code == "adapter-not-found"


def test_an_adapter_of_another_name_lies_one_folder_deeper(folder: Path, tmp_path: Path) -> None:
    deeper = tmp_path / "mine"
    deeper.mkdir()
    (folder / CONFIG).rename(deeper / CONFIG)
    error = refused(folder)
    assert (error.code, error.where) == ("adapter-config", str(folder / CONFIG))
    assert str(deeper) in str(error.help)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"peft_type": ', id="truncated"),
        pytest.param(b"\xff\xfe\x00", id="not text"),
        pytest.param(b"[1]", id="a list"),
        pytest.param(b"{}", id="no type"),
        pytest.param(b'{"peft_type": 3}', id="a number for a type"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b" " * 10_000_001, id="too large"),
    ],
)
def test_a_broken_configuration(folder: Path, content: bytes) -> None:
    (folder / CONFIG).write_bytes(content)
    assert refused(folder).code == "adapter-config"


def test_no_configuration(folder: Path) -> None:
    (folder / CONFIG).unlink()
    error = refused(folder)
    assert (error.code, error.where) == ("adapter-config", str(folder / CONFIG))


@pytest.mark.parametrize("keep", [0, 4, 40, 100], ids=lambda n: f"{n} bytes")
def test_truncated_weights(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(folder).code == "adapter-weights"


def test_a_pickle_under_the_name_of_a_safetensors_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"a": 1}) * 20)
    assert refused(folder).code == "adapter-weights"


def test_weights_without_tensors(folder: Path) -> None:
    save_file({}, folder / WEIGHTS)
    assert refused(folder).code == "adapter-weights"


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was loaded')",)


def test_a_pickle_is_refused_unread(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert refused(folder).code == "adapter-pickle"


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert refused(folder).code == "adapter-weights"
