"""``graft convert``: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from tests.cli.running import fields_of, forked, graft, refused
from torch import nn


@pytest.fixture
def base(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> Path:
    model: Any = twin_of("llama")
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(twin_of("llama"), config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_a_conversion_and_its_report(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    done = graft("convert", adapter, tmp_path / "out", "--to", "vllm", "--base", base, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    fields = fields_of(done)
    assert fields["proof"]["slices"] == fields["proof"]["exact"] == 4
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(fields["files"]) == written
    of_form = {"adapter_config.json", "adapter_model.safetensors", "graftkit.json", "conversion_report.json"}
    assert written == of_form | {"README.md", "chat_template.jinja"}
    assert json.loads((tmp_path / "out" / "graftkit.json").read_text())["dialect"] == "vllm"


def test_for_people_and_again(base: Path, adapter: Path, tmp_path: Path) -> None:
    for _ in range(2):
        done = forked("convert", adapter, tmp_path / "out", "--to", "sglang", "--base", base)
        assert done.returncode == 0, done.stdout + done.stderr
        assert str(tmp_path / "out") in done.stdout


@pytest.mark.parametrize(
    ("options", "code"),
    [
        pytest.param(["--to", "vlm"], "convert-unknown", id="no such form"),
        pytest.param(["--to", "ollama"], "convert-unknown", id="an engine without a form"),
        pytest.param([], "usage", id="no form"),
    ],
)
def test_the_form_has_to_be_named(
    base: Path, adapter: Path, tmp_path: Path, options: list[str], code: str
) -> None:
    error = refused("convert", adapter, tmp_path / "out", "--base", base, *options)
    assert error["code"] == code
    assert not (tmp_path / "out").exists()


def test_a_wrong_form_is_suggested_better(base: Path, adapter: Path, tmp_path: Path) -> None:
    error = refused("convert", adapter, tmp_path / "out", "--base", base, "--to", "lama.cpp")
    assert "llama.cpp" in error["help"]


def test_in_place(base: Path, adapter: Path) -> None:
    for out in (adapter, adapter / "inside"):
        error = refused("convert", adapter, out, "--to", "vllm", "--base", base)
        assert error["code"] == "convert-in-place"


def test_a_folder_with_other_files(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "graftkit.json").write_text("{}")
    error = refused("convert", adapter, tmp_path / "out", "--to", "vllm", "--base", base)
    assert error["code"] == "output-not-empty"
    assert (tmp_path / "out" / "graftkit.json").read_text() == "{}"


def test_no_base_is_named(adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    error = refused("convert", adapter, tmp_path / "out", "--to", "vllm")
    assert error["code"] == "convert-no-base"


def test_another_base(adapter: Path, tmp_path: Path) -> None:
    error = refused("convert", adapter, tmp_path / "out", "--to", "vllm", "--base", "gpt2")
    assert error["code"] == "adapter-does-not-fit"
    assert not list(tmp_path.glob(".out*"))


def test_nothing_to_convert(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert forked("convert", adapter, tmp_path / "out", "--to", "vllm", "--base", base).returncode == 0
    error = refused("convert", tmp_path / "out", tmp_path / "two", "--to", "vllm", "--base", base)
    assert error["code"] == "convert-not-needed"
