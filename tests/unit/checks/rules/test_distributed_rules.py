"""The rule on ZeRO-3: what happens to a parameter that is taken apart, played through on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.unit.checks.observed import seen
from torch import nn

import graftkit as gk
from graftkit.recipes.training import Training

ERROR, WARNING, OK = gk.Severity.ERROR, gk.Severity.WARNING, gk.Severity.OK
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
PARTED = Training(zero_stage=3)


def _take_apart(model: nn.Module) -> None:
    """What DeepSpeed's stage 3 leaves of the experts between two uses: nothing, and their shape beside it."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
            parameter.data = torch.empty(0)


@pytest.mark.rule_fails("GK402")
def test_gk402_parameters_in_parts_cannot_be_added_to(twin_of: Callable[[str], nn.Module]) -> None:
    model = twin_of("qwen3_moe")
    base = gk.survey(model)
    batch = gk.example_batch(model)
    _take_apart(model)
    adapted = get_peft_model(model, LoraConfig(**EXPERTS))
    with pytest.raises(RuntimeError):
        adapted(**batch)
    found = seen("GK402", peft_config=EXPERTS, training=PARTED, base=base)
    assert found.severity is WARNING
    assert found.evidence["parameters"] == sum(site.role == "expert" for site in base)
    assert "leaf" in str(found.help)


@pytest.mark.rule_fails("GK402")
@pytest.mark.parametrize(("version", "verdict"), [("0.18.0", ERROR), ("0.20.0", ERROR), ("0.21.2", WARNING)])
def test_gk402_older_peft_cannot_even_attach(version: str, verdict: gk.Severity) -> None:
    found = seen("GK402", peft_config=EXPERTS, training=PARTED, environment={"peft": version})
    assert found.severity is verdict
    assert ("IndexError" in found.message) is (verdict is ERROR)


@pytest.mark.rule_fails("GK402")
def test_gk402_names_that_peft_makes_into_parameters(twin_of: Callable[[str], nn.Module]) -> None:
    config = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    assert seen("GK402", peft_config=config, training=PARTED).severity is OK
    base = gk.survey(twin_of("qwen3_moe"))
    assert seen("GK402", peft_config=config, training=PARTED, base=base).severity is WARNING


@pytest.mark.rule_passes("GK402")
@pytest.mark.parametrize(
    ("config", "stage"),
    [
        pytest.param(EXPERTS, 2, id="stage 2"),
        pytest.param(EXPERTS, 0, id="no DeepSpeed"),
        pytest.param({"target_modules": ["q_proj"]}, 3, id="modules alone"),
    ],
)
def test_gk402_passes(config: dict[str, Any], stage: int) -> None:
    assert seen("GK402", peft_config=config, training=Training(zero_stage=stage)).severity is OK
