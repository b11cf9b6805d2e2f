"""Ranks and scales of a saved configuration are those of PEFT's layers, or an error that names the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

import graftkit as gk
from graftkit.adapters.scale import rank_at, scale_at
from graftkit.errors import AdapterError

HUGE = 10**400  # a whole number of JSON, and no float


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="PEFT's defaults"),
        pytest.param({"r": 3, "lora_alpha": 7.5}, id="plain"),
        pytest.param({"r": 3, "lora_alpha": 7, "use_rslora": True}, id="rslora"),
        pytest.param(
            {"r": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {r"layers\.0\.self_attn\.v_proj": 3}},
            id="patterns",
        ),
    ],
)
def test_ranks_and_scales_are_pefts(twin_of: Callable[[str], nn.Module], fields: dict[str, Any]) -> None:
    model = get_peft_model(twin_of("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], **fields))
    layers = {path: m for path, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert len(layers) >= 4
    for path, layer in layers.items():
        assert rank_at(fields, path) == layer.r["default"]
        assert scale_at(fields, path) == pytest.approx(layer.scaling["default"], rel=1e-12)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"lora_alpha": "16"}, id="a text for alpha"),
        pytest.param({"lora_alpha": None}, id="null for alpha"),
        pytest.param({"lora_alpha": HUGE}, id="an alpha that no float holds"),
        pytest.param({"lora_alpha": float("inf")}, id="an infinite alpha"),
        pytest.param({"alpha_pattern": {"q_proj": -HUGE}}, id="such an alpha of one layer"),
        pytest.param({"alpha_pattern": [1]}, id="a list of alphas"),
        pytest.param({"r": "8"}, id="a text for the rank"),
        pytest.param({"r": 0}, id="no rank"),
        pytest.param({"r": HUGE}, id="a rank that no size can be"),
        pytest.param({"rank_pattern": "q_proj"}, id="a text for the ranks"),
    ],
)
@pytest.mark.parametrize("to", ["mlx", "vllm"])
def test_a_field_that_is_no_number_is_refused(
    twin_of: Callable[[str], nn.Module], tmp_path: Path, fields: dict[str, Any], to: str
) -> None:
    base: Any = twin_of("llama")
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(AdapterError) as caught:
        gk.convert(tmp_path / "adapter", tmp_path / "out", to=to, base=tmp_path / "base")
    assert caught.value.code == "adapter-config"
    assert not (tmp_path / "out").exists()
