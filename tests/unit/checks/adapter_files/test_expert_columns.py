"""The columns of stacked experts' lora_B: in PEFT's order, or in another trainer's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.checks.observed import finding
from torch import nn

import graftkit as gk

RANK, UNUSED = 4, 1


@pytest.fixture
def adapter(tmp_path: Path, twin_of: Callable[[str], nn.Module]) -> Path:
    """An adapter on experts, one of which no token has ever reached: PEFT's B starts at zero and stays there."""
    twin = twin_of("qwen3_moe")
    model = gk.attach(twin, gk.plan(twin, targets="experts", r=RANK, allow_unmatched=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            experts = parameter.shape[1] // RANK
            values = torch.randn(parameter.shape[0], RANK, experts)
            values[:, :, UNUSED] = 0
            parameter.data = values.reshape(parameter.shape)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(adapter: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    changed = {n: change(t).contiguous() if "lora_B" in n else t for n, t in tensors.items()}
    save_file(changed, file, metadata={"format": "pt"})


def by_expert(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(tensor.shape[0], RANK, -1).transpose(1, 2).reshape(tensor.shape)


def mark(adapter: Path, layout: str) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_B_layout": layout}))


def seen(adapter: Path, **options: bool) -> gk.Finding:
    return finding(gk.check(adapter, **options), "GK506")


@pytest.mark.rule_passes("GK506")
def test_gk506_passes_on_what_peft_saves(adapter: Path) -> None:
    found = seen(adapter)
    assert found.severity is gk.Severity.OK
    assert found.evidence["by_rank"] > 0


@pytest.mark.rule_fails("GK506")
def test_gk506_columns_that_go_by_expert(adapter: Path) -> None:
    rewrite(adapter, by_expert)
    found = seen(adapter)
    assert found.severity is gk.Severity.ERROR
    assert found.evidence["by_expert"] > 0


@pytest.mark.rule_fails("GK506")
def test_gk506_a_configuration_that_says_so(adapter: Path) -> None:
    mark(adapter, "grouped_by_expert")
    assert seen(adapter).severity is gk.Severity.ERROR
    mark(adapter, "rank_major")
    assert seen(adapter).severity is gk.Severity.OK


def test_gk506_unknown_where_the_numbers_do_not_tell(adapter: Path) -> None:
    assert seen(adapter, data=False).severity is gk.Severity.UNKNOWN
    rewrite(adapter, torch.ones_like)
    assert seen(adapter).severity is gk.Severity.UNKNOWN


@pytest.mark.rule_passes("GK506")
def test_gk506_passes_without_stacked_experts(tmp_path: Path, twin_of: Callable[[str], nn.Module]) -> None:
    twin = twin_of("llama")
    gk.attach(twin, gk.plan(twin, r=RANK)).save_pretrained(tmp_path)
    assert seen(tmp_path).severity is gk.Severity.OK
