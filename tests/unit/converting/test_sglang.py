"""To SGLang: one scale, one rank, and whole groups of fused projections."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.converting.served_adapters import Bench, products

import graftkit as gk
from graftkit.converting.errors import ConvertError


def assert_served(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> set[str]:
    """Compare every update, and check that all others add nothing; returns the names of those."""
    for name, update in wanted.items():
        torch.testing.assert_close(found[name.removesuffix(".weight")], update, rtol=1e-6, atol=1e-6)
    others = {name for name in found if f"{name}.weight" not in wanted}
    assert not any(bool(found[name].any()) for name in others)
    return others


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"use_rslora": True, "r": 3}, id="rslora"),
        pytest.param({"r": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 7}}, id="patterns"),
        pytest.param({"r": 4, "lora_alpha": 7}, id="plain"),
    ],
)
def test_the_scale_is_alpha_over_r_for_all(bench: Callable[[str], Bench], fields: dict[str, Any]) -> None:
    place = bench("llama")
    adapter = place.adapter(target_modules=r".*\.(q_proj|v_proj|down_proj)", **fields)
    gk.convert(adapter, place.folder / "out", to="sglang", base=place.base)
    padding = assert_served(products(place.folder / "out"), place.updates(adapter))
    assert {name.rpartition(".")[2] for name in padding} == {"k_proj"}
    config = json.loads((place.folder / "out" / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list)
    ranks = {
        t.shape[0] for n, t in load_file(place.folder / "out" / "adapter_model.safetensors").items() if "A" in n
    }
    assert ranks == {config["r"]}


def test_one_scale_for_all_leaves_the_factors_alone(bench: Callable[[str], Bench]) -> None:
    place = bench("llama")
    adapter = place.adapter(target_modules=["q_proj", "k_proj", "v_proj"], r=3, use_rslora=True)
    done = gk.convert(adapter, place.folder / "out", to="sglang", base=place.base)
    assert done.proof.exact == done.proof.slices > 0
    config = json.loads((place.folder / "out" / "adapter_config.json").read_text())
    assert math.isclose(config["lora_alpha"], 8 * math.sqrt(3))


def test_layers_that_share_keys_get_zeros_for_them(bench: Callable[[str], Bench]) -> None:
    place = bench("google/gemma-4-E2B-it")
    adapter = place.adapter(target_modules=r".*language_model.*\.q_proj", r=2)
    gk.convert(adapter, place.folder / "out", to="sglang", base=place.base)
    padding = assert_served(products(place.folder / "out"), place.updates(adapter))
    queries = len(place.updates(adapter))
    assert len(padding) == 2 * queries


@pytest.mark.parametrize(
    ("model", "target", "named"),
    [
        pytest.param("mixtral", "router", "gate", id="router"),
        pytest.param("google/gemma-4-E2B-it", "per_layer_model_projection", "per_layer", id="outside the layers"),
    ],
)
def test_names_without_a_place_are_refused(
    bench: Callable[[str], Bench], model: str, target: str, named: str
) -> None:
    place = bench(model)
    adapter = place.planned([target])
    with pytest.raises(ConvertError) as caught:
        gk.convert(adapter, place.folder / "out", to="sglang", base=place.base)
    assert caught.value.code == "convert-unsupported"
    assert named in str(caught.value.where)
    assert str(caught.value.help).endswith(f"graft merge {place.base} {adapter} MERGED")
    assert not (place.folder / "out").exists()
