"""Qwen2-VL, 2.5-VL and 2.5-Omni: rotary sections that the model assumes where the configuration is silent."""

from __future__ import annotations

from graftkit.families._base import Family

FAMILY = Family(
    name="qwen2_vl",
    model_types=("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "qwen2_5_omni_talker"),
    # The attention falls back to sections of 16, 24 and 24 frequencies, for heads of 128; the twin's have 16.
    twin_overrides={"rope_parameters": {"mrope_section": [2, 3, 3]}},
)
