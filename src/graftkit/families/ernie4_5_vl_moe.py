"""ERNIE 4.5 VL: rotary sections that the model assumes where the configuration is silent."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="ernie4_5_vl_moe",
    model_types=("ernie4_5_vl_moe_text",),
    # The rotary embedding falls back to sections of 22, 22 and 20 frequencies; the twin's heads have 8 pairs.
    twin_overrides={"rope_parameters": {"mrope_section": [3, 3, 2]}},
)
