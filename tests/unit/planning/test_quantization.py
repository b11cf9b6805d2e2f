"""The quantization plan's bytes are those of the model that bitsandbytes really makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import prepare_model_for_kbit_training
from torch import nn

import graftkit as gk
from graftkit.errors import PlanError
from graftkit.planning.quantization import plan_quantization

pytest.importorskip("bitsandbytes")


def load_quantized(model: nn.Module, folder: Path, bits: str) -> nn.Module:
    model.save_pretrained(folder)
    planned = plan_quantization(gk.survey(model), bits)
    return type(model).from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=planned.config, device_map="cpu"
    )


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("google/gemma-4-E2B-it", id="towers and per-layer embeddings"),
        pytest.param("google/gemma-4-26B-A4B-it", id="experts, router, tower"),
        pytest.param("mixtral", id="experts"),
        pytest.param("llama", id="dense"),
    ],
)
def test_bitsandbytes_packs_what_the_plan_says(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, name: str, bits: str
) -> None:
    model = twin_of(name)
    planned = plan_quantization(gk.survey(model), bits)
    packed = load_quantized(model, tmp_path, bits)
    found = {s.path for s in gk.survey(packed) if s.quantized}
    assert found == set(planned.quantized)
    kept = sum(p.numel() for p in packed.parameters() if p.is_floating_point())
    assert kept == planned.kept_params
    assert planned.kept_params == sum(row.params for row in planned.kept)


def test_upcast_bytes_are_what_preparation_adds(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    model = twin_of("google/gemma-4-26B-A4B-it")
    planned = plan_quantization(gk.survey(model), "4bit")
    packed = load_quantized(model, tmp_path, "4bit")
    before = _floating_bytes(packed)
    assert before == planned.kept_bytes
    prepared = prepare_model_for_kbit_training(packed, use_gradient_checkpointing=False)
    assert _floating_bytes(prepared) - before == planned.upcast_bytes


def _floating_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.is_floating_point())


def test_the_true_size_of_a_4_bit_mixture_of_experts() -> None:
    """Experts stay in 16 bit: the 26B model takes about 46 GB, not 14."""
    planned = plan_quantization(gk.survey("google/gemma-4-26B-A4B-it"), "4bit")
    assert 44e9 < planned.total_bytes < 52e9
    assert planned.kept[0].role == "expert"
    assert planned.kept[0].params * 2 > 0.8 * planned.total_bytes


def test_skipped_modules_are_towers_not_every_linear() -> None:
    planned = plan_quantization(gk.survey("google/gemma-4-E2B-it"), "4bit")
    assert "model.vision_tower" in planned.skip_modules
    assert "model.audio_tower" in planned.skip_modules
    assert len(planned.skip_modules) < 8


def test_an_unknown_quantization_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        plan_quantization(gk.survey("llama"), "3bit")
    assert caught.value.code == "quantization-unknown"


def test_a_plan_for_a_quantized_base(twin_of: Callable[[str], nn.Module], tmp_path: Path) -> None:
    model = twin_of("google/gemma-4-26B-A4B-it")
    plan = gk.plan(model, targets=["all-linear", "experts"], r=2, quantization="4bit")
    assert plan.quantization is not None
    assert plan.memory.base_weights == plan.quantization.total_bytes
    assert "stay" in str(plan)
    assert "expert" in {kept["role"] for kept in plan.to_dict()["quantization"]["kept"]}
    model.save_pretrained(tmp_path)
    packed = type(model).from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=plan.quantization_config, device_map="cpu"
    )
    adapted = gk.attach(packed, plan)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == plan.trainable_params


def test_without_quantization_nothing_is_said(twin_of: Callable[[str], nn.Module]) -> None:
    plan = gk.plan(twin_of("llama"))
    assert plan.quantization_config is None
    assert plan.to_dict()["quantization"] is None
