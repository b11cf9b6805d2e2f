"""GK403: a saved adapter is the one in memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.unit.checks.observed import seen
from torch import Tensor, nn

import graftkit as gk
from graftkit.adapters.file import WEIGHTS_NAME, read_adapter
from graftkit.findings import Finding, Severity

TwinOf = Callable[[str], nn.Module]


@pytest.fixture
def adapted(twin_of: TwinOf) -> PeftModel:
    model = twin_of("qwen3")
    return gk.attach(model, gk.plan(model, targets="attention", r=2))


def against(model: PeftModel, folder: Path) -> Finding:
    return seen("GK403", adapter=read_adapter(folder), model=model)


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    weights = folder / WEIGHTS_NAME
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    return folder


def first(state: dict[str, Tensor]) -> str:
    return next(iter(state))


def _flip_one_bit(state: dict[str, Tensor]) -> dict[str, Tensor]:
    bits = state[first(state)].view(torch.int32)
    bits[0, 0] ^= 1
    return state


@pytest.mark.rule_fails("GK403")
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        pytest.param(lambda s: {n: t.new_empty(0) for n, t in s.items()}, "empty", id="empty"),
        pytest.param(lambda s: {n: t for n, t in s.items() if n != first(s)}, "missing", id="missing"),
        pytest.param(lambda s: {**s, "lora.extra": torch.ones(1)}, "that memory does not have", id="extra"),
        pytest.param(lambda s: {**s, first(s): s[first(s)][:1].clone()}, "of another shape", id="cut"),
        pytest.param(_flip_one_bit, "with other values", id="one bit"),
    ],
)
def test_gk403_a_file_that_is_not_the_adapter(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], fault: str, adapted: PeftModel, tmp_path: Path
) -> None:
    adapted.save_pretrained(tmp_path)
    finding = against(adapted, rewritten(tmp_path, change))
    assert finding.severity is Severity.ERROR
    assert finding.evidence[fault] > 0


@pytest.mark.rule_fails("GK403")
def test_gk403_an_adapter_that_was_trained_on(adapted: PeftModel, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        next(p for p in adapted.parameters() if p.requires_grad).add_(1e-3)
    assert against(adapted, tmp_path).severity is Severity.ERROR


@pytest.mark.rule_passes("GK403")
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_gk403_passes_on_what_was_just_saved(method: str, twin_of: TwinOf, tmp_path: Path) -> None:
    model = twin_of("qwen3")
    adapted = gk.attach(model, gk.plan(model, targets="attention", method=method))
    adapted.save_pretrained(tmp_path)
    finding = against(adapted, tmp_path)
    assert finding.severity is Severity.OK
    assert finding.evidence["tensors"] == finding.evidence["in_memory"] > 0


@pytest.mark.rule_passes("GK403")
def test_gk403_passes_on_a_file_in_another_type(adapted: PeftModel, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda state: {name: t.to(torch.bfloat16) for name, t in state.items()})
    assert against(adapted, tmp_path).severity is Severity.OK


@pytest.mark.rule_passes("GK403")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_gk403_passes_on_embeddings_saved_along(twin_of: TwinOf, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2, modules_to_save=["lm_head"])
    adapted = get_peft_model(twin_of("qwen3"), config)
    adapted.save_pretrained(tmp_path)
    finding = against(adapted, tmp_path)
    assert finding.evidence["tensors"] > finding.evidence["in_memory"]
    assert finding.severity is Severity.OK


@pytest.mark.rule_fails("GK403")
def test_gk403_each_adapter_against_its_own_folder(adapted: PeftModel, tmp_path: Path) -> None:
    adapted.add_adapter("other", adapted.peft_config["default"])
    adapted.save_pretrained(tmp_path)
    assert [against(adapted, f).severity for f in (tmp_path, tmp_path / "other")] == [Severity.OK, Severity.OK]
    weights = tmp_path / "other" / WEIGHTS_NAME
    weights.write_bytes((tmp_path / WEIGHTS_NAME).read_bytes())
    assert against(adapted, tmp_path / "other").severity is Severity.ERROR


@pytest.mark.rule_passes("GK403")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("llama", {}, id="adapter alone"),
        pytest.param("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}, id="trained whole"),
        pytest.param("gemma2", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, id="shared"),
        pytest.param("gemma2", {"trainable_token_indices": [3, 5]}, id="rows of a shared weight"),
        pytest.param("llama", {"target_modules": ["q_proj", "embed_tokens"]}, id="adapted"),
    ],
)
def test_gk403_passes_on_embeddings_that_peft_saves_as_well(
    name: str, options: dict[str, Any], twin_of: TwinOf, tmp_path: Path
) -> None:
    """It does so where the vocabulary was resized: copies of saved modules lie there under other names."""
    model = get_peft_model(twin_of(name), LoraConfig(r=2, **{"target_modules": ["q_proj"], **options}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in saved for saved in load_file(tmp_path / WEIGHTS_NAME))
    assert against(model, tmp_path).severity is Severity.OK
