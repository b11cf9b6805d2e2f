"""The conversion to plain LoRA does what PEFT's own does, where PEFT has one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.checks.live_adapters import with_effect
from torch import nn

import graftkit as gk
from graftkit.attaching.attach import attach
from graftkit.attaching.initial_values.restore import restore_moved_base
from graftkit.training.initialization.kept import InitialValues, convert_to_plain_lora

# PEFT loads the initial adapter for its conversion, which looks the base up on the hub.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def initialized(model: Any, **options: Any) -> tuple[gk.Plan, Any]:
    plan = gk.plan(model, targets="attention", r=2, init_lora_weights="corda", **options)
    return plan, gk.initialize(model, plan, gk.example_batch(model, batch_size=4))


@pytest.mark.parametrize(
    "options", [{}, {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"v_proj": 3}}, {"method": "rslora"}]
)
def test_files_are_those_of_peft_s_own_conversion(
    tmp_path: Path, twin_of: Callable[[str], nn.Module], options: dict[str, Any]
) -> None:
    _, adapted = initialized(twin_of("llama"), **options)
    initial = InitialValues.of(adapted)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "initial")
    adapted.peft_config["default"].init_lora_weights = "corda"
    with_effect(adapted)
    adapted.save_pretrained(tmp_path / "ours")
    convert_to_plain_lora(tmp_path / "ours", initial)
    adapted.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights")
    read = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    assert [read[0][name] for name in names] == [read[1][name] for name in names]
    # PEFT keeps targets in a set, and saves them in whatever order it has.
    assert set(read[0]["target_modules"]) == set(read[1]["target_modules"])


def test_the_moved_base_is_restored_bit_for_bit(twin_of: Callable[[str], nn.Module]) -> None:
    plan, adapted = initialized(twin_of("llama"))
    initial = InitialValues.of(adapted)
    again = attach(twin_of("llama"), gk.plan(twin_of("llama"), targets="attention", r=2))
    config: Any = plan.peft_config
    restore_moved_base(again, config, initial.tensors)
    first, second = adapted.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.peft_config["default"].init_lora_weights == "corda"


def test_in_16_bit_the_conversion_differs_by_a_rounding_of_the_base(
    tmp_path: Path, twin_of: Callable[[str], nn.Module]
) -> None:
    """W - s B0 A0 is rounded to the type of the base: no element loses more than a unit in the last place."""
    model = twin_of("llama").to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    _, adapted = initialized(model)
    for path, layer in adapted.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            start = before[f"{path}.weight"].double()
            base = layer.get_base_layer().weight.double()
            lost = base + layer.get_delta_weight("default").double() - start
            assert (lost.abs() <= 2.0**-8 * base.abs() + 1e-7).all()
