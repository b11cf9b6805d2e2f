"""The released Gemma 4 geometries build to the published sizes and wrapper counts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from graftkit.families import geometry
from graftkit.families.gemma4 import FAMILY
from graftkit.surveying.sources.build import build_on_meta
from graftkit.surveying.sources.load_config import load_config


@dataclass(frozen=True)
class Released:
    size: str
    billions: float
    vision_wrappers: int
    audio_wrappers: int


RELEASED = (
    Released("E2B", 5.10, 112, 120),
    Released("E4B", 7.94, 112, 120),
    Released("26B-A4B", 25.81, 189, 0),
    Released("31B", 31.27, 189, 0),
)


@pytest.fixture(params=RELEASED, ids=lambda r: r.size)
def released(request):
    return request.param


def test_every_released_size_is_covered_by_a_case():
    ids = {hub_id.removesuffix("-it").rpartition("gemma-4-")[2] for hub_id in FAMILY.geometries}
    assert ids == {r.size for r in RELEASED}


def test_tuned_and_pretrained_ids_share_one_configuration(released):
    assert geometry(f"google/gemma-4-{released.size}-it") is geometry(f"google/gemma-4-{released.size}")


def test_hub_ids_are_found_whatever_their_case(released):
    assert geometry(f"Google/GEMMA-4-{released.size}-IT") is not None


def test_sizes_and_wrappers_are_the_published_ones(released):
    hub_id = f"google/gemma-4-{released.size}-it"
    model = build_on_meta(load_config(hub_id).config)
    wrapped = [
        name
        for name, module in model.named_modules()
        if name.endswith(".linear") and name.startswith(("model.vision_tower", "model.audio_tower"))
    ]
    assert type(model).__name__ == "Gemma4ForConditionalGeneration"
    assert sum("vision_tower" in name for name in wrapped) == released.vision_wrappers
    assert sum("audio_tower" in name for name in wrapped) == released.audio_wrappers
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx(released.billions, abs=0.01)


@pytest.mark.parametrize(
    ("size", "shared_layers", "double_wide"),
    [("E2B", 20, True), ("E4B", 18, False), ("26B-A4B", 0, False), ("31B", 0, False)],
    ids=lambda value: str(value),
)
def test_shared_layers_have_no_keys_and_may_be_double_wide(size, shared_layers, double_wide):
    hub_id = f"google/gemma-4-{size}"
    model = build_on_meta(load_config(hub_id).config)
    layers = model.model.language_model.layers
    without_keys = [i for i, layer in enumerate(layers) if not hasattr(layer.self_attn, "k_proj")]
    assert without_keys == list(range(len(layers) - shared_layers, len(layers)))
    widths = {layer.mlp.gate_proj.out_features for layer in layers}
    assert len(widths) == (2 if double_wide else 1)
