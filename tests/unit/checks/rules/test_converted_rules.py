"""Adapters in an engine's form: judged in that form, and for that engine alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.unit.checks.observed import by_code
from torch import nn

import graftkit as gk
from graftkit.checks.check import check
from graftkit.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
OK, ERROR = gk.Severity.OK, gk.Severity.ERROR


@pytest.fixture
def saved(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Save a base, and an adapter with an effect; returns both folders."""

    def make(name: str, **fields: Any) -> tuple[Path, Path]:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = twin_of(name)
            model.save_pretrained(tmp_path / "base")
            adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **fields))
            adapted.save_pretrained(str(tmp_path / "adapter"))
        return tmp_path / "base", tmp_path / "adapter"

    return make


KEYS = r".*language_model.*self_attn\.(q|k|v|o)_proj"


@pytest.mark.rule_passes("GK514", "GK707", "GK703", "GK501", "GK702", "GK401")
def test_a_converted_adapter_passes_where_its_original_fails(saved: Any, tmp_path: Path) -> None:
    base, adapter = saved("google/gemma-4-31B-it", target_modules=KEYS)
    before = by_code(check(adapter, base, target="vllm"))
    assert before["GK703"].severity is ERROR
    gk.convert(adapter, tmp_path / "out", to="vllm", base=base)
    report = check(tmp_path / "out", base, target="vllm")
    assert not [f for f in report if f.severity in {ERROR, gk.Severity.WARNING}]
    assert by_code(report)["GK703"].severity is OK


@pytest.mark.parametrize(
    ("to", "fields"),
    [
        pytest.param("vllm", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, id="experts"),
        pytest.param("sglang", {"target_modules": r".*\.q_proj", "use_rslora": True}, id="scale and targets"),
    ],
)
def test_nothing_is_left_to_convert(saved: Any, tmp_path: Path, to: str, fields: dict[str, Any]) -> None:
    base, adapter = saved("qwen3_moe", **{"target_modules": [], **fields})
    assert [f for f in check(adapter, base, target=to) if f.severity is ERROR]
    gk.convert(adapter, tmp_path / "out", to=to, base=base)
    assert not [f for f in check(tmp_path / "out", base, target=to) if f.severity is ERROR]


@pytest.mark.rule_fails("GK514")
def test_gk514_fails_where_a_copy_was_taken_away(saved: Any, tmp_path: Path) -> None:
    base, adapter = saved("google/gemma-4-31B-it", target_modules=r".*language_model.*self_attn\.k_proj")
    gk.convert(adapter, tmp_path / "out", to="vllm", base=base)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    kept = {n: t for n, t in tensors.items() if "v_proj" not in n}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "out" / WEIGHTS, {"format": "pt"})
    assert by_code(check(tmp_path / "out", base, target="vllm"))["GK514"].severity is ERROR


@pytest.mark.rule_fails("GK514")
@pytest.mark.parametrize("change", ["other base", "not finite", "another copy"])
def test_gk514_fails_on(saved: Any, tmp_path: Path, change: str) -> None:
    base, adapter = saved("google/gemma-4-31B-it", target_modules=r".*language_model.*self_attn\.k_proj")
    gk.convert(adapter, tmp_path / "out", to="vllm", base=base)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    name = next(n for n in tensors if "v_proj.lora_B" in n)
    if change == "other base":
        tensors[name.replace("self_attn", "attention")] = tensors.pop(name)
    elif change == "not finite":
        tensors[name][0, 0] = float("nan")
    else:
        tensors[name] *= 2
    save_file(tensors, tmp_path / "out" / WEIGHTS, {"format": "pt"})
    assert by_code(check(tmp_path / "out", base))["GK514"].severity is ERROR


@pytest.mark.rule_fails("GK707")
@pytest.mark.parametrize("target", ["sglang", "llama.cpp"])
def test_gk707_fails_for_another_engine(saved: Any, tmp_path: Path, target: str) -> None:
    base, adapter = saved("llama", target_modules=["q_proj", "v_proj"])
    gk.convert(adapter, tmp_path / "out", to="vllm", base=base)
    found = by_code(check(tmp_path / "out", base, target=target))
    assert found["GK707"].severity is ERROR
    assert found["GK514"].severity is OK
    # What the engine would make of files that it cannot read is not said.
    assert "GK701" not in found


def test_a_form_that_is_not_known_is_for_the_record_to_say(saved: Any, tmp_path: Path) -> None:
    base, adapter = saved("llama", target_modules=["q_proj"])
    (adapter / "graftkit.json").write_text(json.dumps({"format": 1, "dialect": "exllama"}))
    assert by_code(check(adapter, base))["GK510"].severity is gk.Severity.WARNING
    with pytest.raises(AdapterError) as caught:
        gk.convert(adapter, tmp_path / "out", to="vllm", base=base)
    assert caught.value.code == "adapter-record"


def test_a_form_of_another_kind_of_file_needs_its_base(saved: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    base, adapter = saved("llama", target_modules=["q_proj"])
    gk.convert(adapter, tmp_path / "out", to="llama.cpp", base=base)
    with pytest.raises(AdapterError) as caught:
        check(tmp_path / "out")
    assert caught.value.code == "adapter-needs-base"
    found = by_code(check(tmp_path / "out", base, target="llama.cpp"))
    assert not [code for code, f in found.items() if f.severity is ERROR]
    assert found["GK501"].severity is OK
