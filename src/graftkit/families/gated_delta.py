"""Models with gated delta-rule layers: the convolution that is read past its module."""

from __future__ import annotations

from graftkit.families._base import Bypassed, Family

# From the GatedDeltaNet forward of these types in transformers; their projections are called as modules.
FAMILY = Family(
    name="gated_delta",
    model_types=("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    bypassed=(Bypassed("*.linear_attn.conv1d", "the layer hands conv1d.weight to a causal convolution function"),),
)
