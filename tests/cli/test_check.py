"""``graft check``: findings and their exit status, and a clear error where there is no adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.cli.running import fields_of, forked, graft, refused
from torch import nn


@pytest.fixture
def base(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> str:
    folder = tmp_path / "base"
    model: Any = twin_of("llama")
    model.config.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(twin_of("llama"), config)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_good_adapter_exits_0(adapter: Path, base: str) -> None:
    done = graft("check", str(adapter), "--base", base, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert fields_of(done)["summary"] == {"error": 0, "warning": 0, "info": 0, "unknown": 0, "ok": 10}


def test_without_a_base_the_rest_is_still_checked(adapter: Path) -> None:
    done = forked("check", str(adapter), "--json")
    assert done.returncode == 0
    found = {f["code"]: f for f in fields_of(done)["findings"]}
    assert found["GK505"]["severity"] == "ok"
    assert {tuple(f["evidence"]["missing"]) for f in found.values() if f["severity"] == "unknown"} == {("base",)}


def test_what_passed_is_counted_and_listed_on_request(adapter: Path) -> None:
    quiet, verbose = forked("check", adapter), forked("check", adapter, "-v")
    assert "GK505" not in quiet.stdout
    assert "GK505" in verbose.stdout
    assert quiet.stdout.splitlines()[-1].startswith(verbose.stdout.splitlines()[-1])


def test_the_worst_finding_stands_last(adapter: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"a pickle, for all anyone knows")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    done = forked("check", adapter, "-v")
    heads = [line.split()[0].rstrip(",") for line in done.stdout.splitlines() if line[:1].isalpha()]
    order = ["ok", "unknown", "info", "warning", "error"]
    assert {"unknown", "error"} <= set(heads)
    assert heads == sorted(heads, key=order.index)


def test_a_merged_checkpoint_has_a_command_of_its_own(adapter: Path) -> None:
    error = refused("check", "merged", "--base", "the base", "--adapter", adapter, "-a", "b:0.3")
    assert error["code"] == "usage"
    assert error["help"] == f"graft check-merged merged --base 'the base' --adapter {adapter} --adapter b:0.3"


def test_a_finding_exits_1(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    done = forked("check", str(adapter), "--format", "json")
    assert done.returncode == 1
    failing = [f for f in fields_of(done)["findings"] if f["severity"] == "error"]
    assert [f["code"] for f in failing] == ["GK505"]
    assert failing[0]["source"] == "file"


def test_the_level_that_fails_can_be_chosen(adapter: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"a pickle, for all anyone knows")
    assert forked("check", str(adapter)).returncode == 0
    assert forked("check", str(adapter), "--fail-level", "warning").returncode == 1


def _no_config(adapter: Path) -> list[str]:
    (adapter / "adapter_config.json").unlink()
    return [str(adapter)]


def _nowhere(adapter: Path) -> list[str]:
    return [str(adapter / "nowhere")]


def _nested(adapter: Path) -> list[str]:
    (adapter / "adapter_config.json").write_bytes(b'{"peft_type": ' + b"[" * 5_000_000)
    return [str(adapter)]


def _a_pipe(adapter: Path) -> list[str]:
    (adapter / "adapter_config.json").unlink()
    os.mkfifo(adapter / "adapter_config.json")
    return [str(adapter)]


def _no_base(adapter: Path) -> list[str]:
    return [str(adapter), "--base", str(adapter)]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        pytest.param(_nowhere, "adapter-not-found", id="no folder"),
        pytest.param(_no_config, "adapter-config", id="no configuration"),
        pytest.param(_nested, "adapter-config", id="a configuration nested without end"),
        pytest.param(_a_pipe, "adapter-config", id="a pipe for a configuration"),
        pytest.param(_no_base, "not-a-model-directory", id="the base is no model"),
    ],
)
def test_what_cannot_be_checked_exits_2(adapter: Path, args: Callable[[Path], list[str]], code: str) -> None:
    error = refused("check", *args(adapter))
    assert error["code"] == code
    assert error["help"]


def test_a_nan_is_one_finding(adapter: Path) -> None:
    """A NaN in one tensor is one finding, not a crash."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    done = forked("check", str(adapter), "--json")
    assert done.returncode == 1
    assert [f["code"] for f in fields_of(done)["findings"] if f["severity"] == "error"] == ["GK503"]


_LIGHT = """
import sys
from graftkit.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    heavy = {"torch", "transformers", "peft"} & set(sys.modules)
    sys.exit(f"{sorted(heavy)} imported" if heavy else ended.code)
"""


def light(*args: str) -> subprocess.CompletedProcess[str]:
    """The command, which fails where it imports what takes seconds."""
    return subprocess.run([sys.executable, "-c", _LIGHT, *args], capture_output=True, text=True, check=False)


def test_headers_alone_need_neither_torch_nor_peft(adapter: Path) -> None:
    done = light("check", str(adapter), "--headers-only", "--json")
    assert done.returncode == 0, done.stderr
    found = {f["code"]: f["severity"] for f in fields_of(done)["findings"]}
    assert found == {
        **dict.fromkeys(("GK401", "GK504", "GK505", "GK506", "GK604"), "ok"),
        **dict.fromkeys(("GK501", "GK502", "GK503", "GK507", "GK509"), "unknown"),
    }


@pytest.mark.parametrize(
    ("field", "value", "severity"),
    [
        pytest.param("target_modules", "k_proj", "error", id="a pattern that matches no tensor"),
        pytest.param("layers_to_transform", [5], "error", id="another layer"),
        pytest.param("peft_type", "FOO", "error", id="a method that PEFT may know"),
    ],
)
def test_peft_is_asked_where_its_answer_matters(adapter: Path, field: str, value: object, severity: str) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    done = light("check", str(adapter), "--headers-only", "--json")
    assert {f["code"]: f["severity"] for f in fields_of(done)["findings"]}["GK504"] == severity
    assert "peft" in done.stderr


def test_a_pattern_of_ranks_is_read_without_peft(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"q_proj": 4}}))
    done = light("check", str(adapter), "--headers-only", "--json")
    assert done.returncode == 1, done.stderr
    assert {f["code"]: f["severity"] for f in fields_of(done)["findings"]}["GK504"] == "error"
