"""Adapter folders made to do harm: a finding or a clear error, and never a crash, a hang, or code that runs."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.unit.checks.live_adapters import with_effect
from tests.unit.checks.observed import edit, finding
from torch import nn

import graftkit as gk
from graftkit.checks.check import check
from graftkit.errors import AdapterError, GraftError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OK, ERROR, WARNING, INFO = gk.Severity.OK, gk.Severity.ERROR, gk.Severity.WARNING, gk.Severity.INFO


@pytest.fixture(scope="module")
def base() -> gk.ModelMap:
    return gk.survey("llama")


@pytest.fixture
def good(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> Path:
    model = get_peft_model(twin_of("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with_effect(model).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def raw(folder: Path, header: bytes, data: bytes = b"") -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.fixture(autouse=True)
def crashes_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that crashes would otherwise become a finding."""
    monkeypatch.setenv("GRAFT_DEBUG", "1")


# ---- the configuration ----

_WRONG: tuple[Any, ...] = (
    "x",
    7,
    2.5,
    True,
    [1],
    [[]],
    ["a", None],
    {"a": 1},
    {"q_proj": []},
    [{}],
    -1,
    float("nan"),
)
_FIELDS = [field.name for field in dataclasses.fields(LoraConfig) if field.name != "peft_type"]


@pytest.mark.parametrize("name", _FIELDS)
def test_a_field_of_every_wrong_type(good: Path, base: gk.ModelMap, name: str) -> None:
    stock = json.loads((good / CONFIG).read_text())
    for value in _WRONG:
        (good / CONFIG).write_text(json.dumps({**stock, name: value}))
        for target in ("vllm", "sglang", "llama_cpp"):
            check(good, base, target=target, data=False)


@pytest.mark.rule_fails("GK504")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("use_dora", "false", id="a word for a truth value"),
        pytest.param("lora_alpha", "16", id="a word for a number"),
        pytest.param("r", True, id="a truth value for a number"),
        pytest.param("lora_dropout", [0.1], id="a list for a number"),
        pytest.param("trainable_token_indices", 5, id="a number for a list"),
    ],
)
def test_gk504_a_field_of_the_wrong_type(good: Path, name: str, value: Any) -> None:
    edit(good, **{name: value})
    found = finding(check(good), "GK504")
    assert found.severity is ERROR
    assert found.evidence["problems"] == 1
    assert name in found.message


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[" * 9_000_000, id="nesting"),
        pytest.param(
            b'{"peft_type": "LORA", "r": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", id="nesting in a field"
        ),
        pytest.param(b'{"peft_type": "LORA", "r": ' + b"9" * 100_000 + b"}", id="a number of 100 000 digits"),
        pytest.param(b"\xff\xfe\x00", id="no text"),
        pytest.param(b"{" + b" " * 10_000_001 + b"}", id="too large"),
        pytest.param(b'{"peft_type": ["LORA"]}', id="a method that is a list"),
        pytest.param(b"", id="empty"),
    ],
)
def test_a_configuration_that_cannot_be_read(good: Path, content: bytes) -> None:
    (good / CONFIG).write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        check(good)
    assert caught.value.code == "adapter-config"
    assert len(str(caught.value)) < 2_000


@pytest.mark.rule_fails("GK504")
def test_gk504_a_method_that_nobody_knows(good: Path, base: gk.ModelMap) -> None:
    edit(good, peft_type="LORA\x1b[31m\ud800")
    report = check(good, base, target="vllm")
    assert finding(report, "GK504").severity is ERROR
    assert "\x1b" not in str(report)
    str(report).encode()


@pytest.mark.rule_fails("GK505")
def test_gk505_fields_that_are_there_twice(good: Path) -> None:
    text = (good / CONFIG).read_text()
    (good / CONFIG).write_text(text.replace("{", '{"r": 999, ', 1))
    found = finding(check(good), "GK505")
    assert (found.severity, found.where) == (ERROR, "r")


def test_gk504_fields_that_peft_drops_with_a_warning(good: Path, twin_of: Callable[[str], nn.Module]) -> None:
    edit(good, of_another_tool={"deep": [1, {"er": None}]})
    with pytest.warns(UserWarning, match="of_another_tool"):
        LoraConfig.from_pretrained(good)
    found = finding(check(good), "GK504")
    assert (found.severity, found.where) == (INFO, "of_another_tool")


# ---- links and files that are none ----


