"""Cohere Compass: rotary parameters for each kind of layer, which its default configuration leaves open."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="cohere_compass",
    model_types=("cohere_compass_text",),
    # CohereCompassRotaryEmbedding falls back to sections of 24, 20 and 20; the twin's heads have 8 pairs.
    twin_overrides={
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
)
