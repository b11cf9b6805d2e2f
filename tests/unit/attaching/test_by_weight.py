"""Linears that PEFT reaches by their weight alone, because it takes their names for the experts'."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig

import graftkit as gk
from graftkit.attaching.attach import adapted_sites


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_linear_is_adapted_as_planned(tmp_path: Path) -> None:
    """PEFT makes a module of it where a plain one becomes a wrapped parameter: what is saved fits both."""
    base = gk.twin("afmoe")
    base.save_pretrained(tmp_path / "base")
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    in_4_bit = type(base).from_pretrained(tmp_path / "base", quantization_config=quantized, dtype=torch.float32)
    # What PEFT would rename is reached by its weight, with or without the experts beside it.
    plan = gk.plan(in_4_bit, targets=["mlp", "experts"], allow_unmatched=True)
    by_weight = {a.target_path: a.path for a in plan.attached if a.target_path != a.path}
    assert by_weight

    adapted = gk.attach(in_4_bit, plan)
    assert set(by_weight.values()) < adapted_sites(adapted)
    assert not set(by_weight) & adapted_sites(adapted)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")

    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert set(by_weight) < adapted_sites(stock)
    saved = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    loaded = {name: p for name, p in stock.named_parameters() if "lora_" in name}
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    for path in by_weight.values():
        assert torch.allclose(update(adapted, path), update(stock, path), rtol=0, atol=1e-4)  # of 0.2


def update(model: PeftModel, path: str) -> torch.Tensor:
    """Return what the adapter adds to the output of one linear."""
    layer = model.get_base_model().get_submodule(path).eval()
    width = layer.get_base_layer().in_features
    given = torch.randn(4, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        adapted = layer(given)
        with model.disable_adapter():
            return adapted - layer(given)