@pytest.mark.rule_fails("GK505")
def test_gk505_links_out_of_the_folder(good: Path, tmp_path: Path) -> None:
    (good / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    (good / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    found = finding(check(good), "GK505")
    assert (found.severity, found.where) == (WARNING, WEIGHTS)


@pytest.mark.rule_passes("GK505")
def test_gk505_passes_on_links_in_the_hub_cache(good: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0000", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        (good / name).rename(blobs / name)
        (snapshot / name).symlink_to(os.path.relpath(blobs / name, snapshot))
    assert finding(check(snapshot), "GK505").severity is OK


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("what", ["a pipe", "a device", "a folder", "a link to itself", "a dead link"])
def test_what_is_no_file_is_refused_at_once(good: Path, name: str, what: str) -> None:
    (good / name).unlink()
    {
        "a pipe": lambda path: os.mkfifo(path),
        "a device": lambda path: path.symlink_to("/dev/zero"),
        "a folder": lambda path: path.mkdir(),
        "a link to itself": lambda path: path.symlink_to(path),
        "a dead link": lambda path: path.symlink_to("none"),
    }[what](good / name)
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(finding(check(good), "GK505").severity)
        except GraftError as error:
            found.append(error.code)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert found == (["adapter-config"] if name == CONFIG else [ERROR])


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("the-bomb-went-off",))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", WEIGHTS])
def test_a_pickle_is_never_run(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: gk.ModelMap, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (good / WEIGHTS).unlink()
    (good / name).write_bytes(pickle.dumps(_Bomb()))
    assert finding(check(good, base, target="vllm"), "GK505").severity is ERROR
    assert not (tmp_path / "the-bomb-went-off").exists()


# ---- the weights ----


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.rule_fails("GK505")
@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"[" * 99_000_000, id="99 MB of nesting"),
        pytest.param(b'{"a": ' * 1_000_000, id="objects without end"),
        pytest.param(b"null", id="null"),
        pytest.param(json.dumps({"a": entry(shape=[2**62, 2**62])}).encode(), id="more than any machine holds"),
        pytest.param(json.dumps({"a": entry(shape=[1] * 10_000)}).encode(), id="ten thousand dimensions"),
        pytest.param(json.dumps({"a": entry(shape=[-1])}).encode(), id="less than nothing"),
        pytest.param(json.dumps({"a": entry(shape=[True])}).encode(), id="a size that is true"),
        pytest.param(json.dumps({"a": entry(shape=[float("nan")])}).encode(), id="a size that is no number"),
        pytest.param(json.dumps({"a": entry(dtype=["F32"])}).encode(), id="a list of types"),
        pytest.param(json.dumps({"a": entry(), "b": entry()}).encode(), id="tensors on top of each other"),
        pytest.param(json.dumps({"a": entry(offsets=[4, 8])}).encode(), id="a hole"),
        pytest.param(json.dumps({"a": entry(offsets=[4, 0])}).encode(), id="backwards"),
    ],
)
def test_gk505_headers(good: Path, base: gk.ModelMap, header: bytes) -> None:
    raw(good, header, b"\0" * 4)
    found = finding(check(good, base), "GK505")
    assert found.severity is ERROR
    assert len(found.message) < 2_000


@pytest.mark.rule_fails("GK505")
@pytest.mark.parametrize("length", [0, 7, 2**40, 2**63, 2**64 - 1])
def test_gk505_a_length_that_is_not_there(good: Path, length: int) -> None:
    (good / WEIGHTS).write_bytes(struct.pack("<Q", length)[: length if length == 7 else 8] + b"{}")
    report = check(good)
    assert finding(report, "GK505").severity is ERROR


@pytest.mark.rule_fails("GK503")
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        pytest.param(torch.int64, "I64", id="whole numbers"),
        pytest.param(torch.bool, "BOOL", id="truth values"),
        pytest.param(torch.complex64, "C64", id="complex numbers"),
    ],
)
def test_gk503_a_type_that_no_adapter_has(good: Path, dtype: torch.dtype, name: str) -> None:
    save_file({n: t.to(dtype) for n, t in load_file(good / WEIGHTS).items()}, good / WEIGHTS)
    found = finding(check(good), "GK503")
    assert found.severity is ERROR
    assert name in found.message


@pytest.mark.rule_fails("GK503")
def test_gk503_a_type_that_no_reader_knows(good: Path, base: gk.ModelMap) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    raw(good, json.dumps({name: entry(dtype="F3_NEW", shape=[2, 2])}).encode(), b"\0" * 4)
    report = check(good, base)
    assert finding(report, "GK503").severity is ERROR
    assert "F3_NEW" in finding(report, "GK505").message
    assert finding(check(good, base, data=False), "GK505").severity is OK


@pytest.mark.rule_passes("GK503")
def test_gk503_values_at_the_edge_of_a_type_are_finite(good: Path) -> None:
    large, small = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    for value in (large, small):
        save_file({n: torch.full_like(t, value) for n, t in load_file(good / WEIGHTS).items()}, good / WEIGHTS)
        assert finding(check(good), "GK503").severity is OK


def test_a_name_that_a_terminal_would_obey(good: Path, base: gk.ModelMap) -> None:
    name = "base_model.model.\x1b]0;owned\x07.lora_A.weight"
    raw(good, json.dumps({name: entry(shape=[1, 1])}).encode(), b"\0" * 4)
    report = check(good, base, target="vllm")
    assert finding(report, "GK505").severity is ERROR
    assert "\x1b" not in str(report)
