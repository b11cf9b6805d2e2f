"""LFM2 MoE: the kinds of layers, which its default configuration leaves open."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="lfm2_moe",
    model_types=("lfm2_moe",),
    # Released models begin with convolutions, the first ones without experts (Lfm2MoeDecoderLayer).
    twin_overrides={
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "conv", "full_attention"],
    },
)
